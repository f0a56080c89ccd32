"""Find the images in a folder with one folder per class, and warn about files that are not used."""

import glob
import logging
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from trainer.data.images import EXTENSIONS, REMEDIES, Images, blame, decode, left_by_programs, printable
from trainer.errors import DataError
from trainer.text import counted, listed

# For the origin of validation images that are the test images of a data set.
CHOSEN_ON_TEST = ", on which the best epoch is chosen: its accuracy there is better than on images never seen"

VALIDATION_FOLDERS = ("val", "valid", "validation", "test")  # in order of preference

logger = logging.getLogger(__name__)


class FolderImages(Images):
    """Image files in a folder per class.

    The paths are kept in one byte string. A million `str` would be copied into every forked worker, page by page, when
    their reference counts change; and bytes can hold names that are not UTF-8.

    Args:
        root: the folder of the class folders.
        files: paths relative to `root`, by class.
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
        """The path relative to `root`."""
        index = range(len(self))[index]  # counts negative indices from the end, and raises IndexError
        return os.fsdecode(self._paths[self._ends[index] : self._ends[index + 1]])

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.path(index), side=self._side)

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def key(self, index: int) -> str:
        return printable(self._below(index))

    def stamp(self) -> str:
        return f"{super().stamp()} {self._side}"

    def shrink(self, side: int) -> None:
        self._side = side


def load_folder(folder: str) -> tuple[Images, Images | None]:
    """Open a folder of images.

    Args:
        folder: holds `train/` and one of `val/ valid/ validation/ test/`, each with a folder per class, or the class
            folders themselves.

    Returns:
        The training images, and the validation images; None if there is no folder of validation images.

    Raises:
        DataError: there are no class folders, or one of them is empty.
    """
    if not _has_folders(os.path.join(folder, "train")):  # "train" without folders is a class
        images = _class_folders(folder)
        if set(map(str.lower, images.classes)) <= {"train", "training", "testing", *VALIDATION_FOLDERS}:
            expected = "train/ and val/, each with a folder per class"
            raise DataError(f"{printable(folder)} has {listed(images.classes)}: expected {expected}")
        return images, None
    train = _class_folders(os.path.join(folder, "train"))
    for name in VALIDATION_FOLDERS:
        path = os.path.join(folder, name)
        if _has_folders(path):
            val = _class_folders(path)
            val.origin = f"{name}/" + CHOSEN_ON_TEST * (name == "test")
            return train, val
        if os.path.isdir(path):
            logger.warning("%s has no class folders: not used for validation", printable(path))
    return train, None


def _has_folders(path: str) -> bool:
    """Whether a folder has subfolders for classes; False if it does not exist."""
    return any(not left_by_programs(name[:-1]) for name in glob.glob("*/", root_dir=path))


def _class_folders(root: str) -> FolderImages:
    """The images in the class folders of `root`, sorted by class and path; DataError if a class has none."""
    scan, place = _Scan(root), printable(root)
    notes = list(scan.notes())
    for note in notes:
        logger.warning("%s: %s", place, note)
    if not scan.classes:
        raise DataError("; ".join((f"{place} has no class folders: expected {place}/CLASS/IMAGE.jpg", *notes)))
    if empty := sorted(name for name, paths in scan.classes.items() if not paths):
        where = listed(os.path.join(place, printable(name)) for name in empty)
        raise DataError(f"no images in {where}: remove the folder or add images ({' '.join(EXTENSIONS)})")
    return FolderImages(root, {name: sorted(scan.classes[name]) for name in sorted(scan.classes)})


class _Scan:
    """The files below a folder: each image once, and the files that are not used.

    Symbolic links are followed after everything else, so that a link never takes an image from the class that it is
    stored in. A link to a file or folder that was found before, or to a folder that contains the link, is not used.

    Attributes:
        classes: paths of the images relative to `root`, by class.
        ignored: number of files that are not images, by extension.
        unused: paths of other files and folders that are not used, by reason; "{s}" is for the plural.
    """

    def __init__(self, root: str):
        self.root, self.classes, self.ignored = root, dict[str, list[str]](), Counter[str]()
        self.unused: dict[str, list[str]] = defaultdict(list)
        self._seen: set[str] = set()  # real paths of folders and image files
        self._folders, self._links = deque([""]), deque[str]()
        while self._folders or self._links:
            linked = not self._folders
            path = self._links.popleft() if linked else self._folders.popleft()
            full = os.path.join(root, path)
            real = os.path.realpath(full)
            inside = os.path.join(os.path.realpath(os.path.dirname(full)), "")
            if real in self._seen or (linked and inside.startswith(os.path.join(real, ""))):
                self.unused["link{s} to what is counted already"].append(path)
            elif os.path.isfile(full):
                self._add_file(path, real)
            else:
                self._seen.add(real)
                if path and os.sep not in path:
                    self.classes[path] = []
                with blame(full), os.scandir(full) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        self._add_entry(entry, os.path.join(path, entry.name), os.path.join(real, entry.name))

    def _add_entry(self, entry: os.DirEntry[str], path: str, real: str) -> None:
        if left_by_programs(entry.name):
            if entry.is_dir():
                hidden = entry.name.startswith(".")
                self.unused["hidden folder{s}" if hidden else "folder{s} that a program left"].append(path)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                self.unused["hidden image{s}"].append(path)
        elif entry.is_symlink():
            (self._links if os.path.exists(entry.path) else self.unused["broken link{s}"]).append(path)
        elif entry.is_dir():
            self._folders.append(path)
        elif entry.is_file():
            self._add_file(path, real)

    def _add_file(self, path: str, real: str) -> None:
        extension = os.path.splitext(path)[1].lower()
        if extension not in EXTENSIONS:
            self.ignored[printable(extension) or "no extension"] += 1
        elif os.sep not in path:
            self.unused["image{s} outside the class folders"].append(path)
        else:
            self._seen.add(real)
            self.classes[path.split(os.sep, 1)[0]].append(path)

    def notes(self) -> Iterator[str]:
        """One line about each kind of files that are not used."""
        if self.ignored:
            kinds = sorted(self.ignored.items(), key=lambda kind: (-kind[1], kind[0]))
            listing = ", ".join(f"{kind} ({count})" for kind, count in kinds)
            yield f"ignored {counted(self.ignored.total(), 'file')}: {listing}"
        for package in sorted({REMEDIES[kind] for kind in self.ignored if kind in REMEDIES}):
            unread = " and ".join(kind for kind in sorted(self.ignored) if REMEDIES.get(kind) == package)
            yield f"{unread} can be read with: pip install '{package}'"
        for reason, paths in self.unused.items():
            what = reason.format(s="s" * (len(paths) != 1))
            yield f"ignored {len(paths):,} {what}, such as {printable(paths[0])}"
