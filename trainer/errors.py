"""Errors a user can cause, each with the exit code of the program that it ends.

Messages say what was given, what was expected and what to do. `train.py` prints them as one `error:` line, without
a traceback; called from a notebook or a test they are ordinary `ValueError`s.
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
    """Training went wrong in its numbers (exit code 70, `EX_SOFTWARE`).

    Attributes:
        step: the optimizer step, counted from 1.
        samples: indices of the training samples of that step.
    """

    exit_code = 70

    def __init__(self, message: str, *, step: int, samples: Sequence[int] = ()):
        super().__init__(message)
        self.step, self.samples = step, list(samples)


MENDABLE = (UsageError, DataError, CheckpointError, NumericalError)  # by the user, whom a traceback would not help


def check_least(least: int, **given: int | None) -> None:
    """Raises UsageError for a number that is given and less than `least`."""
    for name, value in given.items():
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}: expected at least {least}.")


def exit_code(error: BaseException) -> int:
    """Returns the exit code of the program that an error ends: its own, 74 (`EX_IOERR`) for OSError, or 1."""
    return getattr(error, "exit_code", 74 if isinstance(error, OSError) else 1)


def first_sentence(error: Exception) -> str:
    """Returns torch's text of an error without its advice, such as to load a file with weights_only=False."""
    return re.split(r"\. |\n", str(error))[0].rstrip(".")


def explained(error: Exception) -> Exception:
    """Returns torch's error of a data worker that died or hangs as an OSError with advice; other errors as they are."""
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
        rank: of the other process.
        kind: type of its exception, by name: "Preempted" if it was told to stop before it had anything to save; "Lost"
            if it was killed or suspended.
        exit_code: its exit code.
        reason: text of its exception.
    """

    def __init__(self, rank: int, kind: str, exit_code: int, reason: str):
        verb = "was" if kind == Preempted.__name__ else "failed:"
        super().__init__(f"process {rank} {verb} {reason}")
        self.rank, self.kind, self.exit_code, self.reason = rank, kind, exit_code, reason

    @property
    def orphans(self) -> bool:
        """Whether the main process is lost, which speaks and writes for all others."""
        return (self.rank, self.kind) == (0, "Lost")
