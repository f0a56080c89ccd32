"""The data of a run: opened on all processes, checked, split and described."""

import difflib
import glob
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor

from trainer.config import DataConfig, SpeedConfig
from trainer.data import excluded
from trainer.data.bad_images import check_images, without
from trainer.data.content import Content, content, differing
from trainer.data.datasets import TORCHVISION, Digits, load_torchvision
from trainer.data.folders import load_folder
from trainer.data.images import Images, Subset, counted, listed, printable
from trainer.data.loader import KeyedDataset, Workers
from trainer.data.transforms import InputSpec, check_pixels, is_random
from trainer.errors import DataError, UsageError
from trainer.processes.together import assert_same, gather, main_first, on_each_machine, on_main

logger = logging.getLogger(__name__)


@dataclass
class Data:
    """The images of a run.

    Attributes:
        train, val: the training and the validation images.
        name: what the user gave, such as a folder.
        skipped: keys of the images that were left out, of each part: unreadable, or excluded.
        origin: where the validation images come from; "" if unknown.
        content: of each part, see `content.content`; empty where nobody has asked.
        reason: why images were left out.
    """

    train: Images
    val: Images
    name: str
    skipped: list[list[str]] = field(default_factory=lambda: [[], []])
    origin: str = ""
    content: list[Content] = field(default_factory=list)
    reason: str = "unreadable"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty where labels are numbers."""
        return tuple(self.train.classes)

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of the images, for `check_same`: digests, what was left out, and the content."""
        digests = {"training": self.train.digest(), "validation": self.val.digest()}
        return {**digests, "skipped": self.skipped, "content": self.content}

    def state(self) -> dict[str, Any]:
        """The entries of a checkpoint that describe the data."""
        return {"classes": list(self.classes), "data": self.about()}

    def check_same(self, stored: dict[str, Any]) -> None:
        """Raise `DataError` unless these are the images of the run whose `about()` was stored; names those that differ.

        Args:
            stored: the `about()` of the run. Without "content", as older checkpoints have it, names and labels alone
                are compared.
        """
        here, problems = self.about(), []
        old: list[Content | None] = stored.get("content") or [None, None]
        new = self.content or [None, None]
        for part, images, now, then in zip(("training", "validation"), (self.train, self.val), new, old, strict=True):
            if here[part] == stored[part] and (now is None or then is None or now == then):
                continue
            what = "names or labels" if here[part] != stored[part] else "files"
            problem = f"the {part} images have other {what} than the run had"
            if now is not None and then is not None:
                if now["images"] != then["images"]:
                    problem += f": {now['images']:,}, not {then['images']:,}"
                if names := differing(images, now, then):
                    problem += f"; it may be {listed(names, 8)}"
            problems.append(problem)
        if not problems and here["skipped"] != stored.get("skipped", [[], []]):
            problems.append("the run left out other images")
        if problems:
            ways = "Put the images back as they were, or start a new run with its checkpoint as --weights."
            raise DataError(f"{'; '.join(problems)}. {ways}")

    def __str__(self) -> str:
        origin = f" ({self.origin})" if self.origin else ""
        text = f"{self.name}: {len(self.train):,} training, {len(self.val):,} validation images{origin}"
        if self.classes:
            text += f", {len(self.classes):,} class{'es' * (len(self.classes) != 1)}"
        elif isinstance(self.train.labels, Tensor):
            shape = "×".join(map(str, self.train.labels.shape[1:]))
            text += f", labels of {shape} values" if shape else ", one value per label"
        if any(self.skipped):
            text += f"\n        {self.reason}, left out: {sum(map(len, self.skipped)):,}"
        return text


def open_data(
    accelerator: Accelerator,
    config: DataConfig,
    images: Callable[..., tuple[Images, Images]],
    *,
    seed: int,
    known: dict[str, Any] | None = None,
    workers: Workers = Workers(),
) -> Data:
    """The images of a run, the same on every process (a collective).

    Args:
        config: what to open, what to leave out, and whether to check it.
        images: `(config, *, seed)` to the training and the validation images; called on one process before the
            others, so that it may download.
        seed: of the run, for a split.
        known: the `about()` of the run that is continued: it goes on with the same images, and leaves out the same;
            None for a new run.
        workers: decode images for the check.

    Raises:
        DataError: the data is wrong, or another machine has other files; names them.
        UsageError: there is no such data, or the machines have other names or versions.
    """

    def load() -> tuple[Images, Images]:
        train, val = found = images(config, seed=seed)
        if kinds := [type(part).__name__ for part in found if not isinstance(part, Images)]:
            raise UsageError(f"images() of the recipe returned {kinds[0]}; expected two Images: training, validation.")
        _check(train, val, config.data)
        return train, val

    train, val = main_first(accelerator, load)
    origin, skip, keys = val.origin, config.bad_images == "skip", [[], []]
    if config.exclude is not None and known is None:  # a run that is continued has them among those that it left out
        places = on_main(accelerator, excluded.ticked, config.exclude)
        keys = excluded.keys((train, val), places, data=config.data, table=config.exclude)
        train, val = (without(part, some) for part, some in zip((train, val), keys, strict=True))
    (train, val), skipped = check_images(
        accelerator,
        (train, val),
        check=config.check_data,
        skip=skip,
        known=None if known is None else known.get("skipped", [[], []]),
        workers=workers.count,
        timeout=workers.timeout,
    )
    skipped = [one + other for one, other in zip(keys, skipped, strict=True)]
    assert_same(accelerator, data=train.digest, validation=val.digest)
    data = Data(train, val, config.data, skipped, origin)
    data.reason = "unreadable" if config.exclude is None else f"excluded by {config.exclude} or unreadable"
    data.content = _same_content(accelerator, data)
    if known is not None:
        data.check_same(known)
    return data


def transformed(
    data: Data, transforms: Sequence[Callable[[Tensor], Tensor]], config: SpeedConfig, spec: InputSpec, *, seed: int
) -> tuple[KeyedDataset, KeyedDataset]:
    """The training and the validation images under their transforms.

    Args:
        data: of the run.
        transforms: of the recipe, for training and for validation.
        config: `views` and `fast_decode`.
        spec: what the model takes.
        seed: of the run, for what is random in a transform.

    Raises:
        UsageError: several views are asked for, and the transform is not random; or images or transforms are none.
    """
    if not isinstance(transforms, Sequence) or len(transforms) != 2:
        found = type(transforms).__name__
        raise UsageError(f"transforms() of the recipe returned {found}; expected two: for training, for evaluation.")
    for images, transform in zip((data.train, data.val), transforms, strict=True):
        check_pixels(images.name(0), images[0], transform, spec=spec)
    if config.fast_decode:
        for images in (data.train, data.val):
            images.shrink(2 * spec.resize)  # twice: a random crop enlarges a part
    train, val = (
        KeyedDataset(images, transform, seed=seed)
        for images, transform in zip((data.train, data.val), transforms, strict=True)
    )
    if is_random(train.transform, *(data.train[place * len(train) // 2] for place in range(2))):
        train.views = config.views
    elif (config.views or 1) > 1:
        raise UsageError(f"--views {config.views} needs a random transform, and the one for training is not random.")
    return train, val


def _same_content(accelerator: Accelerator, data: Data) -> list[Content]:
    """The content of both parts, read once on each machine; DataError if machines differ (a collective)."""
    mine = on_each_machine(accelerator, lambda: [content(part) for part in (data.train, data.val)])
    found = gather(accelerator, mine)
    first = found[0]
    assert first is not None  # the main process has read it
    for rank, other in enumerate(found):
        if other is not None and other != first:
            pairs = zip((data.train, data.val), first, other, strict=True)
            names = [name for part, here, there in pairs for name in differing(part, here, there)]
            raise DataError(
                f"the machine of process {rank} has other files of the same names; it may be {listed(names, 8)}. "
                "All machines need the same data."
            )
    return first


def load_data(
    data: str | os.PathLike[str], *, val_fraction: float = 0.2, seed: int = 0, root: str | os.PathLike[str] = "data"
) -> tuple[Images, Images]:
    """The training and the validation images of `data`, with the same classes.

    `data` is a folder, the name of a torchvision data set in any case, or "digits", the built-in one. A folder wins,
    except over "digits".
    A folder holds `train/` and one of `val/ valid/ validation/ test/`, each with a folder per class, or just the
    folders of the classes. Where there are no validation images, `val_fraction` of every class is split off, by
    `seed`. torchvision's data sets are kept under `root`; the first call downloads them, so with several processes
    let one call this before the others.

    Raises:
        UsageError: an unknown name, a bad fraction or a missing package.
        DataError: anything that is wrong with the data.
    """
    train, val = _open_data(data, root)
    data = os.fspath(data)
    if val is None:
        _check_classes(train, data)
        parts = stratified_split(train.labels, val_fraction, seed=seed)
        train, val = (Subset(train, indices) for indices in parts)
        val.origin = f"{100 * val_fraction:g} % split off by seed {seed}"
        if not len(val):
            raise DataError(f"{printable(data)}: no class has a second image, for validation")
    _check(train, val, data)
    return train, val


def load_test(data: str | os.PathLike[str], classes: Sequence[str], *, root: str | os.PathLike[str] = "data") -> Images:
    """The images of `data` to test a trained model on: the validation images, or all where none are set apart.

    `classes` are the model's. Labels are its indices, by name; raises `DataError` for a class it does not have, and
    else what `load_data` raises, which also says what `data` may be.
    """
    train, val = _open_data(data, root)
    images = train if val is None else val
    check_labels(images)
    match_classes(tuple(classes), images)
    return images


def _open_data(data: str | os.PathLike[str], root: str | os.PathLike[str]) -> tuple[Images, Images | None]:
    """The training images and, where they are set apart, the validation images, each with its own classes."""
    data, root = os.fspath(data), os.path.expanduser(root)
    folder = os.path.expanduser(data)
    names = {name.lower(): name for name in ("digits", *TORCHVISION)}
    name = names.get(data.lower())
    if name == "digits":  # what the program does without --data must not depend on the folder it is started in
        if os.path.isdir(folder):
            logger.warning("digits is the built-in data set; for the folder of that name give ./digits")
        return Digits(), None
    if os.path.isdir(folder):
        if name:
            logger.warning("%s is a data set and, here, also a folder: taking the folder", data)
        return load_folder(folder)
    if name:
        return load_torchvision(name, root)
    raise _unknown(data, list(names.values()))


def stratified_split(labels: Sequence[int] | Tensor, fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation images, ascending: `fraction` of every class is for validation.

    A class of two or more has at least one image on each side, a class of one is for training. The order is a hash,
    not a random generator that a library may change, and each class is shuffled by itself: images added to one class
    leave the other classes as they were split.

    Args:
        labels: the class of each image; or a tensor `[N, ...]` of values, which is split without regard to them.
        fraction: between 0 and 1.
        seed: another one, another split.

    Raises:
        UsageError: unless 0 < fraction < 1.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"val_fraction is {fraction}: expected a number between 0 and 1, such as 0.2")
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
    """Check labels before training: a GPU answers a class out of range by ending the process, without saying which.

    Raises:
        DataError: names the image: a class is no index into `images.classes`; a value is not finite; or a tensor of
            labels `[N, K]` does not have a column for each of the classes.
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


def _check_classes(train: Images, data: str) -> None:
    if not isinstance(train.labels, Tensor) and len(train.classes) < 2:
        raise DataError(f"{printable(data)} has one class, {listed(train.classes)}: expected two or more")


def _check(train: Images, val: Images, data: str) -> None:
    """What training needs of its two parts; numbers the classes of `val` as training does."""
    _check_classes(train, data)
    for images in (train, val):
        check_labels(images)
    match_classes(train.classes, val)


def match_classes(classes: tuple[str, ...], val: Images) -> None:
    """Number the classes of `val` as training does, by name: one missing folder shifts the numbers of all after it."""
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


def _unknown(data: str, names: list[str]) -> UsageError:
    path = os.path.normpath(os.path.expanduser(data))
    parent, base = os.path.split(path)
    nearby = {
        name[:-1].lower(): printable(os.path.join(parent, name[:-1])) for name in glob.glob("*/", root_dir=parent)
    }
    known = {name.lower(): name for name in names} | nearby
    close = [known[key] for key in difflib.get_close_matches(base.lower(), known, n=4)]
    others = {name.lower(): name for name in torchvision.datasets.__all__}
    if data.lower() in others:
        given = f"torchvision's {others[data.lower()]} is not a data set of images with one class each"
    elif data and os.path.exists(path):
        given = f"'{printable(data)}' is not a folder"
    else:
        given = f"no folder '{printable(data)}' and no data set of that name"
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    expected = "a folder of class folders, digits, or a data set of torchvision such as CIFAR10 or Flowers102"
    return UsageError(f"{given}{hint}. Expected {expected}")
