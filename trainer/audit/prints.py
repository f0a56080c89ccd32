"""Fingerprints of images: of their pixels, and of how they look."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from torchvision.transforms import v2

from trainer.data.bad_images import look_at_all
from trainer.data.images import Images
from trainer.data.loader import Workers
from trainer.errors import DataError


class Print(NamedTuple):
    """What is kept of an image.

    Attributes:
        pixels: a hash of the decoded pixels, 16 bytes.
        look: a difference hash, 16 bytes: whether each of 8 x 8 places is lighter than its left, and its upper
            neighbour, in the image of 9 x 9 pixels.
        shape: `[..., C, H, W]`.
        error: why it cannot be read; "" if it can be.
    """

    pixels: bytes
    look: bytes
    shape: tuple[int, ...]
    error: str = ""

    def distance(self, other: "Print") -> int:
        """How many of the 128 bits of two looks differ."""
        return (int.from_bytes(self.look) ^ int.from_bytes(other.look)).bit_count()


def take_print(images: Images, index: int) -> Print:
    """The print of one image; of one that cannot be read, the reason."""
    try:
        image = images[index]
    except DataError as error:
        return Print(b"", b"", (), str(error))
    pixels = hashlib.blake2b(repr((image.dtype, tuple(image.shape))).encode(), digest_size=16)
    pixels.update(image.contiguous().numpy().tobytes())
    small = v2.functional.resize(image, [9, 9], antialias=True).float().flatten(0, -3).mean(dim=0)  # [9, 9]
    bits = [(small[:8, 1:] > small[:8, :8]).flatten(), (small[1:, :8] > small[:8, :8]).flatten()]
    return Print(pixels.digest(), np.packbits(np.concatenate(bits)).tobytes(), tuple(image.shape))


def take_prints(accelerator: Accelerator, parts: Sequence[Images], *, workers: Workers) -> list[list[Print]]:
    """The print of each image of each part, the same on every process (a collective)."""
    return look_at_all(accelerator, parts, take_print, workers)
