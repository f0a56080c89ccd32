"""Signals, time limits, and the stop that all processes agree on.

A process that is told to stop (SIGTERM, SIGINT, SIGUSR1) only takes note. At the next `check`, which every process
calls at the same points of the run, the notes are reduced to one, and all stop there together. torch is imported where
it is used: `end_at_once` is to be called before that. Images may be slow: while a process waits for them, it waits no
longer than `PATIENCE` after the signal.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from trainer.errors import Preempted
from trainer.processes import console, launcher
from trainer.storage import files

if TYPE_CHECKING:
    from accelerate import Accelerator

BEGAN = time.monotonic()  # seconds; about when the program started, as this is imported before torch
_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]  # not Windows
PATIENCE = 10.0  # seconds that images may take once the run was told to stop
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2
_TOO_EARLY = "stopped by {} before the training began: nothing is lost, start it again"


def end_at_once() -> None:
    """Begins a program: until there is a `Preemption`, a signal ends it with one line and exit code 75.

    Also prepares what the first line may need: a console that accepts any text, and an environment without the rank of
    an earlier program.
    """
    console.accept_any_text()
    launcher.forget_leftovers()
    for number in _SIGNALS:
        signal.signal(number, _end)
    if _launched():
        _die_with_parent()


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Around a main function: however it ends, handlers of signals are as before, and it holds no folder any more."""
    try:
        yield
    finally:
        if Preemption.current is not None:
            Preemption.current.close()
        files.unlock_all()


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for images: the only place where a signal, once `PATIENCE` is over, raises `Preempted`."""
    global _waits
    before, _waits = _waits, True
    try:
        yield
    finally:
        _waits = before


_waits = False


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"error: {_TOO_EARLY.format(signal.Signals(number).name)}\n".encode())
    os._exit(Preempted.exit_code)  # an exception in the middle of an import may be taken for a missing package


class Preemption:
    """Takes note of signals and of the clock from here on; until `armed`, a signal ends the process at once, with 75.

    A second Ctrl-C ends it at once in any case (exit code 130): checkpoints are written so that this cannot harm them.
    Outside the main thread, where Python allows no handlers of signals, only the clock is noted. As a context manager,
    or with `close`, it puts back the handlers that it replaced; so does `cleaning_up`.

    Args:
        accelerator: the Accelerator of the run.
        time_limit: minutes from the start of the process until it must be gone; None for no limit.
        save_minutes: minutes between saves; None for none.
    """

    current: "Preemption | None" = None  # there is one in a process

    def __init__(
        self, accelerator: "Accelerator", *, time_limit: float | None = None, save_minutes: float | None = None
    ):
        self.accelerator = accelerator
        self.armed = False
        self._limit = None if time_limit is None else 60 * time_limit
        self._save_interval = None if save_minutes is None else 60 * save_minutes
        self._reason = ""
        self._saved = time.monotonic()
        self._checked: float | None = None
        self._longest = 0.0  # seconds between two checks
        self._group: Any = None
        if accelerator.num_processes > 1:
            from torch import distributed

            if distributed.get_backend() != "gloo":
                self._group = distributed.new_group(backend="gloo")  # notes travel by CPU: no wait for the GPU
        self._before: dict[int, Any] = {}
        self._death_signal: int | None = None
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
            if hasattr(signal, "SIGALRM"):
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
            Preemption.current = self
            if _launched():
                self._death_signal = _die_with_parent()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Puts back the handlers of signals as they were; a signal is no longer noted."""
        if self._before and self._reason and hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            if signal.getsignal(number) in (self._note, self._give_up):  # somebody may have replaced it meanwhile
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        Preemption.current = None
        if self._death_signal is not None:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, self._death_signal)
            self._death_signal = None

    def check(self) -> bool:
        """Agrees with the other processes (a collective): all stop if any was told to.

        Returns:
            Whether a save is due on any process.

        Raises:
            Preempted: on every process.
        """
        now = time.monotonic()
        if self._checked is not None:  # what came before the first check, such as a download, is no step
            self._longest = max(self._longest, now - self._checked)
        self._checked = now
        # The next check must come before the limit, and so must the save: leave room for twice the longest gap so far.
        if self._limit is not None and now - BEGAN + max(2 * self._longest, 0.05 * self._limit) > self._limit:
            self._reason = self._reason or "time limit"
        save = self._save_interval is not None and now - self._saved > self._save_interval
        stop = bool(self._reason)
        if self.accelerator.num_processes > 1:
            import torch

            flags = torch.tensor([stop, save], dtype=torch.int32)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=self._group)
            stop, save = flags.tolist()
        if stop:
            raise Preempted(self._reason or "a signal to another process, or its time limit")
        if save:
            self._saved = now
        return bool(save)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._reason and number == signal.SIGINT:
            os._exit(130)
        first, self._reason = not self._reason, self._reason or name
        if first and not self.armed:  # nothing to save yet, and the work under way may take long
            stop = Preempted(_TOO_EARLY.format(name))
            if self.accelerator.num_processes > 1:  # the others wait for this one, and may be armed already
                from trainer.processes import watch

                watch.tell(stop)
            raise stop
        if first and hasattr(signal, "SIGALRM") and signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1.0)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if _waits:
            signal.setitimer(signal.ITIMER_REAL, 0)
            stop = Preempted(self._reason)
            stop.late = True
            raise stop


def _launched() -> bool:
    """Whether `accelerate launch` is the parent; a program that a shell has started may outlive it."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def _die_with_parent() -> int | None:
    """Asks for SIGTERM when the parent dies: a killed `accelerate launch` leaves its processes running. Linux only.

    Returns:
        The signal that was asked for before, 0 for none; None where the system has no such thing.
    """
    if sys.platform != "linux":
        return None
    # Not a comparison with 1: in a container the launcher itself may have that number, and elsewhere another process
    # than 1 may adopt orphans.
    parent, prctl, before = os.getppid(), ctypes.CDLL(None).prctl, ctypes.c_int(0)
    prctl(_PR_GET_PDEATHSIG, ctypes.byref(before))
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)
    return before.value
