"""Open the images of a run: the same on all processes, checked, split into training and validation."""

import difflib
import glob
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torchvision
from accelerate import Accelerator
from torch import Tensor

from trainer.config import DataConfig, SpeedConfig
from trainer.data import excluded
from trainer.data.bad_images import check_images, without
from trainer.data.content import Content, content, differing
from trainer.data.datasets import TORCHVISION, Digits, load_torchvision
from trainer.data.folders import load_folder
from trainer.data.images import Images, Subset, printable
from trainer.data.labels import check_classes, check_labels, match_classes, stratified_split
from trainer.data.loader import KeyedDataset, Workers
from trainer.data.transforms import InputSpec, check_pixels, is_random
from trainer.errors import DataError, UsageError
from trainer.processes.together import assert_same, gather, main_first, on_each_machine, on_main
from trainer.text import counted, listed

logger = logging.getLogger(__name__)


@dataclass
class Data:
    """The images of a run.

    Attributes:
        train: the training images.
        val: the validation images.
        name: the data as the user gave it, such as a folder.
        skipped: keys of the images that were left out, unreadable or excluded, for training and for validation.
        origin: where the validation images come from, as text; "" if unknown.
        content: the `content.content` of the training and of the validation images; empty if it was not computed.
        reason: why images were left out, as text.
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
        """The names of the classes; empty if labels are not classes."""
        return tuple(self.train.classes)

    def about(self) -> dict[str, Any]:
        """The description of the images in a checkpoint, for `check_same`: digests, images left out, and content."""
        digests = {"training": self.train.digest(), "validation": self.val.digest()}
        return {**digests, "skipped": self.skipped, "content": self.content}

    def state(self) -> dict[str, Any]:
        """The entries of a checkpoint that describe the data."""
        return {"classes": list(self.classes), "data": self.about()}

    def check_same(self, stored: dict[str, Any]) -> None:
        """Check that these are the images that a run was started with.

        Args:
            stored: the `about()` of the run. Older checkpoints have no "content"; then only names and labels count.

        Raises:
            DataError: names the images that may differ.
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
            text += f", {counted(len(self.classes), 'class')}"
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
    """Open the images of a run, the same on every process (a collective).

    Args:
        accelerator: of the run.
        config: the data, what to leave out, and whether every image is decoded once to check it.
        images: the function of the recipe, `(config, *, seed)` → training and validation images. It is called on one
            process before the others, so it may download.
        seed: seed of the run, for the split.
        known: the `about()` of a run that is continued, which has to have the same images; None for a new run.
        workers: processes that decode images for the check.

    Raises:
        DataError: the data is wrong, or another machine has other files; names them.
        UsageError: there is no such data, or machines have different names or versions.
    """

    def load() -> tuple[Images, Images]:
        train, val = found = images(config, seed=seed)
        if kinds := [type(part).__name__ for part in found if not isinstance(part, Images)]:
            raise UsageError(f"images() of the recipe returned {kinds[0]}; expected two Images: training, validation.")
        _check_parts(train, val, config.data)
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
        workers=workers,
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
    """The training and the validation images with their transforms.

    Args:
        data: the images of the run.
        transforms: the two transforms of the recipe, for training and for validation.
        config: `views` and `fast_decode` are used.
        spec: how images are prepared for the model.
        seed: seed of the run, for random transforms.

    Raises:
        UsageError: several views are asked for and the training transform is not random; or the recipe returned
            something other than images or transforms.
    """
    if not isinstance(transforms, Sequence) or len(transforms) != 2:
        found = type(transforms).__name__
        raise UsageError(f"transforms() of the recipe returned {found}; expected two: for training, for evaluation.")
    for images, transform in zip((data.train, data.val), transforms, strict=True):
        check_pixels(images.name(0), images[0], transform, spec=spec)
    if config.fast_decode:
        for images in (data.train, data.val):
            images.shrink(2 * spec.resize)  # twice as long, because a random crop enlarges a part of the image
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
    """Open a data set by name, and split it if it has no validation images.

    Args:
        data: a folder, the name of a torchvision data set (upper and lower case are the same), or "digits", the
            built-in one. A folder is preferred to a data set of the same name, except for "digits". A folder holds
            `train/` and one of `val/ valid/ validation/ test/`, each with a folder per class, or the class folders
            themselves.
        val_fraction: share of each class for validation, if there are no validation images.
        seed: seed of that split.
        root: folder of torchvision's data sets. The first call downloads them: with several processes, let one call
            this before the others.

    Returns:
        The training and the validation images, with the same classes.

    Raises:
        UsageError: an unknown name, a fraction outside of 0 to 1, or a missing package.
        DataError: the data is wrong.
    """
    train, val = _open_data(data, root)
    data = os.fspath(data)
    if val is None:
        check_classes(train, data)
        parts = stratified_split(train.labels, val_fraction, seed=seed)
        train, val = (Subset(train, indices) for indices in parts)
        val.origin = f"{100 * val_fraction:g} % split off by seed {seed}"
        if not len(val):
            raise DataError(f"{printable(data)}: no class has a second image, for validation")
    _check_parts(train, val, data)
    return train, val


def load_test(data: str | os.PathLike[str], classes: Sequence[str], *, root: str | os.PathLike[str] = "data") -> Images:
    """Open a data set to test a trained model: its validation images, or all images if it has none.

    Args:
        data: as for `load_data`.
        classes: the classes of the model; labels become indices into them, by name.
        root: folder of torchvision's data sets.

    Raises:
        DataError: the data is wrong, or has a class that the model does not have.
        UsageError: an unknown name, or a missing package.
    """
    train, val = _open_data(data, root)
    images = train if val is None else val
    check_labels(images)
    match_classes(tuple(classes), images)
    return images


def _open_data(data: str | os.PathLike[str], root: str | os.PathLike[str]) -> tuple[Images, Images | None]:
    """The training images and the validation images, each with its own classes; None if there are none."""
    data, root = os.fspath(data), os.path.expanduser(root)
    folder = os.path.expanduser(data)
    names = {name.lower(): name for name in ("digits", *TORCHVISION)}
    name = names.get(data.lower())
    if name == "digits":  # the default of --data must not depend on the working directory
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


def _check_parts(train: Images, val: Images, data: str) -> None:
    """Check training and validation images; number the classes of `val` as in `train`."""
    check_classes(train, data)
    for images in (train, val):
        check_labels(images)
    match_classes(train.classes, val)


def _unknown(data: str, names: list[str]) -> UsageError:
    """The error for a name that is neither a folder nor a data set, with similar names."""
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
