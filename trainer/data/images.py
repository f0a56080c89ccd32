"""Labelled images with random access; decoding of image files, with EXIF rotation, to tensors."""

import contextlib
import errno
import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from trainer.errors import DataError, UsageError

with contextlib.suppress(ImportError):  # an optional package: HEIC, the photos of telephones
    import pillow_heif  # pyright: ignore[reportMissingImports]  # optional

    pillow_heif.register_heif_opener()

# Formats with an optional decoder: the package to install, the extensions, and whether the decoder is here.
_OPTIONAL = {
    "AVIF": ("pillow>=11.3", (".avif",), features.check("avif")),
    "HEIF": ("pillow-heif", (".heic", ".heif"), "HEIF" in Image.OPEN),
}
REMEDIES = {name: package for package, names, here in _OPTIONAL.values() if not here for name in names}
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EXTENSIONS += tuple(name for _, names, here in _OPTIONAL.values() if here for name in names)

# Folders of thumbnails, deleted files and copies that network drives, archives and systems create.
_LEFT_BY_PROGRAMS = {"@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"}
_LEFT_BY_PROGRAMS |= {"__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found", "thumbs.db"}

# Pillow warns about large images and odd metadata, which are harmless; an image that cannot be decoded is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")


def left_by_programs(name: str) -> bool:
    """Whether a folder or file is hidden, or was left by a program, such as `@eaDir` or `__MACOSX`, by its name."""
    return name.startswith(".") or name.lower() in _LEFT_BY_PROGRAMS


class Images:
    """Labelled images with random access. Subclass it for your own data; each DataLoader worker has a copy.

    Attributes:
        classes: names of the classes; may be empty if labels are not classes.
        labels: the class of each image, as an index into `classes` (a list of int); or a tensor `[N, ...]`: float
            `[N]` for one number per image, float `[N, K]` for several classes (1 where the image shows class k) or for
            K numbers, or any other shape.
        origin: for validation images, where they come from, as text for the console; "" if unknown.
    """

    classes: tuple[str, ...] = ()
    labels: list[int] | Tensor
    origin: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        """Decode an image.

        Returns:
            uint8 `[3, H, W]`, RGB, in its original size. A subclass may return `[..., C, H, W]` of any dtype, such as
            a pair `[2, 3, H, W]`; see `InputSpec.max_value`.

        Raises:
            DataError: the image cannot be read.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The name of an image in messages, such as its path or `CIFAR10 train[17]`; always printable."""
        return f"{type(self).__name__}[{index}]"

    def key(self, index: int) -> str:
        """A name that is the same on every machine, wherever the data is stored."""
        return self.name(index)

    def path(self, index: int) -> str | None:
        """The file of an image; None if it has none. Replaced files are noticed, see `stamp` and `content`."""
        return None

    def digest(self) -> str:
        """16 hex digits of a sha256 of classes, labels and keys: the same on machines with the same data."""
        if isinstance(self.labels, Tensor):
            sha256 = hashlib.sha256(repr((self.classes, self.labels.dtype, tuple(self.labels.shape))).encode())
            sha256.update(label_bytes(self.labels))
        else:
            sha256 = hashlib.sha256(repr((self.classes, self.labels)).encode())
        for index in range(len(self)):
            sha256.update(self.key(index).encode() + b"\n")
        return sha256.hexdigest()[:16]

    def stamp(self) -> str:
        """A sha256 that changes with `digest`, or with the size or time of a file; part of the key of kept features."""
        sha256 = hashlib.sha256(self.digest().encode())
        for path in filter(None, map(self.path, range(len(self)))):
            status = os.stat(path)
            sha256.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return sha256.hexdigest()

    def shrink(self, side: int) -> None:
        """Allow large images to be decoded smaller from now on, with a shorter side of at least `side` pixels."""


class Subset(Images):
    """The images at `indices` of other images, in this order."""

    def __init__(self, images: Images, indices: Iterable[int]):
        self.images, self.indices = images, list(indices)
        labels = images.labels
        if isinstance(labels, Tensor):
            self.labels = labels[self.indices]
        else:
            self.labels = [labels[index] for index in self.indices]
        self.classes = images.classes

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.indices[index]]

    def name(self, index: int) -> str:
        return self.images.name(self.indices[index])

    def key(self, index: int) -> str:
        return self.images.key(self.indices[index])

    def path(self, index: int) -> str | None:
        return self.images.path(self.indices[index])

    def stamp(self) -> str:
        return hashlib.sha256(repr((self.images.stamp(), self.indices)).encode()).hexdigest()

    def shrink(self, side: int) -> None:
        self.images.shrink(side)


def label_bytes(labels: Tensor) -> bytes:
    """The bytes of a tensor of labels, for a hash."""
    return labels.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if labels.numel() else b""


# Pillow's parsers that may read a file, whatever its name. Others run programs (EPS) or need more than the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", *(name for name in _OPTIONAL if _OPTIONAL[name][2]))
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIF")
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


def decode(
    path_or_file: str | os.PathLike[str] | BinaryIO, *, side: int | None = None, channels: int = 3, depth: int = 8
) -> Tensor:
    """Decode the first frame of an image file, and rotate it as its EXIF orientation says.

    Reads JPEG, PNG, WebP, BMP, TIFF and GIF, recognised by content; AVIF and HEIC if Pillow, or the package
    pillow-heif, has a decoder. See `to_rgb` for transparency and other modes.

    Args:
        path_or_file: a path or an open binary file.
        side: smallest shorter side, pixels. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side stays
            at least as long: several times faster, and nearly the same as decoding and shrinking. None: full size.
        channels: 1 for grey, 3 for RGB, 4 for RGB with alpha.
        depth: 8, or 16 for scans, microscopes and depth cameras. 16 keeps the values of a 16-bit grey file (12-bit
            values too: set `InputSpec.max_value`), and scales 8-bit values, so that 255 becomes 65535.

    Returns:
        `[channels, H, W]`: uint8, or int32 from 0 to 65535 with `depth=16`.

    Raises:
        DataError: the file is missing, damaged, of another kind, 16-bit colour with `depth=16`, or above Pillow's limit
            against decompression bombs (178,956,970 pixels); has the path and Pillow's reason.
        OSError: an error of the machine, such as too many open files.
        UsageError: another number of channels, or another depth.
    """
    if channels not in (1, 3, 4) or depth not in (8, 16):
        raise UsageError(f"decode: channels is {channels} and depth is {depth}; expected 1, 3 or 4, and 8 or 16.")
    # With Pillow, because torchvision 0.29 deprecates its own decoders.
    is_path = isinstance(path_or_file, (str, os.PathLike))
    name = path_or_file if is_path else str(getattr(path_or_file, "name", "the given file"))
    with blame(name), _open(path_or_file) as image:
        if side is not None and image.format == "JPEG":
            factor = max(side / min(image.size), 1e-9)
            image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))
        key, raw = image.info.get("transparency"), _raw_mode(image)
        if image.format == "PNG" and key is not None:  # Pillow scales pixels to 8 bits, but not this colour
            if raw in ("L;2", "L;4"):
                image.info["transparency"] = key * 255 // (2 ** int(raw[-1]) - 1)
            elif raw == "RGB;16B":
                image.info["transparency"] = tuple(value >> 8 for value in key)
        if depth == 16 and ";16" in raw and not image.mode.startswith("I"):
            raise DataError("16-bit colour, of which only 8 bits can be read: store it as grey, or decode with depth=8")
        return _to_tensor(image, channels, depth)


def to_rgb(image: Image.Image) -> Tensor:
    """Convert a Pillow image of any mode to uint8 `[3, H, W]`, RGB.

    The EXIF orientation is applied. Transparent pixels are blended with white. CMYK is converted without a colour
    profile. 16-bit values are scaled to 8 bits: 65535 becomes 255.

    Raises:
        DataError: floating-point pixels, or 32-bit integers outside of 0 to 65535.
    """
    return _to_tensor(image, 3, 8)


def _to_tensor(image: Image.Image, channels: int, depth: int) -> Tensor:
    """`[channels, H, W]`, as `decode` returns it."""
    image = _rotated_by_exif(image)
    if image.mode == "F":
        raise DataError("floating-point pixels: expected 8 or 16 bits per channel, convert the file first")
    if image.mode.startswith("I"):  # Pillow's own conversion saturates: nearly all of a 16-bit scan would be white
        grey = _grey16(image) if depth == 16 else ((_grey16(image) + 128) // 257).astype(np.uint8)
        opaque = np.full_like(grey, 65535 if depth == 16 else 255)
        pixels = np.stack([grey] * min(channels, 3) + [opaque] * (channels == 4), axis=2)
        return torch.from_numpy(pixels).permute(2, 0, 1)
    if channels == 4:
        image = image.convert("RGBA")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(rgba, mask=rgba)
    elif image.mode != "RGB" and (channels, image.mode) != (1, "L"):
        image = image.convert("RGB")
    if channels == 1:
        image = image.convert("L")
    # [channels, H, W] in the memory of [H, W, channels]: v2 crops that 3 times faster.
    pixels = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
    return pixels.int() * 257 if depth == 16 else pixels


def _open(path_or_file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    try:
        return Image.open(path_or_file, formats=_FORMATS)
    except UnidentifiedImageError:
        is_path = isinstance(path_or_file, str | os.PathLike)
        with open(path_or_file, "rb") if is_path else contextlib.nullcontext(path_or_file) as file:
            file.seek(0)
            head = file.read(12)
        kind = _BRANDS.get(head[8:12], "") if head[4:8] == b"ftyp" else ""
        if kind and not _OPTIONAL[kind][2]:
            raise DataError(f"it can be read with: pip install '{_OPTIONAL[kind][0]}'") from None
        raise


def _rotated_by_exif(image: Image.Image) -> Image.Image:
    """The image with its pixels loaded, turned or mirrored as its EXIF orientation says."""
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF does not make the pixels worse
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _grey16(image: Image.Image) -> np.ndarray:
    """The pixels of a 16-bit or 32-bit grey image as int32 `[H, W]`, 0 to 65535; transparent ones become white."""
    grey = np.asarray(image).astype(np.int64)
    if grey.size and not 0 <= grey.min() <= grey.max() <= 65535:
        raise DataError(f"32-bit pixels from {grey.min()} to {grey.max()}: expected 0 to 65535, convert the file first")
    grey[grey == image.info.get("transparency", -1)] = 65535
    return grey.astype(np.int32)


def _raw_mode(image: Image.Image) -> str:
    """The layout of the pixels in the file of an image, such as "RGB;16B"; "" if unknown. To be read before `load`."""
    tile = getattr(image, "tile", None)
    return str(tile[0][3]) if tile else ""


@contextlib.contextmanager
def blame(culprit: Any) -> Iterator[None]:
    """Raise an error inside as a `DataError` about `culprit`, unless the machine or a missing package is the cause."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # Pillow's parsers raise a dozen types on damaged files
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        raise DataError(f"cannot read {printable(culprit)}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The text of an error in one line; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(path: Any) -> str:
    """A path or name for messages; bytes that are not UTF-8, newlines and the like are escaped."""
    text = os.fsencode(os.fspath(path)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
