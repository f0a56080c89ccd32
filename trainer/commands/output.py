"""The files that a command writes: refused before the work where they cannot be written, and said to be replaced."""

import csv
import errno
import io
import os
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from trainer.storage import files


def target(name: str | None) -> Path | None:
    """The file of that name; None for no file and for `-`, which is the standard output.

    Raises:
        OSError: the one that writing the file would raise, if that can be known before the work.
    """
    if name is None or name == "-":
        return None
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that was given
    return path


def write(path: Path, data: bytes) -> str:
    """Write a whole file; returns a note if another one was there, for the message about it."""
    note = replaced(path)
    files.replace(path, data)
    return note


def replaced(path: Path) -> str:
    """What to add to the message about a file that is going to be written."""
    return ", in place of the file that was there" * path.exists()


def create(folder: Path, name: str) -> BinaryIO:
    """Open a new file in a folder, under its name, or with a number where that is taken: nothing is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, ending = os.path.splitext(name)
    for number in count(2):
        try:
            return open(folder / name, "xb")
        except FileExistsError:
            name = f"{stem}-{number}{ending}"
    raise AssertionError


def as_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    """A table of rows, each with its values by the name of the column."""
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[*names], *([*map(row.get, names)] for row in rows)])
    return text.getvalue().encode()
