"""Labelled images with random access, and how an image file becomes pixels."""

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

# Formats that are read only where Pillow, or pillow-heif, has a decoder: the package that brings it, and their names.
_OPTIONAL = {
    "AVIF": ("pillow>=11.3", (".avif",), features.check("avif")),
    "HEIF": ("pillow-heif", (".heic", ".heif"), "HEIF" in Image.OPEN),
}
REMEDIES = {name: package for package, names, here in _OPTIONAL.values() if not here for name in names}
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EXTENSIONS += tuple(name for _, names, here in _OPTIONAL.values() if here for name in names)

# What network drives, archives and systems put between one's own folders: thumbnails, deleted files, copies.
_LEFT_BY_PROGRAMS = {"@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"}
_LEFT_BY_PROGRAMS |= {"__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found", "thumbs.db"}

# A large image or odd metadata is no news to the owner of the photo, and what cannot be decoded is an error anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


def left_by_programs(name: str) -> bool:
    """Whether a folder or file of this name is no data: hidden, or left by a program, such as `@eaDir`, `__MACOSX`."""
    return name.startswith(".") or name.lower() in _LEFT_BY_PROGRAMS


class Images:
    """Labelled images with random access. Subclass it for data of your own; DataLoader workers get a copy.

    Attributes:
        classes: their names; may be empty where labels are not classes.
        labels: of each image a class, as an index into `classes` (a list of int); or a tensor `[N, ...]` of values:
            `[N]` float for a number each, `[N, K]` float for several classes (1 where the image shows class k) or K
            numbers, and any other shape.
        origin: of validation images: where they come from, for the console; "" if unknown.
    """

    classes: tuple[str, ...] = ()
    labels: list[int] | Tensor
    origin: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        """The decoded image.

        Returns:
            uint8 `[3, H, W]`, RGB, in its own size; or, in your own subclass, `[..., C, H, W]` of any dtype, such as
            a pair `[2, 3, H, W]`: see `InputSpec.max_value`.

        Raises:
            DataError: it cannot be read.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call the image, such as its path or `CIFAR10 train[17]`. Always printable."""
        return f"{type(self).__name__}[{index}]"

    def key(self, index: int) -> str:
        """The image's name for a machine: the same wherever the data lies."""
        return self.name(index)

    def path(self, index: int) -> str | None:
        """The file of the image, by which a replaced one is noticed (see `content`); None where it has none."""
        return None

    def digest(self) -> str:
        """A sha256 of the classes, labels and file names: the same on machines that hold the same data."""
        if isinstance(self.labels, Tensor):
            sha256 = hashlib.sha256(repr((self.classes, self.labels.dtype, tuple(self.labels.shape))).encode())
            sha256.update(label_bytes(self.labels))
        else:
            sha256 = hashlib.sha256(repr((self.classes, self.labels)).encode())
        for index in range(len(self)):
            sha256.update(self.key(index).encode() + b"\n")
        return sha256.hexdigest()[:16]

    def stamp(self) -> str:
        """As `digest`, and it changes when a file does: features that were kept are found again by it."""
        return self.digest()

    def shrink(self, side: int) -> None:
        """From now on large images may come smaller, with a shorter side of `side` pixels at least: see `decode`."""


class Subset(Images):
    """The images at `indices` of another source, in that order."""

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
    """The values of a tensor of labels, for a hash."""
    return labels.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if labels.numel() else b""


# Only these of Pillow's parsers see a file, whatever its name: others run programs (EPS) or need more than a file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", *(name for name in _OPTIONAL if _OPTIONAL[name][2]))
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIF")
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


def decode(
    path_or_file: str | os.PathLike[str] | BinaryIO, *, side: int | None = None, channels: int = 3, depth: int = 8
) -> Tensor:
    """The first frame of an image file.

    JPEG, PNG, WebP, BMP, TIFF and GIF, told by their content, not by their name; AVIF and HEIC where Pillow can, or
    the package pillow-heif. EXIF orientation is applied; see `to_rgb` for transparency and other modes.

    Args:
        path_or_file: a path or an open binary file.
        side: pixels. A JPEG comes at 1/2, 1/4 or 1/8 of its size if its shorter side still has as many: its decoder
            omits the rest, which is several times faster and only nearly the same as decoding and shrinking. None:
            in its own size.
        channels: 1 for grey, 3 for RGB, 4 for RGB with alpha.
        depth: 8, or 16 for scans, microscopes and depth cameras: the values of a 16-bit grey file as they are (12-bit
            values too: tell their range by `InputSpec.max_value`); 8-bit values are scaled, so that 255 is 65535.

    Returns:
        `[channels, H, W]`: uint8, or int32 from 0 to 65535 with `depth=16`.

    Raises:
        DataError: with the path and Pillow's reason: missing, cut off, of another kind, 16-bit colour with `depth=16`,
            or above Pillow's limit for decompression bombs (178,956,970 pixels).
        OSError: an error of the machine, such as too many open files.
        UsageError: another number of channels, or another depth.
    """
    if channels not in (1, 3, 4) or depth not in (8, 16):
        raise UsageError(f"decode: channels is {channels}, depth {depth}: expected 1, 3 or 4, and 8 or 16")
    # By Pillow: torchvision 0.29 deprecates its own decoders.
    is_path = isinstance(path_or_file, (str, os.PathLike))
    with (
        blame(path_or_file if is_path else str(getattr(path_or_file, "name", "the given file"))),
        _open(path_or_file) as image,
    ):
        if side is not None and image.format == "JPEG":
            factor = max(side / min(image.size), 1e-9)
            image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))
        key = image.info.get("transparency")
        if image.format == "PNG" and key is not None:  # Pillow scales the pixels to 8 bits, but not this colour
            raw = _raw_mode(image)
            if raw in ("L;2", "L;4"):
                image.info["transparency"] = key * 255 // (2 ** int(raw[-1]) - 1)
            elif raw == "RGB;16B":
                image.info["transparency"] = tuple(value >> 8 for value in key)
        return to_rgb(image) if (channels, depth) == (3, 8) else _to_channels(image, channels, depth)


def to_rgb(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as uint8 [3, H, W], RGB.

    EXIF orientation is applied. Transparency is composited over white. CMYK is converted without a colour profile.
    16-bit samples become 8-bit by scaling: 65535 is 255.

    Raises:
        DataError: a mode with no such range: floats, and 32-bit integers outside of 0..65535.
    """
    image = _upright(image)
    if image.mode.startswith("I"):  # Pillow's own conversion saturates: nearly all of a 16-bit scan would be white
        grey = _grey16(image)
        pixels = np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba)
        pixels = np.array(canvas)
    else:
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # which would make a copy
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W], still interleaved: v2 crops that 3 times faster


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


def _upright(image: Image.Image) -> Image.Image:
    """The image with its pixels loaded and its EXIF orientation applied; DataError for floating-point pixels."""
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF does not make the pixels worse
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise DataError("floating-point pixels: expected 8 or 16 bits per channel, convert the file first")
    return image


def _grey16(image: Image.Image) -> np.ndarray:
    """The pixels of a 16-bit or 32-bit grey image as int64 [H, W], 0 to 65535; the transparent ones white."""
    grey = np.asarray(image).astype(np.int64)
    if grey.size and not 0 <= grey.min() <= grey.max() <= 65535:
        raise DataError(f"32-bit pixels from {grey.min()} to {grey.max()}: expected 0 to 65535, convert the file first")
    grey[grey == image.info.get("transparency", -1)] = 65535
    return grey


def _raw_mode(image: Image.Image) -> str:
    """How the file of an image holds its pixels, such as "RGB;16B"; empty if it is not known."""
    tile = getattr(image, "tile", None)
    return str(tile[0][3]) if tile else ""


def _to_channels(image: Image.Image, channels: int, depth: int) -> Tensor:
    """A Pillow image as [channels, H, W]: uint8, or int32 with the values of 16 bits."""
    raw = _raw_mode(image)
    if depth == 16 and ";16" in raw and not image.mode.startswith("I"):
        raise DataError("16-bit colour, of which only 8 bits can be read: store it as grey, or decode with depth=8")
    image = _upright(image)
    if image.mode.startswith("I"):
        grey = torch.from_numpy(_grey16(image))  # [H, W]
        grey = grey.int() if depth == 16 else ((grey + 128) // 257).to(torch.uint8)
        pixels = grey.expand(min(channels, 3), *grey.shape)
        alpha = torch.full_like(grey, 65535 if depth == 16 else 255)[None]
        return torch.cat([pixels, alpha]) if channels == 4 else pixels.contiguous()
    if channels == 4:
        pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1)
    else:
        pixels = to_rgb(image)
        if channels == 1:
            grey = image if image.mode == "L" else Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
            pixels = torch.from_numpy(np.array(grey))[None]
    return pixels.int() * 257 if depth == 16 else pixels


@contextlib.contextmanager
def blame(culprit: Any) -> Iterator[None]:
    """Whatever goes wrong inside is a `DataError` about `culprit`, unless it is the machine's or a package's fault."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # Pillow's parsers raise a dozen types on damaged files
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        raise DataError(f"cannot read {printable(culprit)}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def printable(path: Any) -> str:
    """A path or name for messages: bytes that are not UTF-8, newlines and the like are escaped."""
    text = os.fsencode(os.fspath(path)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
