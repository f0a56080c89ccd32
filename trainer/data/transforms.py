"""Transforms from a decoded image to the input of a model: resize, crop, augment, normalise."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from trainer.data.images import decode
from trainer.data.sampling import kept_randomness, random_key, seed_all
from trainer.errors import UsageError

AUGMENTATIONS = ("none", "flip", "crop")

# An image with a longer ratio of its sides is cut at both ends, outside of the centre crop, before it is resized:
# 20,000 x 1 pixels would be resized to 5 million x 256.
LONGEST = 100


@dataclass(frozen=True)
class InputSpec:
    """How images are prepared for a model.

    Attributes:
        size: side of the square crop, pixels.
        resize: length of the shorter side before the centre crop, pixels.
        mean: one number per channel, for pixel values from 0 to 1; their number is the number of channels.
        std: one number per channel, in the same unit.
        interpolation: "bilinear" or "bicubic".
        max_value: the pixel value that counts as 1: 255 for 8 bits, 65535 for 16, 4095 for 12, 1.0 for floats from 0
            to 1.
    """

    size: int
    resize: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    max_value: float = 255.0

    @classmethod
    def square(cls, size: int, **values: Any) -> "InputSpec":
        """For a module of your own: crops of `size` pixels from images whose shorter side is 256/224 times as long."""
        return cls(size, round(size * 256 / 224), **values)

    def decode(self, path_or_file: Any) -> Tensor:
        """Decode an image file with the channels and the depth that the model takes; see `images.decode`.

        Raises:
            DataError: the file cannot be read.
            UsageError: the model takes pixels that no file has.
        """
        if self.max_value < 255:
            raise UsageError(f"the model takes pixels up to {self.max_value:g}, a file has others: give tensors.")
        return decode(path_or_file, channels=len(self.mean), depth=8 if self.max_value == 255 else 16)

    def train_transform(self, augment: str) -> Callable[[Tensor], Tensor]:
        """The transform of training images: `[..., C, H, W]` to `[..., C, size, size]`, of the same dtype.

        All leading dimensions have the same random crop, so the two images of a pair stay aligned.

        Args:
            augment: "none": as `eval_transform`; "flip": also mirrors every second image; "crop": a random crop of 8 to
                100 % of the area with sides from 3:4 to 4:3 (`resize` is not used), mirrored every second time; "auto",
                the setting if nobody has chosen, is "crop".

        Raises:
            UsageError: another `augment`.
        """
        if augment == "none":
            return self.eval_transform()
        if augment == "flip":
            return v2.Compose([self.eval_transform(), v2.RandomHorizontalFlip()])
        if augment in ("crop", "auto"):
            crop = v2.RandomResizedCrop(self.size, interpolation=InterpolationMode(self.interpolation), antialias=True)
            return v2.Compose([crop, v2.RandomHorizontalFlip()])
        raise UsageError(f"augment is {augment!r}; expected one of {', '.join(AUGMENTATIONS)}.")

    def eval_transform(self) -> Callable[[Tensor], Tensor]:
        """Resize the shorter side to `resize` pixels, then cut the centre: `[..., C, H, W]` to `[..., C, size, size]`.

        The values differ by at most 1 of 255 from those of torchvision's presets on a Pillow image. (On a tensor the
        presets resize in float, which takes eight times as long.) Of an image more than 100 times as long as wide only
        the central part is resized.
        """
        shrink = v2.Resize(self.resize, interpolation=InterpolationMode(self.interpolation), antialias=True)
        return v2.Compose([_Shorten(), shrink, v2.CenterCrop(self.size)])

    def normalize(self, device: torch.device | str | None = None) -> "Normalize":
        """The normalisation for this model, on a device (None: the CPU)."""
        return Normalize(self.mean, self.std, max_value=self.max_value).to(device)


def is_random(transform: Callable[[Tensor], Tensor], *images: Tensor) -> bool:
    """Whether a transform depends on random numbers.

    The transform is applied to each image with two seeds. It is random if the results differ, or if it has drawn from
    `random`, `numpy.random` or torch's CPU generator, so a rare event such as one flip in a thousand is found too.

    Args:
        transform: of one image.
        images: a few images, `[..., C, H, W]`.
    """
    with kept_randomness():
        for image in images:
            results = []
            for key in (random_key("is_random", 0), random_key("is_random", 1)):
                seed_all(key, devices=False)
                before = _generators()
                results.append(transform(image.clone()))
                if _generators() != before:
                    return True
            if not torch.equal(*results):
                return True
    return False


def visible(image: Tensor) -> Tensor:
    """An image of any channels and depth, or the first of several, `[..., C, H, W]`, as a picture: uint8 `[3, H, W]`.

    Of more than 8 bits, it is as bright as its brightest pixel allows.
    """
    image = image.flatten(0, -4)[0] if image.ndim > 3 else image
    image = (image[:3] if len(image) > 2 else image[:1]).expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return image
    image = image.float() - image.min()
    return (image * (255 / image.max().clamp(min=1e-9))).to(torch.uint8)


def check_pixels(name: str, image: Tensor, transform: Callable[[Tensor], Tensor], *, spec: InputSpec) -> None:
    """Check one image as a recipe reads and transforms it: most mistakes here are silent, and spoil what is learned.

    Args:
        name: of the image.
        image: as it was decoded.
        transform: of the recipe.
        spec: of the model.

    Raises:
        UsageError: its channels, depth or type are not those of the model; or a seed does not decide what is random.
    """
    if not isinstance(image, Tensor):
        raise UsageError(f"the image {name} is {type(image).__name__}; expected a tensor [C, H, W].")
    results = []
    with kept_randomness():
        for _ in range(2):
            seed_all(random_key("check_pixels"), devices=False)
            results.append(transform(image.clone()))
    if not torch.equal(*results):
        raise UsageError(
            "transforms() of the recipe makes different images with the same seed, and a run could not be resumed "
            "exactly: draw from random, numpy.random or torch, not from a generator of your own."
        )
    result = results[0]
    channels, whole = len(spec.mean), not result.is_floating_point()
    if result.shape[-3] != channels:
        raise UsageError(
            f"{name} has {result.shape[-3]} channel(s), and the model takes {channels}: change images() and "
            "model() of the recipe together. The mean of the model's InputSpec has a number for each channel."
        )
    if whole and (result.max() > spec.max_value or (result.dtype == torch.uint8) != (spec.max_value <= 255)):
        raise UsageError(
            f"{name} is {result.dtype} with pixels up to {result.max()}, and the model takes them up to "
            f"{spec.max_value:g}: the max_value of its InputSpec is 255 for 8 bits, and 65535 for 16."
        )
    if not whole and not image.is_floating_point() and spec.max_value > 1:
        raise UsageError(
            f"transforms() of the recipe made {result.dtype} of {image.dtype}; expected the same. Pixels are divided "
            f"by {spec.max_value:g} and normalised after it: omit ToDtype and Normalize. Values of your own: InputSpec."
        )


class Normalize(nn.Module):
    """Images to float32, normalised per channel: (x / max_value - mean) / std.

    Takes `[B, C, H, W]`, or any other leading dimensions, of any dtype, and returns the same shape on the same device,
    in channels_last format, which the convolutions of trunk and tail keep. One multiply-add per value; its constants
    are not in state dicts.

    Args:
        mean: one number per channel, for pixel values from 0 to 1.
        std: one number per channel, in the same unit.
        max_value: the pixel value that counts as 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, max_value: float = 255):
        super().__init__()
        centre, width = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
        self.register_buffer("scale", (1 / (max_value * width)).float(), persistent=False)
        self.register_buffer("shift", (-centre / width).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4:  # views, pairs or a single image
            leading = images.shape[:-3]
            return self(images.reshape(-1, *images.shape[-3:])).reshape(*leading, *images.shape[-3:])
        width, channels = images.shape[3], images.shape[1]
        rows = images.permute(0, 2, 3, 1).flatten(2)  # [B, H, W·C]: long rows are faster
        scale, shift = (self.get_buffer(name).flatten().repeat(width) for name in ("scale", "shift"))
        rows = rows.to(torch.float32, copy=True)
        torch.addcmul(shift, rows, scale, out=rows)  # in place, because new memory takes longer than the arithmetic
        return rows.unflatten(2, (width, channels)).permute(0, 3, 1, 2)


class _Shorten(nn.Module):
    """Cuts an image to its central part if it is more than `LONGEST` times as long as wide."""

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        longest = LONGEST * min(height, width)
        for axis, length in ((-2, height), (-1, width)):
            if length > longest:
                kept = longest + (length - longest) % 2  # keeps the centre where it is, to half a pixel
                image = image.narrow(axis, (length - kept) // 2, kept)
        return image


def _generators() -> tuple[object, ...]:
    """The states of the random generators that a transform may use, as values that can be compared."""
    _, words, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (np.asarray(words).tobytes(), *rest), torch.get_rng_state().numpy().tobytes()
