"""A process that is told to stop; what becomes of the run is in test_exactness.py."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from launching import search_path

from trainer.errors import Preempted
from trainer.processes import preemption
from trainer.processes.preemption import Preemption


@pytest.fixture
def guard():
    """A function that makes one; the handlers of pytest are put back."""
    made = []
    yield lambda **options: made.append(Preemption(Accelerator(cpu=True), **options)) or made[-1]
    for one in reversed(made):
        one.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_there_is_something_to_save_it_stops_at_once(guard, number):
    guard()
    with pytest.raises(Preempted, match=f"stopped by {number.name} before the training began") as stop:
        os.kill(os.getpid(), number)
    assert stop.value.exit_code == 75


@pytest.mark.parametrize("place", ["start", "freeze", "cli"])
def test_before_the_training_it_ends_with_one_line(program, tmp_path, place):
    """While torch is imported; while the model is built; where the command line is read, in the name of all imports."""
    setup = "import os, signal, trainer, trainer.cli\ndef stop(*a, **k): os.kill(os.getpid(), signal.SIGINT)\n"
    setup += {"cli": "trainer.cli._layers = stop"}.get(place, f"trainer.{place} = stop")
    done = program("--epochs", "1", cwd=tmp_path, setup=setup)
    assert done.returncode == 75
    assert done.stderr == "error: stopped by SIGINT before the training began: nothing is lost, start it again\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_later_it_takes_note_and_stops_at_the_next_check(guard, number):
    checks = guard()
    checks.armed = True
    assert checks.check() is False
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # the first one is the reason
    with pytest.raises(Preempted, match=number.name):
        checks.check()


def test_while_it_waits_for_images_it_does_not_wait_long(guard, monkeypatch):
    monkeypatch.setattr(preemption, "PATIENCE", 0.2)
    checks = guard()
    checks.armed = True
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.4)  # not for images: it takes note, as long as that takes
    began = time.monotonic()
    with preemption.waiting():
        with preemption.waiting():
            pass
        with pytest.raises(Preempted, match="SIGTERM") as stop:
            time.sleep(30)
    assert time.monotonic() - began < 5
    assert stop.value.late
    checks.close()
    with preemption.waiting():
        time.sleep(1.2)


def test_no_handler_of_errors_eats_it():
    assert not issubclass(Preempted, Exception)


def test_a_time_limit_leaves_room_for_a_step_and_a_save(guard, monkeypatch):
    monkeypatch.setattr(preemption, "BEGAN", time.monotonic())
    checks = guard(time_limit=1)
    checks.check()
    monkeypatch.setattr(preemption, "BEGAN", time.monotonic() - 40)
    checks.check()
    checks._longest = 11.0  # 40 s gone, and twice the longest gap between two checks would be over 60
    with pytest.raises(Preempted, match="time limit"):
        checks.check()


def test_a_save_is_due_after_so_many_minutes(guard):
    checks = guard(save_minutes=0.001)
    checks.check()
    time.sleep(0.07)
    assert checks.check() is True
    assert checks.check() is False


def test_the_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Preemption(Accelerator(cpu=True)) as checks:
        assert signal.getsignal(signal.SIGTERM) == checks._note
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    checks.close()


def test_outside_the_main_thread_the_clock_is_noted():
    with ThreadPoolExecutor() as threads:
        checks = threads.submit(Preemption, Accelerator(cpu=True), save_minutes=0).result()
    assert checks.check() is True
    checks.close()


LAUNCHED = """
import os, signal, sys, types
from trainer.processes import preemption
preemption.end_at_once()
guard = preemption.Preemption(types.SimpleNamespace(num_processes=1))
print(f"child of {os.getppid()} is ready", flush=True)
signal.pause()
"""
LAUNCHER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", os.environ["CHILD"]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), child.poll(), os.getpid(), flush=True)
"""


def run_launcher(code, *before):
    env = {**os.environ, "CHILD": LAUNCHED, "ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": search_path()}
    command = [*before, sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_a_launcher_that_is_process_1_is_alive():
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    done = run_launcher(LAUNCHER, *alone)
    assert done.stdout == "child of 1 is ready None 1\n", done.stderr


def test_it_ends_with_its_launcher():
    done = run_launcher(LAUNCHER + "print(child.pid)\n")
    pid = int(done.stdout.split()[-1])
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}") or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it outlived its launcher")


def test_a_launcher_that_dies_while_this_is_asked_for_is_noticed(monkeypatch):
    parents, killed = [10, 20], []  # adopted by 20, which need not be 1
    monkeypatch.setattr(os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(os, "kill", lambda *about: killed.append(about))
    monkeypatch.setattr(preemption.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    preemption._die_with_parent()
    assert killed == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_not_ready_stops_all_as_preempted(program, tmp_path, rank):
    """A signal to the process that opens its logs, while the other one has begun to train."""
    setup = "import os, signal, time, trainer\nold = trainer.Logs.__init__\ndef stop(self, *a, **k):\n"
    setup += f"    if os.environ['RANK'] == '{rank}':\n        time.sleep(1)\n"
    setup += "        os.kill(os.getpid(), signal.SIGTERM)\n    old(self, *a, **k)\ntrainer.Logs.__init__ = stop"
    done = program("--epochs", "1", "--workers", "0", "--output", "run", cwd=tmp_path, processes=2, setup=setup)
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: stopped by " in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "preempted"
    assert not (tmp_path / "run" / "error.json").exists()


def test_the_main_function_may_be_called_outside_the_main_thread(program, tmp_path):
    setup = "import os, signal, threading, train\nfrom trainer.cli import parse\nfrom trainer.processes import finish\n"
    setup += "config = parse(train.__doc__, ['--epochs', '1', '--workers', '1', '--output', 'run'])\n"
    setup += "handlers = lambda: [signal.getsignal(number) for number in signal.valid_signals()]\nbefore = handlers()\n"
    setup += "work = threading.Thread(target=train.main, args=[config])\nwork.start()\nwork.join()\nfinish()\n"
    setup += "assert before == handlers()\nprint('handlers as before', flush=True)\nos._exit(0)"
    done = program(cwd=tmp_path, setup=setup)
    assert done.stdout.endswith("handlers as before\n"), done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "completed"
