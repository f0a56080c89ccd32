"""Classes that make trouble: alike in features or in name, or with few images."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

_FEW = 10  # images of a class
_ALIKE = 0.3  # of the images of two classes, taken for the other one; 0.5 is chance


def same_names(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in nothing but case, spaces, hyphens and underscores."""

    def plain(name: str) -> str:
        return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if not c.isspace() and c not in "-_")

    return [(one, other) for one, other in combinations(classes, 2) if plain(one) == plain(other)]


def too_few(labels: Sequence[int], classes: Sequence[str]) -> list[tuple[str, int]]:
    """Classes with fewer than 10 training images, and how many they have; the smallest first."""
    counts = Counter(labels)
    found = [(name, counts[index]) for index, name in enumerate(classes) if counts[index] < _FEW]
    return sorted(found, key=lambda entry: entry[1])


def alike(confusion: Tensor, classes: Sequence[str]) -> list[tuple[str, str, float]]:
    """Pairs of classes that the features cannot tell apart, and the share that is taken for the other; most first.

    Args:
        confusion: `[C, C]`, see `LeftOut.confusion`; classes of fewer than 10 images are omitted.
    """
    large = (confusion.sum(dim=1) >= _FEW).nonzero()[:, 0].tolist()
    found = []
    for one, other in combinations(large, 2):
        swapped = int(confusion[one, other] + confusion[other, one])
        share = swapped / max(swapped + int(confusion[one, one] + confusion[other, other]), 1)
        if share >= _ALIKE:
            found.append((classes[one], classes[other], share))
    return sorted(found, key=lambda entry: -entry[2])
