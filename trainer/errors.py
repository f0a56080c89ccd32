"""Errors that a user can cause, each with the exit code of the program that it ends.

Messages say what was given, what was expected and what to do. `train.py` prints them in one line that begins with
`error:`, without a traceback. In a notebook or a test they are ordinary `ValueError`s.
"""

import errno
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

resource: Any = None
with suppress(ImportError):  # Windows has no such limits
    import resource


class UsageError(ValueError):
    """A flag, a configuration value or an argument is wrong (exit code 2)."""

    exit_code = 2


class DataError(ValueError):
    """Images, labels or weights cannot be used as they are (exit code 65, `EX_DATAERR`)."""

    exit_code = 65


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not belong to this model (exit code 65, `EX_DATAERR`)."""

    exit_code = 65


class NumericalError(ValueError):
    """The numbers of a training are wrong, such as a loss of NaN (exit code 70, `EX_SOFTWARE`).

    Attributes:
        step: the optimizer step, counted from 1.
        samples: indices of the training samples of that step.
    """

    exit_code = 70

    def __init__(self, message: str, *, step: int, samples: Sequence[int] = ()):
        super().__init__(message)
        self.step, self.samples = step, list(samples)


MENDABLE = (UsageError, DataError, CheckpointError, NumericalError)  # a user can mend them without a traceback


def check_least(least: int, **given: int | None) -> None:
    """Raise UsageError for the first number that is less than `least`; None is allowed."""
    for name, value in given.items():
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}: expected at least {least}.")


def check_probability(**given: float | None) -> None:
    """Raise UsageError for the first number that is not from 0 to 1; None is allowed."""
    for name, value in given.items():
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{name} is {value}: expected a probability, 0 to 1.")


def exit_code(error: BaseException) -> int:
    """The exit code of a program that an error ends: its `exit_code`, 74 (`EX_IOERR`) for an OSError, or 1."""
    return getattr(error, "exit_code", 74 if isinstance(error, OSError) else 1)


def first_sentence(error: Exception) -> str:
    """The first sentence of an error of torch, without advice such as to load a file with weights_only=False."""
    return re.split(r"\. |\n", str(error))[0].rstrip(".")


def explained(error: Exception) -> Exception:
    """An OSError with advice for torch's error about a data worker that died or hangs; other errors as they are."""
    text = str(error).partition("\n")[0].strip()
    if isinstance(error, RuntimeError) and text.startswith("DataLoader "):
        return OSError(
            f"loading images failed: {text.rstrip('.')}. A worker that is killed usually means that memory, or shared "
            "memory (/dev/shm), is full: give fewer --workers. One that times out waits for a file that does not come: "
            "see --timeout. With --workers 0 the process loads its images itself."
        )
    if isinstance(error, OSError) and error.errno == errno.EMFILE and resource is not None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return OSError(error.errno, f"{error.strerror}: raise the limit of {most} (ulimit -n) or lower --workers")
    return error


class Preempted(BaseException):
    """The run was told to stop; it can be resumed (exit code 75, `EX_TEMPFAIL`).

    Like KeyboardInterrupt it is no `Exception`: it may come up anywhere, and code that handles errors must not eat it.

    Attributes:
        late: this process alone ends, while it waits for images: the others have not agreed on it.
    """

    exit_code, late = 75, False


class Elsewhere(RuntimeError):
    """Another process ended the run, or is lost; this process ends with the same exit code.

    Attributes:
        rank: index of the other process.
        kind: name of the type of its exception; "Preempted" if it was told to stop before there was anything to save;
            "Lost" if it was killed or suspended.
        exit_code: exit code of the other process, and of this one.
        reason: text of its exception.
    """

    def __init__(self, rank: int, kind: str, exit_code: int, reason: str):
        verb = "was" if kind == Preempted.__name__ else "failed:"
        super().__init__(f"process {rank} {verb} {reason}")
        self.rank, self.kind, self.exit_code, self.reason = rank, kind, exit_code, reason

    @property
    def orphans(self) -> bool:
        """Whether the lost process is the main process, which prints and writes for all others."""
        return (self.rank, self.kind) == (0, "Lost")
