"""Errors a user can cause, each with the exit code of the program that it ends.

Messages say what was given, what was expected and what to do. `train.py` prints them as one `error:` line, without
a traceback; called from a notebook or a test they are ordinary `ValueError`s.
"""

from collections.abc import Sequence


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
