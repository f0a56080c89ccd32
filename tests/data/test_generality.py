"""Data of other kinds: labels that are no classes, inputs that are no RGB bytes, and a run's data as one object."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensors import Tensors
from torchvision.transforms import v2

from trainer.config import DataConfig
from trainer.data.bad_images import check_images
from trainer.data.images import Subset, decode
from trainer.data.labels import check_labels, stratified_split
from trainer.data.loader import BatchLoader, KeyedDataset
from trainer.data.open import load_data, open_data
from trainer.data.transforms import InputSpec, Normalize, is_random
from trainer.errors import DataError, UsageError

SPEC = InputSpec(8, 9, (0.5,), (0.25,), "bilinear", max_value=4095)


LABELS = {
    "numbers": torch.linspace(-1, 1, 10),
    "several classes": torch.eye(10)[:, :3],
    "tensors": torch.arange(40).view(10, 2, 2),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("workers", [0, 1])
def test_labels_of_any_shape_come_in_batches(labels, workers):
    images = Tensors(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), labels)
    check_labels(images)
    dataset = KeyedDataset(Subset(images, [9, 2, 4]), lambda image: image, seed=0)
    (batch,) = BatchLoader(dataset, workers=workers)([[(0, 2), (0, 0)]])
    assert torch.equal(batch["label"], labels[[4, 9]])
    assert batch["label"].dtype == labels.dtype


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_a_digest_depends_on_every_value(labels):
    images = torch.zeros(10, 1)
    digests = {Tensors(images, labels).digest(), Tensors(images, labels.double()).digest()}
    changed = labels.clone()
    changed[7] += 1
    digests.add(Tensors(images, changed).digest())
    digests.add(Tensors(images, labels.reshape(10, -1, 1)).digest())
    assert len(digests) == 4
    assert Tensors(images, labels.clone()).digest() in digests


def test_values_are_split_without_regard_to_them():
    train, val = stratified_split(torch.rand(50), 0.2, seed=0)
    assert (len(train), len(val)) == (40, 10)
    assert sorted(train + val) == list(range(50))
    assert stratified_split(torch.zeros(50, 3), 0.2, seed=0) == (train, val)
    assert stratified_split(torch.rand(50), 0.2, seed=1) != (train, val)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0.0, 1.0, float("nan")]), (), r"Tensors\[2\] has a label that is not finite"),
        (torch.tensor([[0.0, 1], [float("inf"), 0]]), (), r"Tensors\[1\] has a label that is not finite"),
        (torch.zeros(3, 2), ("a", "b", "c"), "expected a column for each of 3 names"),
        (torch.tensor([0, 1, 2]), ("a", "b", "c"), "expected a list of int for classes, or floats"),
    ],
)
def test_labels_that_are_no_values_are_errors(labels, classes, message):
    with pytest.raises(DataError, match=message):
        check_labels(Tensors(torch.zeros(3, 1), labels, classes))


class OneBroken(Tensors):
    def __getitem__(self, index):
        if index == 3:
            raise DataError("no. 3 cannot be read")
        return self.images[index]


def test_a_bad_image_with_a_number_is_left_out():
    images = OneBroken(torch.zeros(5, 3, 2, 2), torch.arange(5.0))
    (rest,), skipped = check_images(Accelerator(cpu=True), [images], check=False, skip=True)
    assert rest.labels.tolist() == [0, 1, 2, 4]
    assert skipped == [["OneBroken[3]"]]


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
@pytest.mark.parametrize("shape", [(2, 3, 20, 30), (1, 20, 30), (5, 20, 30)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_inputs_of_any_shape_and_type(augment, shape, dtype):
    one = torch.randint(0, 256, shape[-3:], generator=torch.Generator().manual_seed(0)).to(dtype)
    image = one.expand(shape)
    transform = InputSpec(8, 9).train_transform(augment)
    dataset = KeyedDataset(Tensors([image] * 4, [0] * 4), transform, seed=0)
    (batch,) = BatchLoader(dataset)([[(0, 1), (0, 3)]])
    images = batch["image"]
    assert images.shape == (2, *shape[:-2], 8, 8)
    assert images.dtype == dtype
    assert torch.equal(images[1], dataset[0, 3]["image"])
    if len(shape) == 4:
        assert torch.equal(images[:, 0], images[:, 1])  # both of a pair have the same crop
    mean, std = [0.5] * shape[-3], [0.25] * shape[-3]
    result = Normalize(mean, std)(images)
    assert torch.allclose(result, (images.float() / 255 - 0.5) / 0.25, atol=1e-6)
    assert result.shape == images.shape


def test_normalizing_leaves_floats_as_they_were():
    images = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    before = images.clone()
    result = Normalize((0.5,) * 3, (0.5,) * 3, max_value=1)(images)
    assert torch.equal(images, before)
    assert torch.allclose(result, (images - 0.5) / 0.5, atol=1e-6)


def test_twelve_bits_in_sixteen_are_not_black(tmp_path):
    values = np.linspace(0, 4095, 400).astype(np.uint16).reshape(20, 20)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert decode(tmp_path / name, channels=1).max() == 16  # as 8 bits of 65535
        image = decode(tmp_path / name, channels=1, depth=16)
        assert image.dtype == torch.int32
        assert torch.equal(image[0], torch.from_numpy(values.astype(np.int32)))
    result = SPEC.normalize()(SPEC.eval_transform()(image)[None])
    assert result.shape == (1, 1, 8, 8)
    assert -2 <= result.min() < -1.4
    assert 1.4 < result.max() <= 2  # the centre crop has neither end


def test_channels_and_depth(tmp_path):
    Image.new("RGBA", (2, 1), (255, 0, 0, 51)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", channels=4)[:, 0, 0].tolist() == [255, 0, 0, 51]
    assert decode(tmp_path / "a.png", depth=16)[:, 0, 0].tolist() == [65535, 204 * 257, 204 * 257]
    assert decode(tmp_path / "a.png", channels=1).shape == (1, 1, 2)
    grey = Image.fromarray(np.uint8([[7, 8]]))
    grey.save(tmp_path / "grey.png", transparency=7)
    assert decode(tmp_path / "grey.png", channels=1)[0, 0].tolist() == [255, 8]  # transparent: white, as in colour
    for wrong in ({"channels": 2}, {"depth": 12}):
        with pytest.raises(UsageError, match="expected 1, 3 or 4, and 8 or 16"):
            decode(tmp_path / "a.png", **wrong)


def test_the_randomness_of_a_transform_is_found():
    images = [torch.full((3, 8, 8), 7, dtype=torch.uint8), torch.zeros(3, 9, 8, dtype=torch.uint8)]
    own = np.random.default_rng(0)
    for transform in (
        InputSpec(4, 4).train_transform("flip"),
        InputSpec(4, 4).train_transform("crop"),
        v2.RandomHorizontalFlip(0.001),
        lambda image: image + np.random.randint(2),
        lambda image: image + own.random(),
    ):
        assert is_random(transform, *images)
    state = torch.get_rng_state()
    assert not is_random(InputSpec(4, 4).train_transform("none"), *images)
    assert not is_random(lambda image: image.flip(-1), *images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1), (2, 20001)])
def test_a_strip_is_resized_in_its_middle_alone(shape):
    transform = pickle.loads(pickle.dumps(InputSpec(224, 256).eval_transform()))
    image = torch.arange(max(shape)).mul(256).div(max(shape), rounding_mode="floor").to(torch.uint8)
    image = image.expand(3, min(shape), -1) if shape[0] < shape[1] else image[:, None].expand(3, -1, min(shape))
    result = transform(image)
    assert result.shape == (3, 224, 224)
    assert (result.int() - 128).abs().max() <= 1  # the middle of 0 to 255


@pytest.mark.parametrize("length", [303, 304, 401, 500])
def test_a_strip_looks_as_if_it_had_been_resized_whole(length):
    wave = 128 + 127 * torch.sin(torch.arange(length) * (2 * torch.pi / 20))  # a step of the result: up to 15
    image = wave.to(torch.uint8).expand(3, 3, length)
    whole = v2.Compose([v2.Resize(8, antialias=True), v2.CenterCrop(8)])
    for turned in (image, image.mT):
        away = InputSpec(8, 8).eval_transform()(turned).int() - whole(turned).int()
        assert away.abs().max() <= 8  # half a pixel of the result
    short = image[..., :300]
    assert torch.equal(InputSpec(8, 8).eval_transform()(short), whole(short))  # up to 100 times as long: the same bits


# The data of a run


def write(path, color=(1, 2, 3)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path)


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write(tmp_path / part / name / f"{i:03}.png", (label, i, 7))
    return tmp_path


def opened(folder, **settings):
    config = DataConfig(data=str(folder), **settings)
    load = lambda config, *, seed: load_data(config.data, val_fraction=config.val_fraction, seed=seed)  # noqa: E731
    return open_data(Accelerator(cpu=True), config, load, seed=3)


def test_data_says_where_validation_comes_from(folder):
    data = opened(folder)
    assert str(data) == f"{folder}: 12 training, 4 validation images (val/), 2 classes"
    assert set(data.about()) == {"training", "validation", "skipped", "content"}
    assert "(20 % split off by seed 3)" in str(opened(folder / "train"))
    (folder / "val").rename(folder / "test")
    assert "(test/, on which the best epoch is chosen" in str(opened(folder))
    (folder / "train/bee/000.png").write_bytes(b"")
    assert str(opened(folder, bad_images="skip")).endswith("\n        unreadable, left out: 1")


def test_replaced_images_are_noticed_and_named(folder):
    stored = pickle.loads(pickle.dumps(opened(folder).about()))
    opened(folder).check_same(stored)
    path = folder / "train/bee/004.png"
    good = path.read_bytes()
    write(path, (9, 9, 9))
    with pytest.raises(DataError, match=r"training images have other files .*; it may be \S*bee/004\.png\. Put"):
        opened(folder).check_same(stored)
    path.write_bytes(good[:-1] + b"x")  # of the same size
    with pytest.raises(DataError, match=r"it may be \S*bee/004\.png\. Put"):
        opened(folder).check_same(stored)
    path.write_bytes(good)
    opened(folder).check_same(stored)  # whenever it was written
    path.rename(path.with_name("new.png"))
    with pytest.raises(DataError, match=r"other names or labels than the run had; it may be \S*bee/new\.png\. Put"):
        opened(folder).check_same(stored)
    path.with_name("new.png").unlink()
    with pytest.raises(DataError, match=r"other names or labels than the run had: 11, not 12\. Put"):
        opened(folder).check_same(stored)
    del stored["content"]
    with pytest.raises(DataError, match="other names or labels"):
        opened(folder).check_same(stored)
