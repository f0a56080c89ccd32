"""Data workers that die or hang: an error where their batch is waited for, and nowhere else.

When a worker process dies, torch's handler of SIGCHLD raises in whatever the main thread does at that moment: it may be
the writing of a checkpoint, or of the news that the run has failed. And a worker that is stopped is waited for without
end, whatever the DataLoader's timeout, if it still has to hand over the memory of a batch that it has announced.
"""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from trainer.processes import preemption

_LOOK = 0.5  # seconds between two looks at the clock


def batches(loader: DataLoader, *, timeout: float = 0.0) -> Iterator[Any]:
    """Yields the batches of a loader, as `for batch in loader` does.

    Args:
        loader: without a timeout of its own, so that it looks every five seconds whether its workers live.
        timeout: seconds that one batch may take; 0 for no limit. The workers are then killed.

    Raises:
        RuntimeError: a worker has died or hangs. Its text begins with "DataLoader ", see `errors.explained`.
        Preempted: the run was told to stop a while ago; see `preemption.waiting`.
    """
    others, patience = set(multiprocessing.active_children()), _Patience(timeout * (loader.num_workers > 0))
    try:
        with _no_handler(), preemption.waiting(), patience.waiting():
            iterator = iter(loader)
        # Those of a persistent loader have begun with its first iterator.
        patience.workers = getattr(iterator, "_workers", None) or [*set(multiprocessing.active_children()) - others]
        while True:
            with preemption.waiting(), patience.waiting():
                batch = next(iterator, patience)
            if batch is patience:
                return
            yield batch
    finally:
        patience.close()


class _Patience:
    """A thread that kills workers when one wait takes longer than `timeout` seconds; none if that is 0."""

    def __init__(self, timeout: float):
        self.timeout, self.workers, self.over = timeout, [], False
        self._since: float | None = None
        self._closed = threading.Event()
        if timeout > 0:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around one wait.

        Raises:
            RuntimeError: it took too long, or a worker has died.
        """
        self._since = time.monotonic()
        try:
            yield
        except Exception as error:
            if self.over:
                raise RuntimeError(f"DataLoader timed out after {self.timeout:g} s") from error
            # A worker that dies while it hands over the memory of a batch ends as an error of the connection.
            broken = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
            if broken or (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
                for worker in self.workers if broken else []:
                    worker.join(0.2)
                raise RuntimeError(_how_it_ended(self.workers) or f"DataLoader worker is gone: {error}") from error
            raise
        finally:
            self._since = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK):
            since = self._since
            if since is not None and time.monotonic() - since > self.timeout:
                self.over = True
                for worker in self.workers or multiprocessing.active_children():
                    worker.kill()
                return


def _how_it_ended(workers: list[Any]) -> str:
    """Returns which worker has ended, and how, as torch's handler of SIGCHLD says it; "" if none has."""
    for worker in workers:
        if worker.exitcode is not None and worker.exitcode < 0:
            name = signal.strsignal(-worker.exitcode) or signal.Signals(-worker.exitcode).name
            return f"DataLoader worker (pid {worker.pid}) is killed by signal: {name}."
        if worker.exitcode:
            return f"DataLoader worker (pid {worker.pid}) exited with code {worker.exitcode}."
    return ""


@contextmanager
def _no_handler() -> Iterator[None]:
    """Undoes that torch, with the first iterator of a process, handles SIGCHLD."""
    if not hasattr(signal, "SIGCHLD"):  # Windows
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
