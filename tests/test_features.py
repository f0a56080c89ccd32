import pytest
import torch
from accelerate import Accelerator

from trainer.data import Normalize
from trainer.features import Kept, Stream, keep
from trainer.freezing import freeze
from trainer.sampling import BatchPlan, KeyedDataset
from trainer.split import split_model


@pytest.fixture
def stream(tiny):
    images = torch.randint(0, 256, (21, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = KeyedDataset(images, [index % 3 for index in range(21)], lambda image: image, seed=0)
    freeze(tiny, ["fc"])
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    trunk = split_model(tiny, normalize(images[:1])).trunk
    return Stream(dataset, trunk=trunk, normalize=normalize, accelerator=Accelerator(cpu=True))


def test_a_stream_is_the_trunk_on_normalised_images(stream, tiny):
    (batch,) = stream.batches([[3, 1, 20]], epoch=5)
    images = torch.stack([stream.loader.dataset[5, index]["image"] for index in (3, 1, 20)])
    expected = stream.trunk((images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(batch["inputs"], expected)
    assert not batch["inputs"][0].requires_grad
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([0, 1, 2], [3, 1, 20])
    tiny.train()
    (again,) = stream.batches([[3, 1, 20]], epoch=5)
    assert torch.equal(batch["inputs"][0], again["inputs"][0])


def test_kept_features_are_the_streamed_ones(stream):
    plan = BatchPlan(21, 8, 4, 1)
    kept = keep(stream, plan, limit=1)
    assert isinstance(kept, Kept)
    assert len(kept) == len(stream) == 21
    whole = [list(range(first, min(first + 4, 21))) for first in range(0, 21, 4)]
    for left, right in zip(kept.batches(whole, epoch=3), stream.batches(whole, epoch=3), strict=True):
        assert torch.equal(left["inputs"][0], right["inputs"][0])
        assert torch.equal(left["label"], right["label"])
        assert torch.equal(left["index"], right["index"])
    (mixed,) = kept.batches([[20, 0, 7]], epoch=0)
    assert mixed["label"].tolist() == [2, 0, 1]


def test_what_does_not_fit_is_computed_each_time(stream):
    size = 21 * 8 * 4  # samples × features × bytes
    plan = BatchPlan(21, 8, 4, 1)
    assert keep(stream, plan, limit=(size - 1) / 2**30) is stream
    assert isinstance(keep(stream, plan, limit=size / 2**30), Kept)
