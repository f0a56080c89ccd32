"""Checkpoint files: write, verify, read, find, prune. `State` says what is in one.

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

import torch
from torch import Tensor

from trainer.errors import CheckpointError, UsageError
from trainer.storage import files
from trainer.storage.archive import check
from trainer.storage.state import FORMAT, State, difference, plain

_MAGIC = b"AFTCKPT\x01"
_TRAILER = struct.Struct("<8sQ32s")
_NAME = re.compile(r"step-(\d{8,})\.pt")
_MOST_FAILURES = 3  # saves in a row

log = logging.getLogger(__name__)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lives."""
    return folder / f"step-{step:08d}.pt"


def write(path: Path, state: State) -> None:
    """Write a checkpoint so that `path` holds the old content or the new one, whatever happens meanwhile.

    Raises:
        CheckpointError: a field holds something that could not be read again; names it.
        OSError: as `files.replace`.
    """
    content = plain(state.to_dict() | {"format": FORMAT})
    try:
        State.from_dict(content)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be written: {error}.") from error
    buffer = io.BytesIO()  # torch.save to a path hides the errno of a full disk
    torch.save({"format": FORMAT, **content}, buffer)
    archive = buffer.getvalue()
    files.replace(path, archive + _trailer(archive))


def _trailer(archive: bytes) -> bytes:
    return _TRAILER.pack(_MAGIC, len(archive), hashlib.sha256(archive).digest())


def save(folder: Path, state: State, *, best: State | None = None, keep: int = 2) -> Path:
    """Write the checkpoint of `state` into a folder, then delete the oldest that are too many.

    Args:
        folder: created if missing.
        best: also written, to `best.pt`; usually `state`.
        keep: number of the newest checkpoints that stay, at least 2: while one is written, another must exist.

    Returns:
        The file of `state`.

    Raises:
        CheckpointError, OSError: as `write`; no older checkpoint has been deleted.
    """
    files.ops.make_folder(folder)
    if best:  # first: a run killed between the two trains to this point again, and finds the same best
        write(folder / "best.pt", best)
    path = path_of(folder, state.step)
    write(path, state)
    prune(folder, keep=keep)
    return path


class Saver:
    """Saves the checkpoints of a run, and tolerates a disk that fails now and then.

    A failed save is reported, and the run goes on; the third in a row is an error. A best checkpoint that could not be
    written is kept in memory, and written with the next save that succeeds.
    """

    def __init__(self) -> None:
        self.failures = 0  # in a row
        self._best: State | None = None

    def save(self, folder: Path, state: State, *, best: bool, keep: int, final: bool) -> Path | None:
        """As `save`; returns None if it failed. With `final`, and at the third failure in a row, it raises instead.

        Raises:
            UsageError: the run that this process locked was deleted, and its folder is another's now.
        """
        self._best = state if best else self._best
        try:
            if not files.keep_lock(folder.parent / "lock"):
                raise UsageError(
                    f"{folder.parent} was deleted, and made again by another run: this run ends at step {state.step}, "
                    "without a checkpoint of it. Start it again with another --output."
                )
            path = save(folder, state, best=self._best, keep=keep)
        except OSError as error:
            self.failures += 1
            if final or self.failures == _MOST_FAILURES:
                saves = f"{self.failures} saves in a row" if self.failures > 1 else "a save"
                raise OSError(
                    error.errno, f"{saves} failed: {error.strerror}", error.filename or str(folder)
                ) from error
            log.warning(
                "cannot save step %d, failure %d of %d: %s. Training goes on; the older checkpoints are untouched.",
                *(state.step, self.failures, _MOST_FAILURES, error),
            )
            return None
        self.failures, self._best = 0, None
        return path


def verify(path: Path) -> bytes:
    """Check the length and the sha256 of a checkpoint file, and return its archive.

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
        CheckpointError: missing, damaged, of a newer format, without a required entry, or renamed to another step.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}.")
    archive = verify(path)
    try:
        check(io.BytesIO(archive))
        # weights_only: tensors and plain types alone, no code; stated, because an environment variable can lift the
        # default.
        content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # hostile files raise nearly anything
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, int):
        raise CheckpointError(f"{path} is not a checkpoint of this template: it has no format version.")
    if found > FORMAT:
        raise NewerFormat(f"{path} has format {found}; this version of the template reads up to {FORMAT}.")
    try:
        state = State.from_dict(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}.") from error
    if (match := _NAME.fullmatch(path.name)) and int(match[1]) != state.step:
        raise CheckpointError(f"{path} holds step {state.step}: somebody has renamed it.")
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether a file ends as checkpoints do; `verify` says whether it is whole."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TRAILER.size))
        return file.read().startswith(_MAGIC)


class NewerFormat(CheckpointError):
    """Written by a newer version of the template: not damaged, so nothing older may take its place."""


def newest(folder: Path) -> tuple[Path, State] | tuple[None, None]:
    """Find the checkpoint with the highest step that can be read, or else `best.pt`; damaged ones are reported.

    Returns:
        The file and its content; None if the folder has no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none can be used (starting afresh would hide the loss), or the
            newest has a newer format.
    """
    for path in sorted(folder.glob("step-*.pt")):
        if path not in steps(folder):
            log.warning("%s is ignored: expected a file named as step-00000120.pt is, and no link.", path)
    problems = []
    for path in [*reversed(steps(folder)), *folder.glob("best.pt")]:
        try:
            state = read(path)
        except NewerFormat:
            raise
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("%s Using %s instead.", problem, path.name)
        return path, state
    if problems:
        raise CheckpointError("no checkpoint in {} can be used:\n  {}".format(folder, "\n  ".join(problems)))
    return None, None


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder in the order of their steps; other files and links are ignored."""
    found = [path for path in folder.glob("step-*.pt") if path.is_file() and not path.is_symlink()]
    return sorted((path for path in found if _step(path) >= 0), key=_step)


def later_than(folder: Path, step: int) -> list[Path]:
    """The checkpoints of a folder after more than `step` updates."""
    return [path for path in steps(folder) if _step(path) > step]


def _step(path: Path) -> int:
    """The step in the name of a checkpoint; -1 if it is none of ours."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def prune(folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (at least 2, never `best.pt`), and files left by killed writers."""
    for path in steps(folder)[: -max(keep, 2)]:
        files.ops.remove(path)
    files.sweep(folder)


def check_tensors(saved: dict[str, Tensor], live: dict[str, Tensor]) -> None:
    """Check that a checkpoint has exactly the names, shapes and dtypes of a model's trained tensors.

    Raises:
        CheckpointError: names each tensor that is missing, unexpected or different.
    """
    problems = []
    if saved.keys() != live.keys():
        problems.append(difference(saved.keys(), live.keys()))
    for name in saved.keys() & live.keys():
        found, expected = saved[name], live[name]
        if not isinstance(found, Tensor):
            problems.append(f"{name} is {type(found).__name__}; expected a tensor")
        elif (found.shape, found.dtype) != (expected.shape, expected.dtype):
            here = f"{expected.dtype} {tuple(expected.shape)}"
            problems.append(f"{name} is {found.dtype} {tuple(found.shape)}; expected {here}")
    if problems:
        raise CheckpointError("the checkpoint does not fit this model: " + "; ".join(sorted(problems)) + ".")
