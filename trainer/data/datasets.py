"""The built-in digits, and the data sets of torchvision."""

import hashlib
import inspect
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from trainer.data.folders import CHOSEN_ON_TEST
from trainer.data.images import Images, Subset, blame, decode, one_line, to_rgb
from trainer.errors import DataError, UsageError

logger = logging.getLogger(__name__)


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
# The arguments of each constructor for training and for validation images; None: one set, which is split. They are
# written out because signatures do not name the splits, and trying them could start a download.
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
    """A torchvision data set.

    Args:
        title: its name in messages, such as `CIFAR10 train`.
        dataset: the object of torchvision.
    """

    def __init__(self, title: str, dataset: Any):
        self.title, self.dataset = title, dataset
        self.labels = _labels(title, dataset)
        self.classes = _class_names(dataset) or tuple(str(i) for i in range(max(self.labels, default=-1) + 1))

    def __getitem__(self, index: int) -> Tensor:
        index = range(len(self))[index]  # raises IndexError, which ends the loop of the caller
        with blame(self.name(index)):
            image, _ = self.dataset[index]
            return image if isinstance(image, Tensor) else to_rgb(image)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


def load_torchvision(name: str, root: str) -> tuple[Images, Images | None]:
    """Open a data set of torchvision, and download it if it is not there.

    Args:
        name: a key of `TORCHVISION`.
        root: the folder that it is in, or is downloaded to.

    Returns:
        The training images, and the validation images; None if the data set has no second part.

    Raises:
        UsageError: a package that it needs is missing.
        DataError: it cannot be read or downloaded.
    """
    if parts := TORCHVISION[name]:
        train, val = (_open_torchvision(name, root, arguments) for arguments in parts)
        part = parts[1].get("split", "test")
        val.origin = f"torchvision's {part} split" + CHOSEN_ON_TEST * (part == "test" or "train" in parts[1])
        return train, val
    images = _open_torchvision(name, root, {})
    if files := getattr(images.dataset, "_image_files", None):  # SUN397: in whatever order the disk has them
        return Subset(images, sorted(range(len(files)), key=files.__getitem__)), None
    return images, None


def _open_torchvision(name: str, root: str, arguments: dict[str, Any]) -> TorchvisionImages:
    cls = getattr(torchvision.datasets, name)
    # download=True downloads only missing files; loader=decode reads image files as this program reads all others.
    offered = {"download": True, "loader": decode}
    arguments = {key: offered[key] for key in offered.keys() & constructor_keywords(cls)} | arguments
    train = arguments.get("train")
    part = arguments.get("split"), None if train is None else "train" if train else "test"
    try:
        images = TorchvisionImages(" ".join(filter(None, (name, *part))), cls(root, **arguments))
        if len(images):
            images[0]  # Caltech101 imports scipy only here, and Places365 does not look for its files before
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        raise UsageError(f"{name} needs the package {package}: pip install {package}") from error
    except Exception as error:  # of any type: torchvision checks little of what it reads
        reason = one_line(error)
        if "pip install" in reason:
            raise UsageError(f"{name}: {reason}") from error
        raise DataError(
            f"{name} could not be loaded: {reason}. It is downloaded to {root} where it is missing: check the network, "
            f"remove a part left by an interrupted download, or put the files there in torchvision's layout"
        ) from error
    return images


def constructor_keywords(cls: type) -> set[str]:
    """Names of the arguments of a constructor, and of those that its **kwargs pass on, such as EMNIST's to MNIST."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names.update(parameter.name for parameter in parameters)
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                break
    return names


def _labels(title: str, dataset: Any) -> list[int]:
    """The label of every image; images are read only if the data set has no list of labels."""
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
    """The names of the classes; () if the data set has none. ImageNet and Imagenette have several for each class."""
    if names := getattr(dataset, "classes", None) or getattr(dataset, "categories", None):
        return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)
    numbers = getattr(dataset, "class_to_idx", {})
    return tuple(sorted(numbers, key=numbers.__getitem__))
