"""Odd images are told from ordinary ones."""

import torch

from trainer.audit import features_of
from trainer.audit.outliers import outliers
from trainer.config import SpeedConfig
from trainer.data.images import Images
from trainer.model.classifiers import build_model
from trainer.processes.startup import finish, start


class Odd(Images):
    """Noise, and a ramp."""

    classes, labels = ("odd",), [0, 0]

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
        return noise if index == 0 else torch.linspace(0, 255, 8).to(torch.uint8).expand(3, 8, 8).contiguous()


def test_noise_and_a_ramp_are_not_digits(digits):
    classifier = build_model("resnet18", 10, weights="none", image_size=64)
    config = SpeedConfig(compile="off")
    odd = features_of(start(), classifier, [Odd()], transform=digits.transform, config=config)
    finish()
    found = outliers(torch.cat([digits.features, odd]))
    assert {image for image, _ in found} == {1797, 1798}
    assert outliers(digits.features) == []


def test_too_few_images_have_no_outliers():
    assert outliers(torch.eye(6)) == []
    assert outliers(torch.ones(20, 3)) == []
