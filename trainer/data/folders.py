"""Folders of images: what is found in them, and what is said of the rest."""

import glob
import logging
import os
from collections import Counter, defaultdict, deque

import numpy as np
from torch import Tensor

from trainer.data.images import EXTENSIONS, REMEDIES, Images, blame, decode, left_by_programs, printable
from trainer.errors import DataError
from trainer.text import counted, listed

# Said of validation images that are the test images.
CHOSEN_ON_TEST = ", on which the best epoch is chosen: its accuracy there is better than on images never seen"

VALIDATION_FOLDERS = ("val", "valid", "validation", "test")  # in order of preference

logger = logging.getLogger(__name__)


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
        return f"{super().stamp()} {self._side}"

    def shrink(self, side: int) -> None:
        self._side = side


def load_folder(folder: str) -> tuple[Images, Images | None]:
    """The training images of a folder and, where they are set apart, its validation images.

    Args:
        folder: holds `train/` and one of `val/ valid/ validation/ test/`, each with a folder per class, or just the
            folders of the classes.

    Raises:
        DataError: there are no class folders, or one of them is empty.
    """
    if not _has_folders(os.path.join(folder, "train")):  # a class may have that name, too
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
    return any(
        not left_by_programs(name[:-1]) for name in glob.glob("*/", root_dir=path)
    )  # no error if nothing is there


def _class_folders(root: str) -> FolderImages:
    """The images below the class folders of `root`: classes and files by name, every real file once.

    Symbolic links come after all that really lies here, so that a link never takes an image from its own class. One
    to something already counted, or up to a folder it lies in, adds nothing. Hidden names, and those that programs
    leave (see `left_by_programs`), are passed over.
    """
    classes: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    unused: dict[tuple[str, str], list[str]] = defaultdict(list)  # why, for one and for several -> paths
    folders, links = deque([""]), deque[str]()
    seen: set[str] = set()  # real paths of folders and image files

    def add(path: str, real: str) -> None:
        extension = os.path.splitext(path)[1].lower()
        if extension not in EXTENSIONS:
            ignored[printable(extension) or "no extension"] += 1
        elif os.sep not in path:
            unused["image outside the class folders", "images outside the class folders"].append(path)
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
            unused["link to what is counted already", "links to what is counted already"].append(path)
            continue
        if os.path.isfile(full):
            add(path, real)
            continue
        seen.add(real)
        if path and os.sep not in path:
            classes[path] = []
        with blame(full), os.scandir(full) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                child = os.path.join(path, entry.name)
                if left_by_programs(entry.name):
                    if entry.is_dir():
                        hidden = entry.name.startswith(".")
                        kind = "hidden folder" if hidden else "folder that a program left"
                        unused[kind, kind.replace("folder", "folders", 1)].append(child)
                    elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                        unused["hidden image", "hidden images"].append(child)
                    continue
                if entry.is_symlink():
                    (links if os.path.exists(entry.path) else unused["broken link", "broken links"]).append(child)
                elif entry.is_dir():
                    folders.append(child)
                elif entry.is_file():
                    add(child, os.path.join(real, entry.name))
    place, notes = printable(root), []
    if ignored:
        kinds = ", ".join(f"{kind} ({n})" for kind, n in sorted(ignored.items(), key=lambda kind: (-kind[1], kind[0])))
        notes.append(f"ignored {counted(ignored.total(), 'file')}: {kinds}")
        for package in sorted({REMEDIES[kind] for kind in ignored if kind in REMEDIES}):
            unread = " and ".join(kind for kind in sorted(ignored) if REMEDIES.get(kind) == package)
            notes.append(f"{unread} can be read with: pip install '{package}'")
    for (one, several), paths in unused.items():
        notes.append(f"ignored {len(paths):,} {one if len(paths) == 1 else several}, such as {printable(paths[0])}")
    for note in notes:
        logger.warning("%s: %s", place, note)
    if not classes:
        raise DataError("; ".join((f"{place} has no class folders: expected {place}/CLASS/IMAGE.jpg", *notes)))
    if empty := sorted(name for name, paths in classes.items() if not paths):
        where = listed(os.path.join(place, printable(name)) for name in empty)
        raise DataError(f"no images in {where}: remove the folder or add images ({' '.join(EXTENSIONS)})")
    return FolderImages(root, {name: sorted(classes[name]) for name in sorted(classes)})
