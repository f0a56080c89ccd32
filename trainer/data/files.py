"""Images from a list of files, such as a table or a script of your own has."""

import os
from collections.abc import Callable, Sequence

from torch import Tensor

from trainer.data.images import Images, Subset, decode, printable


class FileImages(Images):
    """Image files with labels.

    Args:
        files: their paths.
        labels: one for each file, see `Images`.
        classes: names of the classes; empty if labels are not classes.
    """

    def __init__(
        self, files: Sequence[str | os.PathLike[str]], labels: list[int] | Tensor, classes: Sequence[str] = ()
    ):
        self.files, self.labels, self.classes = [os.fspath(file) for file in files], labels, tuple(classes)

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.files[index])

    def path(self, index: int) -> str | None:
        return self.files[index]

    def name(self, index: int) -> str:
        return printable(self.files[index])

    def key(self, index: int) -> str:
        return printable(os.path.basename(self.files[index]))


class Decoded(Subset):
    """Image files that are decoded in another way: grey, 16 bits, or a format of your own.

    Args:
        images: images that have a `path`.
        decode: a function from a path to `[C, H, W]`, such as `functools.partial(trainer.decode, channels=1)`.
    """

    def __init__(self, images: Images, decode: Callable[[str], Tensor]):
        super().__init__(images, range(len(images)))
        self.decode = decode

    def __getitem__(self, index: int) -> Tensor:
        path = self.path(index)
        assert path is not None, "images without files"
        return self.decode(path)
