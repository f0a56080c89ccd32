"""Transforms: the values of torchvision's presets, and randomness from torch alone."""

import pickle

import pytest
import torch
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from trainer.data.transforms import InputSpec, Normalize, visible
from trainer.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize(
    ("height", "width", "size", "resize"), [(75, 100, 56, 64), (33, 20, 24, 24), (9, 9, 24, 28), (40, 40, 32, 20)]
)
def test_evaluation_is_the_preset_on_a_pillow_image_but_for_rounding(height, width, size, resize, interpolation):
    preset = ImageClassification(crop_size=size, resize_size=resize, interpolation=interpolation, mean=MEAN, std=STD)
    image = picture(height, width)
    result = InputSpec(size, resize, interpolation=interpolation.value).eval_transform()(image)
    assert result.dtype == torch.uint8
    assert result.shape == (3, size, size)
    std = torch.tensor(STD).view(3, 1, 1)
    away = (Normalize(MEAN, STD)(result[None])[0] - preset(functional.to_pil_image(image))) * std * 255
    assert away.abs().max() < 1.01
    assert (away.abs() > 0.5).float().mean() < 0.3


def test_normalize():
    normalize = Normalize(MEAN, STD)
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    result = normalize(images)
    assert result.dtype == torch.float32
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    assert torch.allclose(result.double(), (images.double() / 255 - mean) / std, rtol=0, atol=1e-6)
    assert normalize(images.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert not normalize.state_dict()
    assert not list(normalize.parameters())


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_training_transforms(augment):
    transform = pickle.loads(pickle.dumps(InputSpec(24, 28).train_transform(augment)))
    image = picture(60, 40)

    def draw(seed):
        torch.manual_seed(seed)
        result = transform(image)
        assert result.shape == (3, 24, 24)
        assert result.dtype == torch.uint8
        return result.numpy().tobytes()

    seen = [draw(seed) for seed in range(20)]
    assert seen == [draw(seed) for seed in range(20)]  # torch's generator decides all
    plain = InputSpec(24, 28).eval_transform()(image)
    if augment == "crop":
        assert len(set(seen)) == 20
    else:
        kinds = {"none": [plain], "flip": [plain, plain.flip(2)]}[augment]
        assert set(seen) == {kind.numpy().tobytes() for kind in kinds}


def test_unknown_augmentation():
    with pytest.raises(UsageError, match="'mixup'; expected one of none, flip, crop"):
        InputSpec(8, 8).train_transform("mixup")


def test_any_image_is_a_picture():
    grey = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
    assert torch.equal(visible(grey), grey.expand(3, 2, 2))
    assert torch.equal(visible(torch.stack([grey, grey + 9])), grey.expand(3, 2, 2)), "the first of a pair"
    deep = torch.tensor([1000, 2000, 3000, 6000], dtype=torch.int32).view(1, 2, 2)
    assert visible(deep).tolist() == [[[0, 51], [102, 255]]] * 3
    assert visible(torch.zeros(5, 2, 2)).shape == (3, 2, 2)
