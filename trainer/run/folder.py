"""The folder of a run: what it holds, and how a run takes possession of it.

runs/photos-resnet50/
    config.yaml           the settings, to read and to repeat the run: `train.py --config` takes it
    freeze_plan.json      the frozen parameters by name; `train.py --train @FILE` takes it
    weights_report.json   which tensors of the weights file were loaded
    checkpoints/          step-00000120.pt ..., best.pt
    lock                  held by the process that works here: host, pid, start
    status.json           the state of the run
    error.json            why it failed, if it did: rank, type, message, traceback
    metrics.jsonl         one line per epoch
    tensorboard/          curves and pictures; other trackers: trackers.json has the ids of their runs
"""

import errno
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import CheckpointError, UsageError
from trainer.storage import checkpoint, files

ROOT = Path("runs")

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A run's folder and the checkpoint to continue from; nothing in the folder has been changed yet.

    Attributes:
        path: the folder.
        source: the checkpoint to continue from; None: start anew.
        state: its content.
        stale: files that `begin` deletes: of an overwritten run, or checkpoints newer than `source`.
        damaged: newer checkpoints that cannot be used, which `begin` renames.
    """

    path: Path
    source: Path | None = None
    state: checkpoint.State | None = None
    stale: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._found = self._checkpoints()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def data(self) -> dict[str, Any] | None:
        """The images of the continued run, see `data.open.Data.about`; None for a new run."""
        return None if self.state is None else self.state.data

    @property
    def epochs(self) -> int:
        """The epochs that the continued run has finished; 0 for a new run."""
        return 0 if self.state is None else self.state.epoch

    def lock(self, *, create: bool = True) -> None:
        """Make this process the only one that works here, until it ends.

        Args:
            create: False: a folder in which no run has worked yet stays as it is, and is not locked.

        Raises:
            UsageError: another process works here; names its host and pid.
        """
        try:
            other = files.lock(self.path / "lock", create=create)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            log.warning("%s: its file system has no locks; make sure that no second run works here.", self.path)
            return
        if other:
            raise UsageError(f"another run works in {self.path}: {other}. Wait for its end, or give another --output.")

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.yaml`, from settings as `config.to_dict` returns them."""
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        files.replace(self.path / "config.yaml", text.encode())

    def begin(self, config: dict[str, Any], *, reports: dict[str, Any], best: dict[str, float]) -> dict[str, float]:
        """Take possession: lock the folder, write what the run is, delete what is stale. Only the disk can fail now.

        Args:
            config: for `config.yaml`.
            reports: content of JSON files by name; None: the file must not exist.
            best: metrics of the best epoch so far, with its number as "epoch"; empty for a new run.

        Returns:
            `best`, if `best.pt` is that epoch's checkpoint; otherwise nothing, as if there had been no best yet.

        Raises:
            UsageError: another run works here, or has since this one chose its checkpoint.
            OSError: the folder cannot be written.
        """
        files.ops.make_folder(self.checkpoints)
        self.lock()
        if self._checkpoints() != self._found:
            raise UsageError(f"another run has worked in {self.path} meanwhile; start again.")
        self.write_config(config)
        for name, content in reports.items():
            if content is None:  # of an overwritten run
                (self.path / name).unlink(missing_ok=True)
            else:
                files.replace(self.path / name, json.dumps(content, indent=1).encode() + b"\n")
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
        if self.stale and (self.path / "export").exists():  # perhaps in use: its owner decides
            log.warning("%s belongs to the overwritten run: export again, or remove it.", self.path / "export")
        return self._keep_best(best)

    def _keep_best(self, best: dict[str, float]) -> dict[str, float]:
        """Make `best.pt` the best checkpoint up to the one that the run continues from, or remove it."""
        here = self.checkpoints / "best.pt"
        found = here if self.source is None else self.source.with_name("best.pt")
        try:
            if best and checkpoint.read(found)["metrics"]["val"] == {k: v for k, v in best.items() if k != "epoch"}:
                if found.absolute() != here.absolute():
                    files.replace(here, found.read_bytes())
                return best
        except CheckpointError as error:
            log.warning("%s The best checkpoint so far is not available; the next epoch's takes its place.", error)
        here.unlink(missing_ok=True)
        return {}

    def _checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.glob("*.pt"))


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run: its settings or its checkpoints."""
    return (folder / "config.yaml").exists() or (folder / "checkpoints").exists()


def choose(output: str | None, name: str, *, overwrite: bool = False) -> Run:
    """A folder for a new run: `output`, or runs/NAME with the next free number.

    Raises:
        UsageError: `output` holds a run and may not be overwritten; names the three ways on.
    """
    if output is None:
        taken = [folder for folder in numbered(name) if holds_run(folder)]
        if not taken:
            return Run(ROOT / name)
        return Run(taken[-1], stale=_content(taken[-1])) if overwrite else Run(_next(taken[-1], name))
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file; expected a folder.")
    if not holds_run(folder):
        return Run(folder)
    if not overwrite:
        raise UsageError(
            f"{folder} holds a run. Continue it with --resume auto, delete it with --overwrite, "
            "or give another --output."
        )
    return Run(folder, stale=_content(folder))


def numbered(name: str) -> list[Path]:
    """runs/NAME, runs/NAME-2, runs/NAME-3, ... as far as they exist, in the order of their numbers."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    found = [path for path in ROOT.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    return sorted(found, key=_number)


def check_writable(folder: Path) -> None:
    """Raise OSError if a folder, which may not exist yet, cannot be written."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise OSError(errno.EACCES, f"{existing} cannot be written, so neither can the run's folder", str(folder))


def _number(folder: Path) -> int:
    tail = re.search(r"-(\d+)$", folder.name)
    return int(tail[1]) if tail else 1


def _next(folder: Path, name: str) -> Path:
    return ROOT / f"{name}-{_number(folder) + 1}"


def _content(folder: Path) -> list[Path]:
    """The files of a run, and nothing else that somebody may keep there."""
    found = [path for kind in ("*.pt", "*.pt.damaged") for path in (folder / "checkpoints").glob(kind)]
    found += [folder / name for name in ("tensorboard", "features", "metrics.jsonl", "status.json")]
    return [path for path in found if path.exists()]
