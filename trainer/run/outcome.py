"""How a run ends: completed, preempted or failed, in `status.json`, with a last checkpoint."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from trainer.config import Config, to_dict
from trainer.errors import Preempted
from trainer.processes import watch
from trainer.processes.identity import Identity
from trainer.processes.preemption import Preemption
from trainer.processes.together import on_main
from trainer.run.folder import Run
from trainer.run.resume import restarts
from trainer.storage import files

log = logging.getLogger(__name__)


class _Saveable(Protocol):
    """The parts of a `trainer.Trainer` that are used here."""

    accelerator: Accelerator
    metrics: dict[str, dict[str, float]]
    step: int
    epoch: int
    saved: bool
    within_step: bool

    def save(self, folder: Path, *, best: bool = False, keep: int = 2, final: bool = False) -> Path | None: ...


@contextmanager
def training(
    run: Run,
    loop: _Saveable,
    stop: Preemption,
    *,
    config: Config,
    reports: dict[str, Any],
    name_of: Callable[[int], str],
) -> Iterator[None]:
    """Around the training: from here on the folder is this run's, and however it ends, it is saved and said.

    Args:
        run: locked and written from here on; see `Run.begin`.
        loop: the trainer.
        stop: armed here: from now on there is something to save.
        config: for `config.yaml`.
        reports: content of JSON files in the folder, by name.
        name_of: name of a training image by its index, for the images of a step that failed.

    Raises:
        OSError: the last checkpoint could not be written.
        Preempted: the run was told to stop, and has been saved.
    """
    main, rank, keep = loop.accelerator.is_main_process, loop.accelerator.process_index, config.run.keep

    def status(word: str, **values: Any) -> None:
        write_status(run.path, word, step=loop.step, epoch=loop.epoch, **values)

    def failed(error: Exception) -> None:
        cause = watch.details(error, rank)
        speaks = main or getattr(error, "orphans", False)
        if not run.path.is_dir() or files.lost_lock(run.path / "lock"):  # of another machine, or another run's now
            return
        if cause["type"] == "Preempted":  # another process, before it was ready to save: the last checkpoint stands
            status("preempted", reason=str(error))
            return
        if cause["rank"] == rank or (speaks and not (run.path / "error.json").exists()):
            with suppress(OSError):
                files.replace(run.path / "error.json", json.dumps(cause, indent=1).encode())
        if speaks:
            names = {str(index): name_of(index) for index in getattr(error, "samples", [])}
            reason = {"reason": f"{cause['type']}: {cause['message']}", **{k: cause[k] for k in list(cause)[:3]}}
            status("failed", **reason, **({"samples": names} if names else {}))

    best = loop.metrics.get("best", {})
    best = on_main(loop.accelerator, lambda: run.begin(to_dict(config), reports=reports, best=best))
    loop.metrics |= {"best": best}
    run.state = None  # it is in the trainer now
    stop.armed = True
    if watch.Watch.current is not None:
        watch.Watch.current.when_lost = failed
    if main:
        status("running")
    try:
        try:
            yield
            if not loop.saved:
                loop.save(run.checkpoints, keep=keep, final=True)
        except Preempted as signal:
            alone = loop.accelerator.num_processes == 1
            if signal.late and (loop.within_step or not alone):  # between two steps of one process it can be saved
                reason = f"stopped by {signal} while it waited for images: the last checkpoint stands"
                signal.args = (f"{reason}. Continue with --resume {run.path}",)
                if main:
                    status("preempted", reason=reason)
                watch.tell(signal)
                raise
            path = loop.save(run.checkpoints, keep=keep, final=True)
            if main and path is not None:
                status("preempted", reason=str(signal), checkpoint=path.name)
            signal.args = (f"stopped by {signal}; saved as {path}. Continue with --resume {path}",)
            raise
    except Exception as error:
        error = watch.explained(error)
        failed(error)
        raise error
    finally:  # for a program that goes on afterwards, such as a notebook
        stop.close()
    if main:
        status("completed")


def write_status(folder: Path, status: str, **values: Any) -> None:
    """Write `status.json`: the state of the run, for whoever started it (launchers turn all exit codes into 1).

    A disk that fails is reported, and no more: it must not hide why the run ends. On a full disk the old file is
    overwritten in place, which needs no new space.

    Args:
        folder: of the run.
        status: "running", "completed", "preempted" or "failed".
        values: plain values to add, such as step, checkpoint, reason.
    """
    path = folder / "status.json"
    launcher = Identity.of(os.getppid()).to_dict()
    text = json.dumps({"status": status, **values, "restarts": restarts(), "launcher": launcher}, indent=1) + "\n"
    try:
        files.replace(path, text.encode())
    except OSError as error:
        try:
            with open(path, "r+b") as file:
                file.write(text.encode())
                file.truncate()
        except OSError:
            log.warning("cannot write status.json, which would say %s: %s", status, error)
