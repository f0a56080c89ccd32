"""The folder of a run: which one it is, what it holds, and how a run is found again.

runs/photos-resnet50/
    config.yaml       what the run is; `train.py --config` repeats it
    freeze_plan.json  the frozen parameters, by name; `train.py --freeze-plan` takes it
    weights_report.json   what became of the tensors of the weights file
    checkpoints/      step-00000120.pt ..., best.pt
    lock              held by the process that works here: host, pid, start
    status.json       how the run stands
    error.json        what ended it, if it failed: rank, type, message, traceback
    metrics.jsonl     one line per epoch
    tensorboard/
"""

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer import files
from trainer.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from trainer.freezing import FreezePlan
    from trainer.preemption import Preemption
    from trainer.trainer import Trainer
    from trainer.weights import Report

BEGAN = time.monotonic()  # seconds; about when the program started, as this is imported before torch
_ROOT = Path("runs")

log = logging.getLogger(__name__)


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run: its settings or its checkpoints."""
    return (folder / "config.yaml").exists() or (folder / "checkpoints").exists()


def find(output: str | None, name: str) -> Path:
    """The run that `--resume auto` means: `output`, or the run of that name with the highest number."""
    return Path(output) if output is not None else (_numbered(name) or [_ROOT / name])[-1]


def _named(output: str | None, resume: str, name: str) -> Path:
    """The run or the checkpoint that `--resume` names: also a run by its folder of checkpoints."""
    path = find(output, name) if resume == "auto" else Path(resume)
    inside = resume != "auto" and path.name == "checkpoints" and path.is_dir() and not holds_run(path)
    return path.parent if inside else path


def _restarts() -> int:
    """How often the launcher has started this program again (`--max_restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def under_way(output: str | None, resume: str | None, name: str) -> Path | None:
    """The run that the launcher started before it started us again, if that got as far as having a folder."""
    if not _restarts():
        return None
    if output is None and resume not in (None, "auto"):
        path = _named(output, resume, name)
        folders = [path, path.absolute().parent.parent]  # a run, a checkpoint in one
    else:
        folders = [find(output, name)]
    for folder in folders:
        with suppress(OSError, ValueError, TypeError, KeyError):
            if json.loads((folder / "status.json").read_text())["launcher"] == os.getppid():
                return folder
    return None


def choose(output: str | None, name: str, *, overwrite: bool = False) -> "RunFolder":
    """A folder for a new run.

    Raises:
        UsageError: `output` holds a run and may not be overwritten; names the three ways on.
    """
    if output is None:
        taken = [folder for folder in _numbered(name) if holds_run(folder)]
        if not taken:
            return RunFolder(_ROOT / name)
        return RunFolder(taken[-1], stale=_content(taken[-1])) if overwrite else RunFolder(_next(taken[-1], name))
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file; expected a folder.")
    if not holds_run(folder):
        return RunFolder(folder)
    if not overwrite:
        raise UsageError(
            f"{folder} holds a run. Continue it with --resume auto, delete it with --overwrite, "
            "or give another --output."
        )
    return RunFolder(folder, stale=_content(folder))


@dataclass
class RunFolder:
    """A run's folder, before anything in it has changed.

    Attributes:
        path: the folder.
        source: the checkpoint to continue from; None starts afresh.
        stale: what `begin` deletes: an overwritten run, or checkpoints of a future that will not happen.
        damaged: what `begin` sets aside: newer checkpoints than `source` that cannot be used.
    """

    path: Path
    source: Path | None = None
    stale: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._found = self._content()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def skipped(self) -> list[list[str]] | None:
        """The images that the run to continue has left out; None for a new one."""
        from trainer import checkpoint  # imports torch

        return None if self.source is None else checkpoint.read(self.source)["data"].get("skipped", [[], []])

    def status(self, status: str, **values: Any) -> None:
        """Write `status.json`: how the run stands, for whoever started it (launchers flatten exit codes to 1).

        A disk that fails is reported, and no more: what is to be said with it matters more.

        Args:
            status: "running", "completed", "preempted" or "failed".
            values: plain values to say with it, such as step, checkpoint, reason.
        """
        text = json.dumps({"status": status, **values, "restarts": _restarts(), "launcher": os.getppid()}, indent=1)
        try:
            files.replace(self.path / "status.json", f"{text}\n".encode())
        except OSError as error:
            log.warning("cannot write status.json, which would say %s: %s", status, error)

    @contextmanager
    def outcome(
        self, loop: "Trainer", guard: "Preemption", *, name_of: Callable[[int], str], keep: int = 2
    ) -> Iterator[None]:
        """Around the training: save when it is preempted, and write in `status.json` how it ended.

        Args:
            loop: what is trained.
            guard: armed here: from now on there is something to save.
            name_of: the name of a training image by its index.
            keep: how many of the newest checkpoints stay.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        from trainer import watch  # imports torch, as the next one does
        from trainer.preemption import Preempted

        main, rank = loop.accelerator.is_main_process, loop.accelerator.process_index

        def status(word: str, **values: Any) -> None:
            self.status(word, step=loop.step, epoch=loop.epoch, **values)

        def failed(error: Exception) -> None:
            cause = watch.details(error, rank)
            speaks = main or getattr(error, "orphans", False)
            if not self.path.is_dir():  # of another machine
                return
            if cause["rank"] == rank or (speaks and not (self.path / "error.json").exists()):
                with suppress(OSError):
                    files.replace(self.path / "error.json", json.dumps(cause, indent=1).encode())
            if speaks:
                names = {str(index): name_of(index) for index in getattr(error, "samples", [])}
                reason = {"reason": f"{cause['type']}: {cause['message']}", **{k: cause[k] for k in list(cause)[:3]}}
                status("failed", **reason, **({"samples": names} if names else {}))

        guard.armed = True
        if watch.Watch.current is not None:
            watch.Watch.current.when_lost = failed
        if main:
            status("running")
        try:
            try:
                yield
                if not loop.saved:
                    loop.save(self.checkpoints, keep=keep, final=True)
            except Preempted as stop:
                path = loop.save(self.checkpoints, keep=keep, final=True)
                if main:
                    status("preempted", reason=str(stop), checkpoint=path.name)
                stop.args = (f"stopped by {stop}; saved as {path}. Go on with --resume {self.path}",)
                raise
        except Exception as error:
            error = watch.explained(error)
            failed(error)
            raise error
        if main:
            status("completed")

    def lock(self, *, create: bool = True) -> None:
        """Make this process the only one that works here, until it ends.

        Args:
            create: without it, a folder in which nobody has worked yet stays as it is, and is not locked.

        Raises:
            UsageError: another one does; names its host and pid.
        """
        try:
            other = files.lock(self.path / "lock", create=create)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            log.warning("%s: its file system has no locks: take care that no second run works here.", self.path)
            return
        if other:
            raise UsageError(f"another run works in {self.path}: {other}. Wait for its end, or give another --output.")

    def begin(
        self,
        config: dict[str, Any],
        *,
        plan: "FreezePlan | None" = None,
        report: "Report | None" = None,
        best: dict[str, float] | None = None,
    ) -> dict[str, float]:
        """Lock the folder, write what the run is, delete what is stale: when nothing can go wrong but the disk.

        Args:
            config: for `config.yaml`.
            plan: for `freeze_plan.json`.
            report: for `weights_report.json`.
            best: metrics of the best epoch so far, with its number as "epoch"; None for a new run.

        Returns:
            `best`, if `best.pt` is that epoch's checkpoint; otherwise nothing, as if there had been no best yet.

        Raises:
            UsageError: another run works here, or has since this one looked for the checkpoint to start from.
            OSError: the folder cannot be written.
        """
        files.ops.make_folder(self.checkpoints)
        self.lock()
        if self._content() != self._found:
            raise UsageError(f"another run has worked in {self.path} meanwhile; start again.")
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        files.replace(self.path / "config.yaml", text.encode())
        if plan is not None:
            plan.save(self.path / "freeze_plan.json", names=True)
        if report is not None:
            files.replace(self.path / "weights_report.json", json.dumps(report.to_dict(), indent=1).encode() + b"\n")
        else:
            (self.path / "weights_report.json").unlink(missing_ok=True)  # of an overwritten run
        files.replace(self.checkpoints / "probe", b"")
        files.ops.remove(self.checkpoints / "probe")
        for folder in (self.path, self.checkpoints):
            files.sweep(folder)
        for path in self.damaged:
            files.ops.rename(path, path.with_name(f"{path.name}.damaged"))
        for path in [*self.stale, self.path / "error.json"]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self.stale and (self.path / "export").exists():  # perhaps in use: whoever made it decides
            log.warning("%s is still that of the run as it was: export anew, or remove it.", self.path / "export")
        return {} if best is None else self._keep_best(best)

    def _keep_best(self, best: dict[str, float]) -> dict[str, float]:
        """Make `best.pt` the best checkpoint on the way to the one that the run goes on from, or remove it."""
        from trainer import checkpoint  # imports torch

        here = self.checkpoints / "best.pt"
        found = here if self.source is None else self.source.with_name("best.pt")
        try:
            if best and checkpoint.read(found)["metrics"]["val"] == {k: v for k, v in best.items() if k != "epoch"}:
                if found.absolute() != here.absolute():
                    files.replace(here, found.read_bytes())
                return best
        except CheckpointError as error:
            log.warning("%s The best checkpoint so far is not at hand; the next epoch's takes its place.", error)
        here.unlink(missing_ok=True)
        return {}

    def _content(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.glob("*.pt"))


def _numbered(name: str) -> list[Path]:
    """runs/NAME, runs/NAME-2, runs/NAME-3, ... as far as they exist, in the order of their numbers."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    found = [path for path in _ROOT.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    return sorted(found, key=_number)


def _number(folder: Path) -> int:
    tail = re.search(r"-(\d+)$", folder.name)
    return int(tail[1]) if tail else 1


def _next(folder: Path, name: str) -> Path:
    return _ROOT / f"{name}-{_number(folder) + 1}"


def _content(folder: Path) -> list[Path]:
    """What a run writes, and nothing else that somebody may keep there."""
    found = [path for kind in ("*.pt", "*.pt.damaged") for path in (folder / "checkpoints").glob(kind)]
    found += [folder / name for name in ("tensorboard", "features", "metrics.jsonl", "status.json")]
    return [path for path in found if path.exists()]


def open_run(output: str | None, resume: str | None, name: str, *, overwrite: bool = False) -> RunFolder:
    """The folder to work in, and the checkpoint to continue from, if any; nothing is changed yet.

    Args:
        output, resume, overwrite: as in `config.RunConfig`.
        name: of the run, if `output` does not say.

    Raises:
        UsageError: the folder holds another run, or newer checkpoints than the one to continue from, or is at work.
        CheckpointError: there are checkpoints and none can be used.
        OSError: the folder cannot be written.
    """
    folder = _open(output, resume, name, overwrite=overwrite)
    folder.lock(create=False)
    existing = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise OSError(errno.EACCES, f"{existing} cannot be written, so neither can the run's folder", str(folder.path))
    return folder


def _open(output: str | None, resume: str | None, name: str, *, overwrite: bool) -> RunFolder:
    from trainer import checkpoint  # imports torch, which the command line does not need

    if resume is None:
        return choose(output, name, overwrite=overwrite)
    folder = _named(output, resume, name)
    named = resume != "auto" and folder.is_file()
    if overwrite and not named and (output is None or Path(output).absolute() == folder.absolute()):
        raise UsageError(f"--resume {resume} goes on with {folder}, --overwrite deletes it: give one of them.")
    source = folder if named else checkpoint.newest(folder / "checkpoints")
    if source is None:
        if resume == "auto":
            return RunFolder(folder)
        raise UsageError(f"{folder} has no checkpoint yet; start it anew with --resume auto --output {folder}.")
    home = source.absolute().parent.parent
    if source.parent.name != "checkpoints" or not holds_run(home):
        home = None
    if home is None or (output is not None and Path(output).absolute() != home):
        return replace(choose(output, name, overwrite=overwrite), source=source)
    later = checkpoint.later_than(home / "checkpoints", checkpoint.read(source)["step"])
    if not named:
        return RunFolder(folder, source, damaged=later)  # or one of them would be the source
    # Continuing in place from an older checkpoint: what was trained after it belongs to another future.
    if later and not overwrite:
        raise UsageError(
            f"{home} has newer checkpoints than {source.name}, such as {later[-1].name}. Delete them with --overwrite, "
            "or continue in another folder with --output."
        )
    return RunFolder(home, source, stale=later)


def stored_config(resume: str, output: str | None, name: str, *, whole: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that `--resume` names; empty if `auto` finds none.

    Args:
        whole: some settings with nothing missing. What `config.yaml` lacks of them is taken from the checkpoint.

    Raises:
        UsageError: `resume` is a path and there is nothing.
        CheckpointError: the checkpoint or `config.yaml` cannot be read.
    """
    place = _named(output, resume, name)
    if resume != "auto" and not place.exists():
        raise UsageError(f"--resume {resume}: there is no such checkpoint or run.")
    path, settings = place / "config.yaml", {}
    if path.exists():
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("it holds no settings")
        except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        groups = [(settings.get(group), values) for group, values in whole.items()]
        if all(isinstance(here, dict) and here.keys() >= values.keys() for here, values in groups):
            return settings
    from trainer import checkpoint  # imports torch: only if a checkpoint has to be opened

    source = place if place.is_file() else checkpoint.newest(place / "checkpoints")
    if source is None and resume != "auto" and not path.exists():
        raise UsageError(f"--resume {resume} is neither a checkpoint nor the folder of a run: it has no config.yaml.")
    for group, values in (checkpoint.read(source)["config"] if source else {}).items():
        here = settings.setdefault(group, values)
        if isinstance(here, dict) and isinstance(values, dict):
            settings[group] = values | here
    return settings


def append_metrics(folder: Path, values: dict[str, Any]) -> None:
    """Add one line to `metrics.jsonl`."""
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def rewind_metrics(folder: Path, *, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    path = folder / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        files.replace(path, "".join(kept).encode())
