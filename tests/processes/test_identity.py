import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from trainer.processes.identity import Identity

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_process_is_found_until_it_ends(sleeper):
    identity = Identity(**Identity.of(sleeper.pid).to_dict())
    assert identity.is_running()
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # a zombie: ended, its number still taken
    assert not identity.is_running()
    assert not identity.kill()
    sleeper.wait()
    assert not identity.is_running()


def test_this_process_is_one_of_them():
    assert Identity.of() == Identity.of(os.getpid())
    assert Identity.of().is_running()


@pytest.mark.parametrize("other", [{"boot": "another"}, {"namespace": "pid:[1]"}, {"began": "1"}, {"boot": ""}])
def test_the_same_number_elsewhere_gets_no_signal(sleeper, other):
    identity = replace(Identity.of(sleeper.pid), **other)
    assert not identity.is_running()
    assert not identity.kill()
    assert sleeper.poll() is None


@pytest.mark.parametrize("handles", [True, False])
def test_the_confirmed_process_gets_the_signal(sleeper, handles, monkeypatch):
    if not handles:
        monkeypatch.delattr(os, "pidfd_open")
    assert Identity.of(sleeper.pid).kill(signal.SIGTERM)
    assert sleeper.wait(10) == -signal.SIGTERM
