"""Images that a person has excluded: the rows with a tick in the table of `python -m trainer audit`."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.data.images import Images, printable
from trainer.errors import UsageError
from trainer.storage import files
from trainer.text import listed

_LARGEST = 100 << 20  # bytes of a table: a million rows


def place(images: Images, index: int, data: str) -> str:
    """The name of an image in the table: its path below the data folder, or what messages call it.

    Args:
        data: the folder, a file in it, or the name of a data set.
    """
    path = images.path(index)
    if path is None:
        return images.name(index)
    folder = os.path.abspath(os.path.expanduser(data))
    below = os.path.relpath(os.path.abspath(path), folder if os.path.isdir(folder) else os.path.dirname(folder))
    return images.name(index) if below.startswith(os.pardir) else printable(below)


def read_table(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table by the names of its columns, as a spreadsheet may have saved it: also with semicolons.

    Raises:
        UsageError: it cannot be read, or lacks the columns path and exclude.
    """
    try:
        text = files.read_text(Path(path).expanduser(), most=_LARGEST).removeprefix("\ufeff")
        first = text.partition("\n")[0]
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        rows = [{name: value or "" for name, value in row.items() if name} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as a CSV table in UTF-8: {error}") from None
    if not {"path", "exclude"} <= {*(reader.fieldnames or ())}:
        found = listed(map(str, reader.fieldnames or ["nothing"]), 8)
        raise UsageError(f"{path} has the columns {found}; expected path and exclude, as `trainer audit` writes them.")
    return rows


def ticked(path: str | Path) -> list[str]:
    """The images that a table excludes, by their `place`. Raises UsageError as `read_table` does."""
    return sorted({row["path"] for row in read_table(path) if row["exclude"].strip() and row["path"]})


def keys(parts: Sequence[Images], places: Sequence[str], *, data: str, table: str) -> list[list[str]]:
    """The keys of the images at some places, of each part.

    Raises:
        UsageError: none of them is there, or another image has the same key.
    """
    wanted, found, missing = set(places), [], set(places)
    for images in parts:
        at = {index: name for index in range(len(images)) if (name := place(images, index, data)) in wanted}
        missing -= set(at.values())
        mine = {images.key(index) for index in at}
        others = [i for i in range(len(images)) if i not in at and images.key(i) in mine] if mine else []
        if others:
            raise UsageError(f"{table} excludes one image of the key {images.key(others[0])}, and there are several.")
        found.append(sorted(mine))
    if missing == wanted and wanted:
        raise UsageError(f"none of the images that {table} excludes is in {data}, such as {min(wanted)}.")
    return found
