"""What is in a checkpoint file; write it, verify it, read it, find it, prune it.

A checkpoint is one file, `step-00000120.pt`: a plain `torch.save` zip of plain types, followed by a trailer that torch
ignores and `read` checks:

    zip archive │ magic, 8 bytes │ length of the archive, uint64 little-endian │ sha256 of the archive, 32 bytes

One file means one rename, and one rename means that a reader sees the old file or the new one, never half of one.
"Newest" is what has the highest step among the files that verify; there is no pointer to keep true.
"""

import hashlib
import io
import logging
import os
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import files
from trainer.archive import check
from trainer.errors import CheckpointError

FORMAT = 1
_MAGIC = b"AFTCKPT\x01"
_TRAILER = struct.Struct("<8sQ32s")
_NAME = re.compile(r"step-(\d{8,})\.pt")
_MOST_FAILURES = 3  # saves in a row

# What `read` returns and `write` takes; `Trainer.save` fills it.
#   format       this file's version, an integer
#   model        {name: tensor}: trainable parameters and the buffers that training can change, by the model's own names
#   optimizer    {"kind": "AdamW", "state": {parameter name: {"exp_avg": tensor, ...}}}
#   scaler       GradScaler's state, or None
#   epoch, step, samples, skipped_samples      progress: finished epochs, updates, samples used, those without an update
#   training_samples   in an epoch: what progress is counted in
#   totals       sums of the metrics over the samples used in the epoch under way; empty between epochs
#   metrics      {"train": {...}, "val": {...}, "best": {...}} of the last finished epoch
#   fingerprint  {name: sha256}: the frozen tensors, which the file does not hold
#   compute      {"device": type, "precision": of autocast, "micro_batch": images, "trunk_batch": images in a forward of
#                the trunk in evaluations}: what decides the last digits
#   data         {"training": digest, "validation": digest, "skipped": [keys of training images left out, validation]}
#   freeze_plan, classes, base, config         how to build the model again, and the run
KEYS = {
    *("format", "model", "optimizer", "scaler", "epoch", "step", "samples", "skipped_samples", "training_samples"),
    *("totals", "metrics", "fingerprint", "freeze_plan", "classes", "data", "base", "config", "compute"),
}
_TYPES = {
    **dict.fromkeys(("epoch", "step", "samples", "skipped_samples", "training_samples"), int),
    **dict.fromkeys(("model", "optimizer", "totals", "metrics", "fingerprint", "freeze_plan"), dict),
    **dict.fromkeys(("data", "base", "config", "compute"), dict),
    "scaler": dict | None,
    "classes": list,
}
State = dict[str, Any]

log = logging.getLogger(__name__)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lives."""
    return folder / f"step-{step:08d}.pt"


def write(path: Path, state: State) -> None:
    """Write a checkpoint so that `path` holds the old content or the new, whatever happens meanwhile.

    Raises:
        OSError: as `files.replace`.
    """
    assert state.keys() == KEYS - {"format"}, sorted(KEYS ^ state.keys())
    buffer = io.BytesIO()  # torch.save to a path hides the errno of a full disk
    torch.save({"format": FORMAT, **state}, buffer)
    archive = buffer.getvalue()
    files.replace(path, archive + _trailer(archive))


def _trailer(archive: bytes) -> bytes:
    return _TRAILER.pack(_MAGIC, len(archive), hashlib.sha256(archive).digest())


def save(folder: Path, state: State, *, best: State | None = None, keep: int = 2) -> Path:
    """Write the checkpoint of `state` into a folder, and delete the oldest that are too many; gives its path.

    Args:
        folder: created if missing.
        best: what to write to `best.pt`, too; usually `state`.
        keep: how many of the newest stay, at least 2: while one is written, the other must exist.

    Raises:
        OSError: as `files.replace`; no older checkpoint has been deleted.
    """
    files.ops.make_folder(folder)
    if best:  # first: a run killed between the two trains to this point again, and finds the same best
        write(folder / "best.pt", best)
    path = path_of(folder, state["step"])
    write(path, state)
    prune(folder, keep=keep)
    return path


class Saver:
    """Saves the checkpoints of a run, and forgives a disk that fails now and then.

    A save that fails is reported, and the run goes on to the next one; the third in a row is an error. A best
    checkpoint that could not be written is kept in memory, and written with the next save that can be.
    """

    def __init__(self) -> None:
        self.failures = 0  # in a row
        self._best: State | None = None

    def save(self, folder: Path, state: State, *, best: bool, keep: int, final: bool) -> Path | None:
        """As `save`; None if it failed. With `final`, and at the third failure in a row, it raises instead."""
        self._best = state if best else self._best
        try:
            path = save(folder, state, best=self._best, keep=keep)
        except OSError as error:
            self.failures += 1
            if final or self.failures == _MOST_FAILURES:
                saves = f"{self.failures} saves in a row" if self.failures > 1 else "a save"
                raise OSError(error.errno, f"{saves} failed: {error.strerror}", str(folder)) from error
            log.warning(
                "cannot save step %d, failure %d of %d: %s. Training goes on; the older checkpoints are untouched.",
                *(state["step"], self.failures, _MOST_FAILURES, error),
            )
            return None
        self.failures, self._best = 0, None
        return path


def verify(path: Path) -> bytes:
    """The archive of a checkpoint file, once its length and sha256 have been found right.

    Raises:
        CheckpointError: truncated, altered, or not a checkpoint of this template.
        OSError: cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _TRAILER.size:
            raise CheckpointError(f"{path} is not a checkpoint: {size} bytes.")
        file.seek(size - _TRAILER.size)
        magic, length, digest = _TRAILER.unpack(file.read())
        if magic != _MAGIC or length != size - _TRAILER.size:  # before its bytes, which may be too many, are read
            raise CheckpointError(f"{path} is truncated, or not a checkpoint of this template: it has no trailer.")
        file.seek(0)
        archive = file.read(length)
    if hashlib.sha256(archive).digest() != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its sha256.")
    return archive


def read(path: Path) -> State:
    """Read and verify a checkpoint; its tensors are on the CPU.

    Raises:
        CheckpointError: missing, damaged, of a newer format, without an entry it must have, or under another's name.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}.")
    archive = verify(path)
    try:
        check(archive)
        # weights_only: tensors and plain types alone, no code; stated, because an environment variable can lift the
        # default.
        state = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # hostile files raise nearly anything
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, int):
        raise CheckpointError(f"{path} is not a checkpoint of this template: it has no format version.")
    if found > FORMAT:
        raise NewerFormat(f"{path} has format {found}; this version of the template reads up to {FORMAT}.")
    if missing := KEYS - state.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}.")
    for name, expected in _TYPES.items():
        if name in KEYS and not isinstance(state[name], expected):
            raise CheckpointError(f"{path} has {type(state[name]).__name__} as {name}.")
    if (match := _NAME.fullmatch(path.name)) and int(match[1]) != state["step"]:
        raise CheckpointError(f"{path} holds step {state['step']}: somebody has renamed it.")
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether a file ends as checkpoints do; `verify` says whether it is whole."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TRAILER.size))
        return file.read().startswith(_MAGIC)


class NewerFormat(CheckpointError):
    """Written by a newer version of the template: not damaged, so nothing older may take its place."""


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step that can be read, or else `best.pt`; what is passed over is reported.

    Raises:
        CheckpointError: there are checkpoints, and none can be used: starting afresh would hide the loss; or the newest
            is of a newer format.
    """
    for path in sorted(folder.glob("step-*.pt")):
        if path not in steps(folder):
            log.warning("%s is ignored: expected a file named as step-00000120.pt is, and no link.", path)
    problems = []
    for path in [*reversed(steps(folder)), *folder.glob("best.pt")]:
        try:
            read(path)
        except NewerFormat:
            raise
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("%s Using %s instead.", problem, path.name)
        return path
    if problems:
        raise CheckpointError("no checkpoint in {} can be used:\n  {}".format(folder, "\n  ".join(problems)))
    return None


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder in the order of their steps; other files are none of our business."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    found = [path for path in found if path.is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def later_than(folder: Path, step: int) -> list[Path]:
    """The checkpoints of a folder after more than `step` updates."""
    return [path for path in steps(folder) if int(_NAME.fullmatch(path.name)[1]) > step]


def prune(folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (at least 2, never `best.pt`), and what killed writers left."""
    for path in steps(folder)[: -max(keep, 2)]:
        files.ops.remove(path)
    files.sweep(folder)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state by parameter name; torch's own is by position, where swapped parameters load silently."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}
    return {"kind": type(optimizer).__name__, "state": {name: state[name] for name in sorted(state)}}


def positional_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The inverse of `optimizer_state`: what this optimizer's `load_state_dict` takes, with its own hyperparameters.

    Raises:
        CheckpointError: another kind of optimizer, other parameters, or another shape; names them.
    """
    kind = type(optimizer).__name__
    if saved["kind"] != kind:
        raise CheckpointError(f"the checkpoint was trained with {saved['kind']}; this run uses {kind}.")
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {names[parameter]: parameter.shape for group in optimizer.param_groups for parameter in group["params"]}
    if saved["state"] and saved["state"].keys() != shapes.keys():
        difference = _difference(saved["state"].keys(), shapes.keys())
        raise CheckpointError(f"the optimizer state is for other parameters: {difference}.")
    for name, values in saved["state"].items():
        if not isinstance(values, dict) or values.keys() != next(iter(saved["state"].values())).keys():
            raise CheckpointError(f"the optimizer state of {name} is not like that of the other parameters.")
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[name]:
                found = f"{tuple(value.shape)}; expected {tuple(shapes[name])}"
                raise CheckpointError(f"optimizer state {key} of {name} has shape {found}.")
    # torch numbers the parameters in the order of the groups, as `shapes` does.
    state = {position: saved["state"][name] for position, name in enumerate(shapes) if saved["state"]}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def check_tensors(saved: dict[str, Tensor], live: dict[str, Tensor]) -> None:
    """Hold a checkpoint's tensors to the exact contract: the model's names, shapes and dtypes, no more and no less.

    Raises:
        CheckpointError: names each key that is missing, unexpected or different.
    """
    problems = []
    if saved.keys() != live.keys():
        problems.append(_difference(saved.keys(), live.keys()))
    for name in saved.keys() & live.keys():
        found, expected = saved[name], live[name]
        if not isinstance(found, Tensor):
            problems.append(f"{name} is {type(found).__name__}; expected a tensor")
        elif (found.shape, found.dtype) != (expected.shape, expected.dtype):
            here = f"{expected.dtype} {tuple(expected.shape)}"
            problems.append(f"{name} is {found.dtype} {tuple(found.shape)}; expected {here}")
    if problems:
        raise CheckpointError("the checkpoint does not fit this model: " + "; ".join(sorted(problems)) + ".")


def _difference(found: Any, expected: Any) -> str:
    """Two sets of names, as their difference."""
    parts = [
        f"missing {', '.join(sorted(expected - found))}" if expected - found else "",
        f"unexpected {', '.join(sorted(found - expected))}" if found - expected else "",
    ]
    return "; ".join(filter(None, parts))
