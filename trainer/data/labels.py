"""Labels: checked, numbered by the names of their classes, and split for validation."""

import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.images import Images, printable
from trainer.errors import DataError, UsageError
from trainer.text import counted, listed

logger = logging.getLogger(__name__)


def stratified_split(labels: Sequence[int] | Tensor, fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Split images for training and validation, class by class.

    A class of two or more images has at least one on each side; a class of one image is for training. The order within
    a class comes from hashes, which no version of a library changes, and does not depend on other classes: images that
    are added to one class leave the split of the others as it was.

    Args:
        labels: the class of each image; or a tensor `[N, ...]` of values, which are ignored.
        fraction: share of each class for validation, between 0 and 1.
        seed: decides which images.

    Returns:
        Indices of the training images and of the validation images, ascending.

    Raises:
        UsageError: the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"val_fraction is {fraction}; expected a number between 0 and 1, such as 0.2.")
    members: dict[int, list[int]] = {}
    for index, label in enumerate([0] * len(labels) if isinstance(labels, Tensor) else labels):
        members.setdefault(label, []).append(index)
    val: set[int] = set()
    for label, indices in members.items():
        key = f"{seed} {label} "
        order = sorted(range(len(indices)), key=lambda i: hashlib.sha256(f"{key}{i}".encode()).digest())
        count = min(max(round(len(indices) * fraction), 1), len(indices) - 1)
        val.update(indices[i] for i in order[:count])
    return [i for i in range(len(labels)) if i not in val], sorted(val)


def check_labels(images: Images) -> None:
    """Check labels before training. (On a GPU, a label out of range ends the process without naming the image.)

    Raises:
        DataError: a class is not an index into `images.classes`, a value is not finite, or a tensor `[N, K]` does not
            have a column for each class; names the image.
    """
    labels, classes = images.labels, images.classes
    if isinstance(labels, Tensor):
        shape = list(labels.shape)
        if labels.ndim == 1 and not labels.is_floating_point():
            raise DataError(f"labels are {labels.dtype} {shape}: expected a list of int for classes, or floats")
        if classes and labels.ndim == 2 and shape[1] != len(classes):
            raise DataError(f"labels are {shape}: expected a column for each of {counted(len(classes), 'name')}")
        wrong = (~torch.isfinite(labels)).flatten(1).any(dim=1) if labels.ndim > 1 else ~torch.isfinite(labels)
        if wrong.any():
            raise DataError(f"{images.name(int(wrong.nonzero()[0]))} has a label that is not finite")
        return
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(classes):
            expected = f"an int from 0 to {len(classes) - 1}, an index into the classes"
            raise DataError(f"{images.name(index)} has the label {label!r}: expected {expected}")


def check_classes(train: Images, data: str) -> None:
    """Check that training images have two classes or more, or labels that are not classes; DataError otherwise."""
    if not isinstance(train.labels, Tensor) and len(train.classes) < 2:
        raise DataError(f"{printable(data)} has one class, {listed(train.classes)}: expected two or more")


def match_classes(classes: tuple[str, ...], val: Images) -> None:
    """Number the labels of validation images by the names of the training classes.

    A folder without one of the classes would otherwise have different numbers for all later classes.

    Args:
        classes: names of the training classes.
        val: its `labels` and `classes` are changed.

    Raises:
        DataError: `val` has a class that `classes` does not have, or columns in another order.
    """
    if isinstance(val.labels, Tensor):
        if tuple(val.classes) != tuple(classes):
            raise DataError(
                f"labels of validation are {listed(val.classes)}; expected {listed(classes)}, in this order"
            )
        return
    number = {name: i for i, name in enumerate(classes)}
    if extra := [name for name in val.classes if name not in number]:
        raise DataError(
            f"the validation images have classes without training images: {listed(extra)}. "
            f"Training has {listed(classes)}; validation has {listed(val.classes)}"
        )
    if val.classes != classes:
        val.labels = [number[val.classes[label]] for label in val.labels]
        val.classes = classes
    present = set(val.labels)
    if missing := [name for i, name in enumerate(classes) if i not in present]:
        logger.warning("classes without validation images: %s", listed(missing))
