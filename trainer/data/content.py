"""What the files of a data set hold, in a few kilobytes: to notice files that were replaced, and to name them.

A digest of a million names says that something differs, but not what. Here every image is counted in one of 512 groups
of a first table and in one of 512 of a second, both told by its name; a group is a checksum of its images. Files that
differ are in groups that differ in both tables.
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
_SAMPLE = 1000  # files, about, of which the beginning is read; of fewer than that, all
_BEGINNING = 64 * 1024  # bytes


class Content(TypedDict):
    """What images are, in a few bytes; to be stored, and compared by `differing`."""

    images: int
    """Their number."""
    groups: str
    """The two tables, in base 85."""


def content(images: Images) -> Content:
    """What the images are: names, labels, the sizes of their files, and of up to a thousand the first 64 KiB.

    The same wherever the files lie and whenever they were written. A million files cost a million calls of stat. What
    it cannot see: among thousands of files, one of the same size as before that is not in the sample; and images that
    are no files (`Images.path` is None), of which only names and labels count.

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
    """The names of the images that may have changed since `content` was stored; seldom one too many.

    Args:
        images: the images.
        here: their `content`.
        stored: of another time or place. What it had and `images` has not cannot be named.
    """
    tables = [np.frombuffer(base64.b85decode(part["groups"]), "<u4").reshape(2, -1) for part in (here, stored)]
    changed = tables[0] != tables[1]  # [2, groups]
    return [
        images.name(index)
        for index, (groups, _) in enumerate(_places(images))
        if all(changed[table, group] for table, group in enumerate(groups))
    ]


def shared(images: Images, others: Images) -> list[int]:
    """The indices of those images that are among `others` too: by the bytes of their files, or else by their keys."""
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
    """Of how many images one is in the sample: a power of two, so that a few images more seldom change it."""
    return 1 << max(-(-number // _SAMPLE) - 1, 0).bit_length()


def _places(images: Images) -> Iterator[tuple[tuple[int, int], int]]:
    """For each image its group in each table, and a number, all from its name."""
    for index in range(len(images)):
        digest = hashlib.blake2b(images.key(index).encode(), digest_size=8).digest()
        first, second = (int.from_bytes(digest[at : at + 2], "little") % _GROUPS for at in (0, 2))
        yield (first, second), int.from_bytes(digest[4:], "little")
