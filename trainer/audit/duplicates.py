"""The same image twice: pixel for pixel, or nearly."""

from collections.abc import Sequence
from typing import NamedTuple

from trainer.audit.neighbours import Neighbours
from trainer.audit.prints import Print

# Nearly the same are images whose distance is a small part of that to their tenth neighbours (Zelnik-Manor & Perona,
# Self-Tuning Spectral Clustering, 2004): a larger part where they also look alike. Measured on photos with planted
# copies, and on the digits, where there is none: docs/audit.md.
_PART, _PART_ALIKE, _ALIKE = 0.4, 0.45, 16


class Duplicate(NamedTuple):
    """An image that is there before.

    Attributes:
        image: its index. of: the index of the other one, which is less.
        exact: whether all pixels are equal.
        similarity: cosine of their centred features; 1 of exact ones.
    """

    image: int
    of: int
    exact: bool
    similarity: float


def first_of(prints: Sequence[Print]) -> list[int]:
    """For each image the first one with the same pixels: itself, if there is none before."""
    first: dict[bytes, int] = {}
    return [first.setdefault(one.pixels, index) for index, one in enumerate(prints)]


def duplicates(prints: Sequence[Print], near: Neighbours, kept: Sequence[int], *, train: int) -> list[Duplicate]:
    """Each image that is there before, once, with the one before it that is nearest; one of training, if there is one.

    Args:
        prints: of all images, those of training first.
        near: the neighbours of those at `kept`.
        kept: indices of the images that are the first ones with their pixels.
        train: how many of the images are of training.
    """
    exact = [Duplicate(index, of, True, 1.0) for index, of in enumerate(first_of(prints)) if of != index]
    scale, found = near.scale(), dict[int, tuple[bool, float, int]]()
    limit = _PART_ALIKE * (scale[:, None] * scale[near.index]).sqrt()
    for row, column in (near.distance <= limit).nonzero().tolist():
        other, distance = int(near.index[row, column]), float(near.distance[row, column])
        of, image = sorted((kept[row], kept[other]))
        alike = prints[of].distance(prints[image]) <= _ALIKE
        if alike or distance <= _PART / _PART_ALIKE * float(limit[row, column]):
            best = (of >= train, distance, of)
            found[image] = min(best, found.get(image, best))
    return exact + [Duplicate(image, of, False, 1 - distance**2 / 2) for image, (_, distance, of) in found.items()]
