"""Signals, time limits, and the stop that all processes agree on.

A process that is told to stop (SIGTERM, SIGINT, SIGUSR1) only takes note. At the next `check`, which every process
calls at the same points of the run, the notes are reduced to one, and all stop there together. torch is imported where
it is used: `end_at_once` is to be called before that.
"""

import ctypes
import os
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

from trainer import run

if TYPE_CHECKING:
    from accelerate import Accelerator

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_TOO_EARLY = "stopped by {} before the training began: nothing is lost, start it again"


class Preempted(BaseException):
    """The run was told to stop; it can be resumed (exit code 75, `EX_TEMPFAIL`).

    Like KeyboardInterrupt it is no `Exception`: it may come up anywhere, and code that handles errors must not eat it.
    """

    exit_code = 75


def end_at_once() -> None:
    """From here until there is a `Preemption`, a signal ends the program with one line and exit code 75."""
    for number in _SIGNALS:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"error: {_TOO_EARLY.format(signal.Signals(number).name)}\n".encode())
    os._exit(Preempted.exit_code)  # an exception in the middle of an import may be taken for a missing package


class Preemption:
    """Takes note of signals and of the clock from here on; until `armed`, a signal ends the process at once, with 75.

    A second Ctrl-C ends it at once in any case (exit code 130): checkpoints are written so that this cannot harm them.

    Args:
        accelerator: of the run.
        time_limit: minutes from the start of the process until it must be gone; None for no limit.
        save_minutes: minutes between saves; None for none.
    """

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
        self._group = None
        if accelerator.num_processes > 1:
            from torch import distributed

            if distributed.get_backend() != "gloo":
                self._group = distributed.new_group(backend="gloo")  # notes travel by CPU: no wait for the GPU
        for number in _SIGNALS:
            signal.signal(number, self._note)
        _die_with_launcher()

    def check(self) -> bool:
        """Agree with the other processes (a collective): stop if any was told to; True if a save is due on any.

        Raises:
            Preempted: on every process.
        """
        now = time.monotonic()
        if self._checked is not None:  # what came before the first check, such as a download, is no step
            self._longest = max(self._longest, now - self._checked)
        self._checked = now
        # The next check must come before the limit, and so must the save: leave room for twice the longest gap so far.
        if self._limit is not None and now - run.BEGAN + max(2 * self._longest, 0.05 * self._limit) > self._limit:
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
        self._reason = self._reason or name
        if not self.armed:  # nothing to save yet, and what is under way may take long
            raise Preempted(_TOO_EARLY.format(name))


def _die_with_launcher() -> None:
    """Be sent SIGTERM when the launcher dies: a killed `accelerate launch` leaves its processes running.

    Linux only. Not done without a launcher: a program started from a shell may outlive it.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:  # it died before this line
            os.kill(os.getpid(), signal.SIGTERM)
