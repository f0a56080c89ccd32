"""How much of an image the model sees."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_LEAST = 0.5  # of the area


def visible(transform: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, like: Tensor, most: float) -> float:
    """The share of an image's area that a transform keeps, 0 to 1: seen on ramps of brightness.

    It is a little too large for an image of few pixels, whose edges no ramp reaches.

    Args:
        transform: `[..., C, H, W]` to `[..., C, S, S]`, not random.
        shape: of the image.
        like: another image, for the type of its values.
        most: the value of a pixel that counts as 1.
    """
    share = 1.0
    for axis in (-2, -1):
        ramp = torch.linspace(0, most, shape[axis]).to(like.dtype)
        seen = transform((ramp[:, None] if axis == -2 else ramp).expand(shape).clone()).float()
        share *= float(seen.max() - seen.min()) / most if shape[axis] > 1 else 1.0
    return min(share, 1.0)


def cut_away(
    transform: Callable[[Tensor], Tensor], shapes: list[tuple[int, ...]], *, like: Tensor, most: float
) -> list[tuple[int, float]]:
    """The images of which more than half is cut away, with the share that is left; the least first."""
    share = cache(lambda shape: visible(transform, shape, like=like, most=most))
    found = [(image, share(shape)) for image, shape in enumerate(shapes)]
    return sorted((entry for entry in found if entry[1] < _LEAST), key=lambda entry: entry[1])
