"""Notice that another process of the run failed, was killed or was stopped, wherever this one waits meanwhile.

Each process has a thread that writes a sign of life every second into the key-value store that the launcher keeps for
all of them, and reads those of the others. A process that fails writes the reason there. Those that wait for it in a
collective so learn which process they wait for, and all end together, even where the collective itself never would.
"""

import atexit
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from accelerate import Accelerator
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # they are public

from trainer import errors
from trainer.errors import Elsewhere, Preempted
from trainer.processes.identity import Identity

_BEAT = 1.0  # seconds
_GRACE = 8.0  # seconds that a process has to end by itself once another one has failed
# What a collective says when another process is gone: second hand, so the reason is looked for elsewhere.
_SECOND_HAND = re.compile(r"gloo|nccl|connection|timed out|peer|socket|store", re.IGNORECASE)


class Watch:
    """Watches over the processes of a run from here on (a collective); does nothing where there is only one.

    Args:
        accelerator: of the run.
        timeout: seconds without a sign of life after which a process counts as lost.
    """

    current: "Watch | None" = None  # as with signals, there is one in a process

    def __init__(self, accelerator: Accelerator, *, timeout: float):
        self.rank, self.ranks, self.timeout = accelerator.process_index, accelerator.num_processes, timeout
        self.when_lost: Callable[[Elsewhere], None] = lambda failure: None  # called before this process is ended
        self._over = threading.Event()
        self._failure: Elsewhere | None = None  # what ends the run, as far as known
        if self.ranks == 1:
            return
        Watch.current = self
        # A connection of its own: the default store's is taken as long as the main thread waits for something.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False)
        self._store = PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        self._word = ""  # "end" in the last sign
        self._count, self._quiet, self._seen = 0, [0.0] * self.ranks, [b""] * self.ranks
        self._identity = Identity.of()
        self._sign()
        accelerator.wait_for_everyone()
        # All run now. Those that are found here can be looked for later; the others are of other machines or
        # containers, whatever their names and numbers.
        lives = self._store.multi_get([str(rank) for rank in range(self.ranks)])
        identities = {rank: Identity(**json.loads(life)["process"]) for rank, life in enumerate(lives)}
        self._here = {rank: process for rank, process in identities.items() if process.is_running()}
        accelerator.wait_for_everyone()  # none ends before all have looked
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.close)  # else the end of this process would look like a loss to the others

    def _sign(self) -> None:
        self._count += 1
        life = {"process": self._identity.to_dict(), "count": self._count, "word": self._word}
        self._store.set(str(self.rank), json.dumps(life))

    def _watch(self) -> None:
        with suppress(RuntimeError):  # the store is gone: so is the launcher, whose end the processes notice otherwise
            looked = time.monotonic()
            while not self._over.wait(_BEAT):
                self._sign()
                # Not more than twice the interval: a job that was suspended as a whole has lost nobody.
                passed, looked = min(time.monotonic() - looked, 2 * _BEAT), time.monotonic()
                if failure := self._look(passed):
                    if not self._over.wait(_GRACE):
                        self.when_lost(failure)
                        self._end(failure)
                    return

    def _look(self, passed: float) -> Elsewhere | None:
        """Returns the failure of a process, or that it is lost, after another `passed` seconds; None if all is well."""
        for rank, life in enumerate(self._store.multi_get([str(rank) for rank in range(self.ranks)])):
            self._quiet[rank] = 0.0 if life != self._seen[rank] else self._quiet[rank] + passed
            self._seen[rank] = life
            if rank != self.rank and not json.loads(life)["word"]:
                if not self._exists(rank):
                    self._post(rank, "Lost", 1, "it was killed, or ended without a word")
                elif self._quiet[rank] > self.timeout:
                    self._post(rank, "Lost", 1, f"no sign of life for {self.timeout:g} s: stopped, or out of reach")
        return self._posted()

    def _exists(self, rank: int) -> bool:
        """Whether a process runs; those of other machines and containers are believed to."""
        return rank not in self._here or self._here[rank].is_running()

    def _post(self, rank: int, kind: str, exit_code: int, reason: str) -> None:
        """Says why the run ends; the first reason stays."""
        self._store.compare_set("failure", "", json.dumps([rank, kind, exit_code, reason]))

    def _posted(self) -> Elsewhere | None:
        with suppress(RuntimeError):  # the store is gone, with the process or launcher that keeps it
            if self._failure is None and self._store.check(["failure"]):
                self._failure = Elsewhere(*json.loads(self._store.get("failure")))
        return self._failure

    def _end(self, failure: Elsewhere) -> None:
        if self.rank == 0 or failure.orphans:
            print(f"error: {failure}", file=sys.stderr, flush=True)
        self._kill_lost(failure)
        os._exit(failure.exit_code)

    def _kill_lost(self, failure: Elsewhere) -> None:
        """Ends a process that is stopped, if it is on this machine: the launcher would wait half a minute for it."""
        if failure.kind == "Lost" and failure.rank in self._here:
            self._here[failure.rank].kill()

    def tell(self, stop: Preempted) -> None:
        """Tells the other processes that this one was told to stop: they end as preempted, not as failed."""
        with suppress(RuntimeError):  # the store is gone
            self._post(self.rank, Preempted.__name__, Preempted.exit_code, str(stop))
            time.sleep(2 * _BEAT)  # until they have read it: the store may end with this process

    def explain(self, error: Exception) -> Exception:
        """Returns the error that the run ends with: this one, or that of another process from which it follows."""
        if isinstance(error, Elsewhere):
            return error
        if isinstance(error, RuntimeError) and _SECOND_HAND.search(str(error)):
            failure = None
            for _ in range(50):  # the other one may be about to say why, or not yet be missed
                if failure := self._posted():
                    break
                silent = [rank for rank in range(self.ranks) if self._quiet[rank] > 3 * _BEAT and rank != self.rank]
                if silent:
                    self._post(silent[0], "Lost", 1, "no sign of life: it was killed or stopped, or is out of reach")
                time.sleep(0.1)
            if failure and failure.rank != self.rank:
                self._kill_lost(failure)
                return failure
        self._post(self.rank, type(error).__name__, errors.exit_code(error), str(error))
        return error

    def close(self) -> None:
        """Ends the watch: this process is about to end, or goes on without the others, and has nothing more to say."""
        if self._over.is_set():
            return
        self._word = "end"  # also for a sign that the thread is about to write
        self._over.set()
        if Watch.current is self:
            Watch.current = None
            atexit.unregister(self.close)
        if self.ranks > 1:
            with suppress(RuntimeError):
                self._sign()


def tell(stop: Preempted) -> None:
    """`Watch.tell`, if there are other processes."""
    if Watch.current is not None:
        Watch.current.tell(stop)


def explained(error: Exception) -> Exception:
    """Returns the error that the run ends with, on this process: see `Watch.explain` and `errors.explained`."""
    error = errors.explained(error)
    if Watch.current is not None:
        with suppress(RuntimeError):  # the store is gone
            return Watch.current.explain(error)
    return error


def details(error: Exception, rank: int) -> dict[str, str | int]:
    """Returns rank, type, message and traceback of the error that a run ends with, for a file."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, Elsewhere):
        return {"rank": error.rank, "type": error.kind, "message": error.reason, "traceback": trace}
    return {"rank": rank, "type": type(error).__name__, "message": str(error), "traceback": trace}
