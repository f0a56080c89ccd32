"""Keep features in files, under a key of everything that they depend on.

FOLDER/KEY/
    0.bin, 1.bin, ...   the values of each tensor, as in memory
    entry.json          shapes, types and the sha256 of each file; written last
FOLDER/.tmp-KEY-WRITER/ an entry that is being written; removed by the next run if its process was killed
"""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.storage import files

log = logging.getLogger(__name__)

Like = Sequence[tuple[tuple[int, ...], torch.dtype]]  # shape and type of each tensor


def key_of(**parts: Any) -> str:
    """A key of 32 hex digits that depends on every part and its name."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:32]


class Entry:
    """The features of one data set under one key.

    Args:
        folder: the folder of all entries.
        key: see `key_of`.
        like: shape and type of each tensor.
        writer: a name that the processes of one machine share, and no others.
    """

    def __init__(self, folder: Path, key: str, like: Like, *, writer: str):
        self.path, self.like = folder / key, like
        self.temporary = folder / f".tmp-{key}-{writer}"

    def is_good(self) -> bool:
        """Whether the entry exists and is undamaged; logs a warning if it is damaged."""
        try:
            entry = json.loads((self.path / "entry.json").read_text(encoding="utf-8"))
            if entry["tensors"] != self._tensors():
                raise ValueError(f"it holds {entry['tensors']}; expected {self._tensors()}")
            for number, digest in zip(range(len(self.like)), entry["sha256"], strict=True):
                if files.sha256_of(self.path / f"{number}.bin") != digest:
                    raise ValueError(f"{number}.bin does not match its sha256")
            return True
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the features in %s are not used, and computed again: %s", self.path, error)
            return False

    def reserve(self) -> None:
        """Create the files with their full size, and remove what killed runs have left.

        Raises:
            OSError: the disk is too full or cannot be written, or the path of the entry is something else. Found here,
                before features are computed, because a full disk would kill a process that writes to a mapped file.
        """
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            text = "a file or a link is in the place of a folder of features; remove it, or choose another folder"
            raise FileExistsError(errno.EEXIST, text, str(self.path))
        files.remove_temporary(self.temporary)
        files.sweep_temporary(self.temporary.parent, ".tmp-*")
        files.make_temporary(self.temporary)
        for number, (shape, dtype) in enumerate(self.like):
            path = self.temporary / f"{number}.bin"
            with open(path, "wb") as file:
                if size := dtype.itemsize * math.prod(shape):
                    try:
                        if hasattr(os, "posix_fallocate"):
                            os.posix_fallocate(file.fileno(), 0, size)
                        else:  # macOS and Windows: a full disk is noticed only while the features are written
                            file.truncate(size)
                    except OSError as error:
                        raise OSError(error.errno, error.strerror, str(path)) from error

    def open_for_writing(self) -> tuple[Tensor, ...]:
        """The reserved tensors, in memory that all processes of the machine share."""
        return self._map(self.temporary, shared=True)

    def commit(self) -> None:
        """Publish the written tensors as the entry, unless another run has published it in the meantime.

        Raises:
            OSError: the disk failed.
        """
        paths = [self.temporary / f"{number}.bin" for number in range(len(self.like))]
        for path in paths:
            files.sync(path)
        content = {"tensors": self._tensors(), "sha256": [files.sha256_of(path) for path in paths]}
        files.write_json(self.temporary / "entry.json", content)
        damaged = self.temporary.with_name(f"{self.temporary.name}-damaged")
        for _ in range(10):  # another run may publish its entry between any two of these steps
            try:
                files.publish(self.temporary, self.path)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self.is_good():
                self.clean()
                return
            with suppress(FileNotFoundError):
                self.path.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        raise FileExistsError(errno.EEXIST, "the entry cannot be replaced by a new one", str(self.path))

    def clean(self) -> None:
        """Remove reserved files that were not committed."""
        files.remove_temporary(self.temporary)

    def open(self) -> tuple[Tensor, ...]:
        """The tensors, mapped from the files and not loaded; writing to them does not change the files.

        A file that is cut while it is mapped ends the process (SIGBUS) when the missing part is read. Sizes are checked
        here, so this can happen only to a file that is cut later.

        Raises:
            OSError: a file is missing, or has another size.
        """
        return self._map(self.path, shared=False)

    def _tensors(self) -> list:
        """Shapes and types for entry.json."""
        return [[list(shape), str(dtype)] for shape, dtype in self.like]

    def _map(self, folder: Path, *, shared: bool) -> tuple[Tensor, ...]:
        """Map the files in a folder; `shared`: writing to the tensors changes the files."""
        found = []
        for number, (shape, dtype) in enumerate(self.like):
            path, expected = folder / f"{number}.bin", dtype.itemsize * math.prod(shape)
            if (size := path.stat().st_size) != expected:
                raise OSError(errno.EIO, f"it has {size:,} bytes; expected {expected:,}", str(path))
            found.append(torch.from_file(str(path), shared=shared, size=math.prod(shape), dtype=dtype).view(shape))
        return tuple(found)
