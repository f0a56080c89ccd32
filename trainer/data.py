"""Owns the images: data sets, class names, decoding, transforms.

    train, val = load_data("~/photos")                  # or "digits", "CIFAR10", "flowers102", ...
    crop = train_transform("crop", size=224, resize=256)
    image, label = crop(train[0]), train.labels[0]      # uint8 [3, 224, 224] and an index into train.classes

Images stay uint8 until they are on the device (`Normalize`): a quarter of the bytes to move. For data of your own,
subclass `Images`.
"""

import contextlib
import difflib
import errno
import glob
import hashlib
import inspect
import logging
import math
import os
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from trainer.errors import DataError, UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")  # in order of preference
AUGMENTATIONS = ("none", "flip", "crop")

logger = logging.getLogger(__name__)
# A large image or odd metadata is no news to the owner of the photo, and what cannot be decoded is an error anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Images:
    """Labelled images with random access. Subclass it for data of your own; DataLoader workers get a copy."""

    classes: tuple[str, ...]  # their names
    labels: list[int]  # one per image, an index into `classes`

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        """The decoded image: uint8 [3, H, W], RGB, in its own size. Raises `DataError` if it cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call the image, such as its path or `CIFAR10 train[17]`. Always printable."""
        return f"{type(self).__name__}[{index}]"

    def key(self, index: int) -> str:
        """The image's name for a machine: the same wherever the data lies."""
        return self.name(index)

    def digest(self) -> str:
        """A sha256 of the classes, labels and file names: the same on machines that hold the same data."""
        sha256 = hashlib.sha256(repr((self.classes, self.labels)).encode())
        for index in range(len(self)):
            sha256.update(self.key(index).encode() + b"\n")
        return sha256.hexdigest()[:16]

    def stamp(self) -> str:
        """As `digest`, and it changes when a file does: what features that were kept are found again by."""
        return self.digest()

    def shrink(self, side: int) -> None:
        """From now on large images may come smaller, with a shorter side of `side` pixels at least: see `decode`."""


class Subset(Images):
    """The images at `indices` of another source, in that order."""

    def __init__(self, images: Images, indices: Iterable[int]):
        self.images, self.indices = images, list(indices)
        self.classes, self.labels = images.classes, [images.labels[i] for i in self.indices]

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.indices[index]]

    def name(self, index: int) -> str:
        return self.images.name(self.indices[index])

    def key(self, index: int) -> str:
        return self.images.key(self.indices[index])

    def stamp(self) -> str:
        return hashlib.sha256(repr((self.images.stamp(), self.indices)).encode()).hexdigest()

    def shrink(self, side: int) -> None:
        self.images.shrink(side)


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

    Raises `UsageError` for an unknown name, a bad fraction or a missing package, `DataError` for all that is wrong
    with the data.
    """
    train, val = _open_data(data, root)
    data = os.fspath(data)
    if len(train.classes) < 2:
        raise DataError(f"{printable(data)} has one class, {_listed(train.classes)}: expected two or more")
    if val is None:
        parts = stratified_split(train.labels, val_fraction, seed=seed)
        train, val = (Subset(train, indices) for indices in parts)
        if not len(val):
            raise DataError(f"{printable(data)}: no class has a second image, for validation")
    check_labels(train)
    check_labels(val)
    _match_classes(train.classes, val)
    return train, val


def load_test(data: str | os.PathLike[str], classes: Sequence[str], *, root: str | os.PathLike[str] = "data") -> Images:
    """The images of `data` to test a trained model on: the validation images, or all where none are set apart.

    `classes` are the model's. Labels are its indices, by name; raises `DataError` for a class it does not have, and
    else what `load_data` raises, which also says what `data` may be.
    """
    train, val = _open_data(data, root)
    images = train if val is None else val
    check_labels(images)
    _match_classes(tuple(classes), images)
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
        return _load_folder(folder)
    if name:
        return _load_torchvision(name, root)
    raise _unknown(data, list(names.values()))


def stratified_split(labels: Sequence[int], fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation images, ascending: `fraction` of every class is for validation.

    A class of two or more has at least one image on each side, a class of one is for training. The order is a hash,
    not a random generator that a library may change, and each class is shuffled by itself: images added to one class
    leave the other classes as they were split. Raises `UsageError` unless 0 < fraction < 1.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"val_fraction is {fraction}: expected a number between 0 and 1, such as 0.2")
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    val: set[int] = set()
    for label, indices in members.items():
        key = f"{seed} {label} "
        order = sorted(range(len(indices)), key=lambda i: hashlib.sha256(f"{key}{i}".encode()).digest())
        count = min(max(round(len(indices) * fraction), 1), len(indices) - 1)
        val.update(indices[i] for i in order[:count])
    return [i for i in range(len(labels)) if i not in val], sorted(val)


def check_labels(images: Images) -> None:
    """Raise `DataError`, naming the image, unless every label is an index into `images.classes`.

    Before training, because a GPU answers a label out of range by ending the process, without saying which.
    """
    for index, label in enumerate(images.labels):
        if type(label) is not int or not 0 <= label < len(images.classes):
            expected = f"an int from 0 to {len(images.classes) - 1}, an index into the classes"
            raise DataError(f"{images.name(index)} has the label {label!r}: expected {expected}")


def _match_classes(classes: tuple[str, ...], val: Images) -> None:
    """Number the classes of `val` as training does, by name: one missing folder shifts the numbers of all after it."""
    number = {name: i for i, name in enumerate(classes)}
    if extra := [name for name in val.classes if name not in number]:
        raise DataError(
            f"the validation images have classes without training images: {_listed(extra)}. "
            f"Training has {_listed(classes)}; validation has {_listed(val.classes)}"
        )
    if val.classes != classes:
        val.labels = [number[val.classes[label]] for label in val.labels]
        val.classes = classes
    present = set(val.labels)
    if missing := [name for i, name in enumerate(classes) if i not in present]:
        logger.warning("classes without validation images: %s", _listed(missing))


# Folders


class FolderImages(Images):
    """Image files in a folder per class. `files`: for each class folder, paths relative to `root`.

    The paths are kept as one byte string: a million `str` would be copied into every forked worker, page by page, as
    their reference counts change. Bytes also hold names that are not UTF-8.
    """

    def __init__(self, root: str, files: dict[str, list[str]]):
        encoded = [os.fsencode(path) for paths in files.values() for path in paths]
        self.root, self._paths, self._ends = root, b"".join(encoded), np.cumsum([0, *map(len, encoded)])
        self._side: int | None = None
        self.classes = tuple(printable(name) for name in files)
        self.labels = [label for label, paths in enumerate(files.values()) for _ in paths]

    def path(self, index: int) -> str:
        return os.path.join(self.root, self._below(index))

    def _below(self, index: int) -> str:
        index = range(len(self))[index]  # negative ones, and IndexError
        return os.fsdecode(self._paths[self._ends[index] : self._ends[index + 1]])

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.path(index), side=self._side)

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def key(self, index: int) -> str:
        return printable(self._below(index))

    def stamp(self) -> str:
        sha256 = hashlib.sha256(repr((self.classes, self.labels, self._side)).encode())
        for index in range(len(self)):
            status = os.stat(self.path(index))
            sha256.update(f"{self.key(index)} {status.st_size} {status.st_mtime_ns}\n".encode())
        return sha256.hexdigest()

    def shrink(self, side: int) -> None:
        self._side = side


def _load_folder(folder: str) -> tuple[Images, Images | None]:
    if not _has_folders(os.path.join(folder, "train")):  # a class may have that name, too
        images = _class_folders(folder)
        if set(map(str.lower, images.classes)) <= {"train", "training", "testing", *VALIDATION_FOLDERS}:
            expected = "train/ and val/, each with a folder per class"
            raise DataError(f"{printable(folder)} has {_listed(images.classes)}: expected {expected}")
        return images, None
    train = _class_folders(os.path.join(folder, "train"))
    for name in VALIDATION_FOLDERS:
        path = os.path.join(folder, name)
        if _has_folders(path):
            logger.info("validation images: %s", printable(path))
            return train, _class_folders(path)
        if os.path.isdir(path):
            logger.warning("%s has no class folders: not used for validation", printable(path))
    return train, None


def _has_folders(path: str) -> bool:
    return bool(glob.glob("*/", root_dir=path))  # neither hidden ones nor an error where there is nothing


def _class_folders(root: str) -> FolderImages:
    """The images below the class folders of `root`: classes and files by name, every real file once.

    Symbolic links come after all that really lies here, so that a link never takes an image from its own class. One
    to something already counted, or up to a folder it lies in, adds nothing. Hidden names are skipped.
    """
    classes: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    unused: dict[str, list[str]] = defaultdict(list)  # why -> paths
    folders, links = deque([""]), deque[str]()
    seen: set[str] = set()  # real paths of folders and image files

    def add(path: str, real: str) -> None:
        extension = os.path.splitext(path)[1].lower()
        if extension not in EXTENSIONS:
            ignored[printable(extension) or "no extension"] += 1
        elif os.sep not in path:
            unused["images outside the class folders"].append(path)
        else:
            seen.add(real)
            classes[path.split(os.sep, 1)[0]].append(path)

    while folders or links:
        linked = not folders
        path = links.popleft() if linked else folders.popleft()
        full = os.path.join(root, path)
        real = os.path.realpath(full)
        inside = os.path.join(os.path.realpath(os.path.dirname(full)), "")
        if real in seen or (linked and inside.startswith(os.path.join(real, ""))):
            unused["links to what is counted already"].append(path)
            continue
        if os.path.isfile(full):
            add(path, real)
            continue
        seen.add(real)
        if path and os.sep not in path:
            classes[path] = []
        with _blame(full), os.scandir(full) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                child = os.path.join(path, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    (links if os.path.exists(entry.path) else unused["broken links"]).append(child)
                elif entry.is_dir():
                    folders.append(child)
                elif entry.is_file():
                    add(child, os.path.join(real, entry.name))
    place, notes = printable(root), []
    if ignored:
        kinds = ", ".join(f"{kind} ({n})" for kind, n in sorted(ignored.items(), key=lambda kind: (-kind[1], kind[0])))
        notes.append(f"ignored {ignored.total()} file{'s' * (ignored.total() > 1)}: {kinds}")
    for why, paths in unused.items():
        notes.append(f"ignored {len(paths)} {why}, such as {printable(paths[0])}")
    for note in notes:
        logger.warning("%s: %s", place, note)
    if not classes:
        raise DataError("; ".join((f"{place} has no class folders: expected {place}/CLASS/IMAGE.jpg", *notes)))
    if empty := sorted(name for name, paths in classes.items() if not paths):
        where = _listed(os.path.join(place, printable(name)) for name in empty)
        raise DataError(f"no images in {where}: remove the folder or add images ({' '.join(EXTENSIONS)})")
    return FolderImages(root, {name: sorted(classes[name]) for name in sorted(classes)})


# Data sets by name


class Digits(Images):
    """The built-in set: 1,797 scans of digits, 8 x 8 pixels, 10 classes; `digits.md` has its source and licence."""

    def __init__(self):
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
            self.images = np.rint(file["images"] * (255 / 16)).astype(np.uint8)  # [N, 8, 8], 0..16 -> 0..255
            self.labels = file["labels"].tolist()
        self.classes = tuple("0123456789")

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.images[index]).repeat(3, 1, 1)

    def name(self, index: int) -> str:
        return f"digits[{index}]"

    def stamp(self) -> str:
        return hashlib.sha256(self.images.tobytes()).hexdigest()


_FLAG = {"train": True}, {"train": False}
_TRAIN_VAL = {"split": "train"}, {"split": "val"}
_TRAIN_TEST = {"split": "train"}, {"split": "test"}
# What the constructor takes for the training and for the validation images; None: one set, which we split. It is
# written out because signatures do not tell which splits there are, and trying them could start a download.
TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), _FLAG),
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    **dict.fromkeys(("CLEVRClassification", "DTD", "FGVCAircraft", "Flowers102", "ImageNet"), _TRAIN_VAL),
    **dict.fromkeys(("Imagenette", "PCAM", "RenderedSST2"), _TRAIN_VAL),
    "Country211": ({"split": "train"}, {"split": "valid"}),
    "Places365": ({"split": "train-standard", "small": True}, {"split": "val", "small": True}),
    **dict.fromkeys(("FER2013", "Food101", "GTSRB", "STL10", "SVHN"), _TRAIN_TEST),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    # Its server is gone: with download=True it fails even where the files are.
    "StanfordCars": ({"split": "train", "download": False}, {"split": "test", "download": False}),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), None),
}


class TorchvisionImages(Images):
    """A torchvision data set; `title` is for messages, such as `CIFAR10 train`."""

    def __init__(self, title: str, dataset: Any):
        self.title, self.dataset = title, dataset
        self.labels = _labels(title, dataset)
        self.classes = _class_names(dataset) or tuple(str(i) for i in range(max(self.labels, default=-1) + 1))

    def __getitem__(self, index: int) -> Tensor:
        index = range(len(self))[index]  # IndexError is for the caller, whose loop it ends
        with _blame(self.name(index)):
            image, _ = self.dataset[index]
            return image if isinstance(image, Tensor) else to_rgb(image)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


def _load_torchvision(name: str, root: str) -> tuple[Images, Images | None]:
    if parts := TORCHVISION[name]:
        train, val = (_open_torchvision(name, root, arguments) for arguments in parts)
        return train, val
    images = _open_torchvision(name, root, {})
    if files := getattr(images.dataset, "_image_files", None):  # SUN397: in whatever order the disk has them
        return Subset(images, sorted(range(len(files)), key=files.__getitem__)), None
    return images, None


def _open_torchvision(name: str, root: str, arguments: dict[str, Any]) -> TorchvisionImages:
    cls = getattr(torchvision.datasets, name)
    # download=True leaves alone what is there. With our loader, these files are decoded by the rules of `decode`.
    offered = {"download": True, "loader": decode}
    arguments = {key: offered[key] for key in offered.keys() & constructor_keywords(cls)} | arguments
    part = arguments.get("split"), {True: "train", False: "test"}.get(arguments.get("train"))
    try:
        images = TorchvisionImages(" ".join(filter(None, (name, *part))), cls(root, **arguments))
        if len(images):
            images[0]  # Caltech101 imports scipy only here, and Places365 does not look for its files before
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        raise UsageError(f"{name} needs the package {package}: pip install {package}") from error
    except Exception as error:  # of any type: torchvision checks little of what it reads
        reason = _reason(error)
        if "pip install" in reason:
            raise UsageError(f"{name}: {reason}") from error
        raise DataError(
            f"{name} could not be loaded: {reason}. It is downloaded to {root} where it is missing: check the network, "
            f"remove a part left by an interrupted download, or put the files there in torchvision's layout"
        ) from error
    return images


def constructor_keywords(cls: type) -> set[str]:
    """Names of the arguments that `cls()` accepts, through **kwargs too: EMNIST hands `download` on to MNIST."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names.update(parameter.name for parameter in parameters)
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                break
    return names


def _labels(title: str, dataset: Any) -> list[int]:
    """The label of every image, without reading the images where the data set has a list of labels."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if (held := getattr(dataset, attribute, None)) is not None:
            held = np.asarray(held)
            return (held[:, 0] if held.ndim == 2 else held).tolist()  # QMNIST has 8 numbers per image
    for attribute in ("samples", "_samples"):
        if (held := getattr(dataset, attribute, None)) is not None:
            return [int(label) for _, label in held]
    if hasattr(dataset, "h5py"):  # PCAM opens two files for every image: three minutes for the labels alone
        name, *_ = dataset._FILES[dataset._split]["targets"]
        with dataset.h5py.File(dataset._base_folder / name) as file:
            return file["y"][:].flatten().tolist()
    logger.info("%s: reading all %d images for their labels", title, len(dataset))
    return [int(dataset[i][1]) for i in range(len(dataset))]


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Empty where the data set has none. ImageNet and Imagenette have a tuple of synonyms per class."""
    if names := getattr(dataset, "classes", None) or getattr(dataset, "categories", None):
        return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)
    numbers = getattr(dataset, "class_to_idx", {})
    return tuple(sorted(numbers, key=numbers.__getitem__))


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
    return UsageError(f"{given}{hint}. Expected a folder of class folders, or one of {', '.join(names)}")


# Decoding

# Only these of Pillow's parsers see a file, whatever its name: others run programs (EPS) or need more than a file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


def decode(path_or_file: str | os.PathLike[str] | BinaryIO, *, side: int | None = None) -> Tensor:
    """The first frame of an image file as uint8 [3, H, W], RGB, by the rules of `to_rgb`.

    With `side`, a JPEG comes at 1/2, 1/4 or 1/8 of its size if its shorter side still has as many pixels: its decoder
    leaves out the rest, which is several times faster and only nearly the same as decoding and shrinking.

    JPEG, PNG, WebP, BMP, TIFF and GIF, told by their content. Raises `DataError`, with the path and Pillow's reason,
    for files that are missing, cut off, of another kind, or above Pillow's limit for decompression bombs (178,956,970
    pixels). Errors of the machine, such as too many open files, stay the `OSError` they are.
    """
    # By Pillow: torchvision 0.29 deprecates its own decoders.
    is_path = isinstance(path_or_file, (str, os.PathLike))
    with (
        _blame(path_or_file if is_path else str(getattr(path_or_file, "name", "the given file"))),
        Image.open(path_or_file, formats=_FORMATS) as image,
    ):
        if side is not None and image.format == "JPEG":
            factor = max(side / min(image.size), 1e-9)
            image.draft(None, tuple(math.ceil(length * factor) for length in image.size))
        key = image.info.get("transparency")
        if image.format == "PNG" and key is not None:  # Pillow scales the pixels to 8 bits, but not this colour
            raw = image.tile[0][3] if image.tile else ""
            if raw in ("L;2", "L;4"):
                image.info["transparency"] = key * 255 // (2 ** int(raw[-1]) - 1)
            elif raw == "RGB;16B":
                image.info["transparency"] = tuple(value >> 8 for value in key)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as uint8 [3, H, W], RGB.

    EXIF orientation is applied. Transparency is composited over white. CMYK is converted without a colour profile.
    16-bit samples become 8-bit by scaling: 65535 is 255. Raises `DataError` for modes with no such range: floats, and
    32-bit integers outside of 0..65535.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF does not make the pixels worse
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise DataError("floating-point pixels: expected 8 or 16 bits per channel, convert the file first")
    if image.mode.startswith("I"):  # Pillow's own conversion saturates: nearly all of a 16-bit scan would be white
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= grey.min() <= grey.max() <= 65535:
            raise DataError(
                f"32-bit pixels from {grey.min()} to {grey.max()}: expected 0 to 65535, convert the file first"
            )
        grey[grey == image.info.get("transparency", -1)] = 65535
        pixels = np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba)
        pixels = np.array(canvas)
    else:
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # which would make a copy
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W], still interleaved: v2 crops that 3 times faster


@contextlib.contextmanager
def _blame(culprit: Any) -> Iterator[None]:
    """Whatever goes wrong inside is a `DataError` about `culprit`, unless it is the machine's or a package's fault."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # Pillow's parsers raise a dozen types on damaged files
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        raise DataError(f"cannot read {printable(culprit)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def printable(path: Any) -> str:
    """A path or name for messages: bytes that are not UTF-8, newlines and the like are escaped."""
    text = os.fsencode(os.fspath(path)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


# Transforms: uint8 [3, H, W] -> uint8 [3, size, size]. Random ones draw from torch's global generator.


def train_transform(
    augment: str, *, size: int, resize: int, interpolation: str = "bilinear"
) -> Callable[[Tensor], Tensor]:
    """`augment`: "none" is the evaluation transform; "flip" adds a horizontal flip of every second image; "crop" is a
    random crop of 8 to 100 % of the area, sides 3:4 to 4:3, with such a flip (`resize` is not used). Pixels.
    """
    plain = eval_transform(size=size, resize=resize, interpolation=interpolation)
    if augment == "none":
        return plain
    if augment == "flip":
        return v2.Compose([plain, v2.RandomHorizontalFlip()])
    if augment == "crop":
        crop = v2.RandomResizedCrop(size, interpolation=InterpolationMode(interpolation), antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    raise UsageError(f"augment is {augment!r}: expected one of {', '.join(AUGMENTATIONS)}")


def eval_transform(*, size: int, resize: int, interpolation: str = "bilinear") -> Callable[[Tensor], Tensor]:
    """Shorter side to `resize` pixels, then the central `size` x `size`.

    The values are those of torchvision's presets on a Pillow image, or 1 of 255 beside them. (On a tensor the presets
    resize in float, which takes eight times as long.)
    """
    shrink = v2.Resize(resize, interpolation=InterpolationMode(interpolation), antialias=True)
    return v2.Compose([shrink, v2.CenterCrop(size)])


class Normalize(nn.Module):
    """uint8 [B, 3, H, W] to float32, (x / 255 - mean) / std per channel, on the device of the images.

    `mean`, `std`: three numbers each, for pixels from 0 to 1. One multiply-add; its constants are not in state dicts.
    The result is in channels_last format, and so is all that convolutions make of it, in the trunk and in the tail.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        rows, width = images.permute(0, 2, 3, 1).flatten(2), images.shape[3]  # [B, H, W·3]: long rows, to be fast
        scale, shift = (value.flatten().repeat(width) for value in (self.scale, self.shift))
        rows = rows.float()
        torch.addcmul(shift, rows, scale, out=rows)  # in place: new memory takes longer than the arithmetic
        return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)
