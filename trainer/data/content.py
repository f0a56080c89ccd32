"""A summary of the files of a data set in 4 kB, to notice that files were replaced, and to name them.

A digest of all files would tell that something differs, but not what. Here there are two tables of 512 groups. The name
of an image decides its group in each table, and a group is a checksum of its images. A file that was replaced changes
its group in both tables; an unchanged file seldom has two groups that changed.
"""

import base64
import hashlib
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
from torch import Tensor

from trainer.data.images import Images, blame, label_bytes
from trainer.storage.files import sha256_of

_GROUPS = 512
_SAMPLE = 1000  # about so many files are read in part; with fewer files, all of them
_BEGINNING = 64 * 1024  # bytes that are read of a file


class Content(TypedDict):
    """The summary of some images; stored in checkpoints, and compared by `differing`."""

    images: int
    """Number of images."""
    groups: str
    """The two tables, in base 85."""


def content(images: Images) -> Content:
    """Summarise images: their names, labels and file sizes, and the first 64 KiB of up to a thousand files.

    The result does not depend on the folder of the files or on their times. A million files take a million calls of
    stat. Not noticed: among thousands of files, a file outside of the sample that was replaced by one of the same size;
    and other pixels under the same name, if images have no files (`Images.path` is None).

    Raises:
        DataError: a file cannot be read; names it.
    """
    tables = np.zeros((2, _GROUPS), np.uint32)
    for index, (groups, number) in enumerate(_places(images)):
        label = images.labels[index]
        value = zlib.crc32(label_bytes(label) if isinstance(label, Tensor) else str(label).encode(), number)
        if (path := images.path(index)) is not None:
            with blame(path):
                value = zlib.crc32(str(os.stat(path).st_size).encode(), value)
                if number % _stride(len(images)) == 0:
                    with open(path, "rb") as file:
                        value = zlib.crc32(file.read(_BEGINNING), value)
        for table, group in enumerate(groups):
            tables[table, group] ^= value
    return {"images": len(images), "groups": base64.b85encode(tables.astype("<u4").tobytes()).decode()}


def differing(images: Images, here: Content, stored: Content) -> list[str]:
    """The names of the images that may have changed since their content was stored.

    Args:
        images: the images of now.
        here: their `content`.
        stored: the `content` of an earlier time or of another machine.

    Returns:
        Every image that changed or is new, and seldom another one; images that are gone cannot be named.
    """
    tables = [np.frombuffer(base64.b85decode(part["groups"]), "<u4").reshape(2, -1) for part in (here, stored)]
    changed = tables[0] != tables[1]  # [2, groups]
    return [
        images.name(index)
        for index, (groups, _) in enumerate(_places(images))
        if all(changed[table, group] for table, group in enumerate(groups))
    ]


def shared(images: Images, others: Images) -> list[int]:
    """The indices of images that `others` also has, compared by the bytes of files, or by keys if there are none."""
    places = []
    for some in (images, others):
        by_size: dict[int | str, list[int]] = defaultdict(list)  # files of different sizes need not be read
        for index in range(len(some)):
            path = some.path(index)
            by_size[some.key(index) if path is None else os.stat(path).st_size].append(index)
        places.append(by_size)
    found = []
    for size in places[0].keys() & places[1].keys():
        known = {_bytes_of(others, index) for index in places[1][size]}
        found += [index for index in places[0][size] if _bytes_of(images, index) in known]
    return sorted(found)


def _bytes_of(images: Images, index: int) -> str:
    path = images.path(index)
    return images.key(index) if path is None else sha256_of(Path(path))


def _stride(number: int) -> int:
    """One of this many images is in the sample. A power of two, so that a few more images seldom change it."""
    return 1 << max(-(-number // _SAMPLE) - 1, 0).bit_length()


def _places(images: Images) -> Iterator[tuple[tuple[int, int], int]]:
    """For each image its group in each table, and a number; both depend only on its name."""
    for index in range(len(images)):
        digest = hashlib.blake2b(images.key(index).encode(), digest_size=8).digest()
        first, second = (int.from_bytes(digest[at : at + 2], "little") % _GROUPS for at in (0, 2))
        yield (first, second), int.from_bytes(digest[4:], "little")
