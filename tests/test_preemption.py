"""A process that is told to stop; what becomes of the run is in test_exactness.py."""

import os
import signal
import time

import pytest
from accelerate import Accelerator

from trainer.preemption import Preempted, Preemption


@pytest.fixture
def guard():
    """A function that makes one; the handlers of pytest are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield lambda **options: Preemption(Accelerator(cpu=True), **options)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_there_is_something_to_save_it_stops_at_once(guard, number):
    guard()
    with pytest.raises(Preempted, match=f"stopped by {number.name} before the training began") as stop:
        os.kill(os.getpid(), number)
    assert stop.value.exit_code == 75


@pytest.mark.parametrize("place", ["start", "build_model", "config"])
def test_before_the_training_it_ends_with_one_line(program, tmp_path, place):
    """While torch is imported; while the model is built; where the command line is read, in the name of all imports."""
    setup = "import os, signal, trainer, trainer.config\ndef stop(*a, **k): os.kill(os.getpid(), signal.SIGINT)\n"
    setup += {"config": "trainer.config._layers = stop"}.get(place, f"trainer.{place} = stop")
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


def test_no_handler_of_errors_eats_it():
    assert not issubclass(Preempted, Exception)


def test_a_time_limit_leaves_room_for_a_step_and_a_save(guard, monkeypatch):
    from trainer import preemption

    monkeypatch.setattr(preemption.run, "BEGAN", time.monotonic())
    checks = guard(time_limit=1)
    checks.check()
    monkeypatch.setattr(preemption.run, "BEGAN", time.monotonic() - 40)
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
