"""The end of a program: one message, an exit code, no process left behind."""

import atexit
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from trainer import errors
from trainer.errors import CheckpointError, Elsewhere, NumericalError, Preempted, UsageError, exit_code
from trainer.processes.watch import explained


def run_and_exit(function: Callable[..., None], *arguments: object) -> NoReturn:
    """Calls the program's main function and ends the process, with exit code 0 or that of the error (see `fail`).

    An exception that a user cannot mend is a mistake of the program: it is printed with its traceback, exit code 1.
    """
    code = 0
    try:
        try:
            function(*arguments)
        except Exception as error:
            error = explained(error)
            if "TORCHELASTIC_ERROR_FILE" in os.environ and not isinstance(error, Elsewhere):
                ErrorHandler().record_exception(error)  # the launcher prints it
            raise error
    except (*errors.MENDABLE, OSError, Elsewhere, Preempted) as error:
        _kill_workers()  # here: with the error goes what its frames hold, such as a loader that would wait for each
        code = fail(error)
    except KeyboardInterrupt:  # before Preemption took note of signals
        code = 130
    except Exception:
        _kill_workers()
        code = 1
        with suppress(OSError):
            traceback.print_exc()
    # Not by way of the interpreter's finalization: threads of torch.distributed that want the GIL then are unwound
    # through C++ code that cannot be, and abort the process, whatever its exit code was going to be.
    atexit._run_exitfuncs()  # ends data workers, and the watch
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _kill_workers() -> None:
    """Ends the data workers: one that hangs would be waited for, and one that dies now is no news."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def fail(error: BaseException) -> int:
    """Prints an error that a user can mend as one message, without a traceback.

    Every process fails, one speaks: what another process has said, and what all of a machine find, is not repeated.

    Returns:
        The exit code of the program.
    """
    shared = isinstance(error, Elsewhere | UsageError | CheckpointError | NumericalError | Preempted)
    if not shared or os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "orphans", False):
        with suppress(OSError):  # nobody can read it, and the exit code must still be right
            print(f"error: {error}", file=sys.stderr, flush=True)
    return exit_code(error)
