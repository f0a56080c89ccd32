"""Copies are found, and others are not taken for copies."""

import io

import numpy as np
import torch
from PIL import Image

from trainer.audit.duplicates import duplicates, first_of
from trainer.audit.neighbours import Neighbours
from trainer.audit.prints import Print, take_print
from trainer.data.images import Images, to_rgb
from trainer.errors import DataError


class Held(Images):
    """Images in memory; None cannot be read."""

    def __init__(self, images):
        self.images, self.labels, self.classes = images, [0] * len(images), ("a",)

    def __getitem__(self, index):
        if self.images[index] is None:
            raise DataError("it is torn")
        return self.images[index]


def prints(*images):
    held = Held(list(images))
    return [take_print(held, index) for index in range(len(held))]


def photo(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)


def test_a_print_is_of_the_pixels_and_of_the_look():
    image = to_rgb(photo(0))
    one, same, shorter, other = prints(image, image.clone(), image[:, :-1], to_rgb(photo(1)))
    assert one == same
    assert one.pixels != shorter.pixels
    assert one.distance(one) == 0
    assert one.distance(other) > 40
    file = io.BytesIO()
    photo(0).resize((80, 60)).save(file, "JPEG", quality=60)
    assert one.distance(*prints(to_rgb(Image.open(file)))) <= 8
    (torn,) = prints(None)
    assert torn == Print(b"", b"", (), "it is torn")
    pair = torch.stack([image, image]).int() * 257
    assert prints(pair)[0].shape == (2, 3, 120, 160)


def test_equal_pixels_of_another_shape_are_no_copy():
    one, other = prints(torch.zeros(3, 2, 8, dtype=torch.uint8), torch.zeros(3, 8, 2, dtype=torch.uint8))
    assert one.pixels != other.pixels


def test_exact_copies_are_of_the_first():
    some = prints(*[to_rgb(photo(seed)) for seed in (0, 1, 0, 2, 0, 1)])
    assert first_of(some) == [0, 1, 0, 3, 0, 1]
    near = Neighbours.of(torch.eye(3))
    found = duplicates(some, near, [0, 1, 3], train=4)
    assert [(one.image, one.of, one.exact) for one in found] == [(2, 0, True), (4, 0, True), (5, 1, True)]


def test_few_digits_are_taken_for_copies(digits):
    """No digit is there twice: measured, 5 of 1,797 are taken for copies."""
    near = Neighbours.of(digits.features)
    found = duplicates(digits.prints, near, range(1797), train=digits.train)
    assert not any(one.exact for one in found)
    assert len(found) <= 5
    assert all(one.of < one.image for one in found)


def test_many_copies_do_not_hide_each_other():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(1, 64, generator=generator) + 0.02 * torch.randn(30, 64, generator=generator)
    near = Neighbours.of(torch.cat([torch.randn(60, 64, generator=generator), frames]))
    looks = [Print(bytes([index]), bytes(16), (3, 8, 8)) for index in range(90)]
    found = duplicates(looks, near, range(90), train=75)
    assert len({one.image for one in found if one.image >= 60}) == 29
    assert sum(one.of < 75 <= one.image for one in found) >= 10


def test_a_copy_in_training_counts_before_a_nearer_one_in_validation():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 64, generator=generator)
    features[30] = features[0] + 0.05 * torch.randn(64, generator=generator)
    features[31] = features[30] + 0.01 * torch.randn(64, generator=generator)
    looks = [Print(bytes([index]), bytes(16), (3, 8, 8)) for index in range(40)]
    found = duplicates(looks, Neighbours.of(features), range(40), train=30)
    assert sorted((one.image, one.of) for one in found) == [(30, 0), (31, 0)]
