"""Features in files: written once, by index, and found again by a key of everything they depend on.

FOLDER/KEY/
    0.bin, 1.bin, ...   the rows of each tensor, as they are in memory
    entry.json          shapes, types, sha256 of each file: written last
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Like = Sequence[tuple[tuple[int, ...], torch.dtype]]  # shape and type of each tensor


def key_of(**parts: Any) -> str:
    """32 hex digits that depend on every part and its name."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:32]


class Entry:
    """The features of one data set under one key.

    Args:
        folder: holds the entries.
        key: of this one, see `key_of`.
        like: shape and type of each tensor.
        writer: a name that the processes of one machine have in common, and no others.
    """

    def __init__(self, folder: Path, key: str, like: Like, *, writer: str):
        self.path, self.like = folder / key, like
        self.temporary = folder / f".tmp-{key}-{writer}"

    def is_good(self) -> bool:
        """Whether it is there, as it was written. Damage is reported."""
        try:
            entry = json.loads((self.path / "entry.json").read_text(encoding="utf-8"))
            if entry["tensors"] != self._tensors():
                raise ValueError(f"it holds {entry['tensors']}; expected {self._tensors()}")
            for number, digest in enumerate(entry["sha256"]):
                if sha256_of(self.path / f"{number}.bin") != digest:
                    raise ValueError(f"{number}.bin does not match its sha256")
            return True
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the features in %s are not used, and computed again: %s", self.path, error)
            return False

    def reserve(self) -> None:
        """Make its files, with room for everything.

        Raises:
            OSError: the disk is too full, or cannot be written: now, for a mapped file would end the process.
        """
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        for number, (shape, dtype) in enumerate(self.like):
            with open(self.temporary / f"{number}.bin", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, dtype.itemsize * math.prod(shape))

    def open_for_writing(self) -> tuple[Tensor, ...]:
        """The reserved tensors: what one process writes, every process sees."""
        return self._map(self.temporary, shared=True)

    def commit(self) -> None:
        """Make what was written the entry."""
        files = [self.temporary / f"{number}.bin" for number in range(len(self.like))]
        for file in files:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        entry = {"tensors": self._tensors(), "sha256": [sha256_of(file) for file in files]}
        (self.temporary / "entry.json").write_text(json.dumps(entry), encoding="utf-8")
        shutil.rmtree(self.path, ignore_errors=True)  # damaged, or another run had the same idea
        self.temporary.rename(self.path)

    def clean(self) -> None:
        """Remove what was reserved and not committed."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def open(self) -> tuple[Tensor, ...]:
        """Its tensors, mapped from the files, not loaded. Writing to them changes no file."""
        return self._map(self.path, shared=False)

    def _tensors(self) -> list:
        return [[list(shape), str(dtype)] for shape, dtype in self.like]

    def _map(self, path: Path, *, shared: bool) -> tuple[Tensor, ...]:
        found = []
        for number, (shape, dtype) in enumerate(self.like):
            name = str(path / f"{number}.bin")
            found.append(torch.from_file(name, shared=shared, size=math.prod(shape), dtype=dtype).view(shape))
        return tuple(found)


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
