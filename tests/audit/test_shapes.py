"""What the crop leaves."""

import pytest
import torch
from torchvision.transforms import v2

from trainer.audit.shapes import cut_away, visible
from trainer.data.transforms import InputSpec

CROP = InputSpec(56, 64).eval_transform()


@pytest.mark.parametrize(
    ("transform", "shape", "share"),
    [
        (CROP, (3, 100, 100), (56 / 64) ** 2),
        (CROP, (3, 100, 300), (56 / 64) ** 2 / 3),
        (CROP, (2, 3, 300, 100), (56 / 64) ** 2 / 3),
        (CROP, (3, 40, 40), (56 / 64) ** 2),
        (v2.Resize([56, 56]), (3, 100, 300), 1.0),  # squeezed, not cut
    ],
)
def test_the_share_that_is_seen(transform, shape, share):
    like = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert visible(transform, shape, like=like, most=255.0) == pytest.approx(share, abs=0.06)


def test_images_of_which_more_than_half_is_cut_away():
    shapes = [(3, 64, 64), (3, 64, 128), (3, 64, 300), (3, 64, 80)]
    found = cut_away(CROP, shapes, like=torch.zeros(3, 8, 8), most=1.0)
    assert [image for image, _ in found] == [2, 1]
