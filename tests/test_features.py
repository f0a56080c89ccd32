import pytest
import torch
from accelerate import Accelerator

from trainer.data import Normalize
from trainer.features import Features, Kept
from trainer.freezing import freeze
from trainer.sampling import KeyedDataset
from trainer.split import split_model

SAMPLES = 21
ROW = 8 * 4  # bytes of TinyNet's features
LITTLE = 1e-9  # GiB


def _augment(image: torch.Tensor) -> torch.Tensor:
    return image.flip(-1) if torch.rand(()) < 0.5 else image


@pytest.fixture
def make(tiny, tmp_path):
    """Features of 21 images, in batches of 4; gives them, and the images as a data set."""
    images = torch.randint(0, 256, (SAMPLES, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    freeze(tiny, ["fc"])
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    sample = normalize(images[:2])
    trunk = split_model(tiny, sample).trunk

    def make(*, views=1, **options):
        source = _Source(images)
        dataset = KeyedDataset(source, source.labels, lambda image: image if views == 1 else _augment(image), seed=0)
        options = {"folder": tmp_path / "features", "batch": 4} | options
        features = Features(Accelerator(cpu=True), trunk, normalize, sample, **options)
        stream = features.stream(dataset, views=views)
        features.plan(stream=stream, epochs=3, micro=4)
        return features, stream

    return make


class _Source(list):
    def __init__(self, images):
        super().__init__(images)
        self.labels = [index % 3 for index in range(SAMPLES)]
        self.stamp = lambda: "one"


def _whole(source, epoch):
    lists = [list(range(first, min(first + 4, SAMPLES))) for first in range(0, SAMPLES, 4)]
    return list(source.batches(lists, epoch=epoch))


def _equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(one["inputs"][0], other["inputs"][0])
        and torch.equal(one["label"], other["label"])
        and torch.equal(one["index"], other["index"])
        for one, other in zip(left, right, strict=True)
    )


def test_a_stream_is_the_trunk_on_normalised_images(make, tiny):
    _, stream = make()
    (batch,) = stream.batches([[3, 1, 20]], epoch=5)
    images = torch.stack([stream.dataset[5, index]["image"] for index in (3, 1, 20)])
    expected = stream.trunk((images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(batch["inputs"], expected)
    assert not batch["inputs"][0].requires_grad
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([0, 1, 2], [3, 1, 20])
    tiny.train()
    (again,) = stream.batches([[3, 1, 20]], epoch=5)
    assert torch.equal(batch["inputs"][0], again["inputs"][0])


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"memory": LITTLE}, {"lasting": True}, {"memory": LITTLE, "lasting": True}], ids=str
)
def test_kept_features_are_the_streamed_ones(make, options, views):
    features, stream = make(views=views, **options)
    kept = features.keep(stream)
    assert isinstance(kept, Kept)
    assert len(kept) == len(stream) == SAMPLES
    for epoch in range(4):
        assert _equal(_whole(kept, epoch), _whole(stream, epoch))
    assert _equal(_whole(kept, 0), _whole(kept, views))
    assert views == 1 or not _equal(_whole(kept, 0), _whole(kept, 1))
    (mixed,) = kept.batches([[20, 0, 7]], epoch=0)
    assert mixed["label"].tolist() == [2, 0, 1]


def test_the_plan_says_what_is_kept_where_and_how_random_it_still_is(make):
    features, stream = make(views=2)
    fresh = features.stream(stream.dataset, views=None)
    plan, hint = features.plan(val=stream, train=fresh, epochs=10, micro=4)
    assert "features of 8, 32 B an image; val kept in memory (1.34 kB), 2 views: epoch 3 sees the images of ep" in plan
    assert "train computed in each epoch: about 1 s once and about 1 s an epoch (trunk 2 BatchNorms folded" in plan
    assert hint.startswith("hint    --augment none would compute the features of train once: 6.0× less work; --views 4")


def test_new_views_in_each_epoch_are_not_kept(make):
    features, stream = make(views=None)
    assert features.keep(stream) is stream
    assert not _equal(_whole(stream, 0), _whole(stream, 1))


def test_without_memory_nothing_is_kept(make, tmp_path):
    features, stream = make(memory=0)
    assert features.keep(stream) is stream
    assert features.plan(val=stream, epochs=3, micro=4)[0].count("val computed in each epoch:") == 1
    assert not (tmp_path / "features").exists()


def test_the_budget_is_for_all_together(make, tmp_path):
    size = SAMPLES * ROW
    for memory, places in ((2 * size, ["memory", "memory"]), (2 * size - 1, ["memory", "file"]), (1, ["file", "file"])):
        features, stream = make(memory=memory / 2**30)
        other = features.stream(stream.dataset, views=1)
        features._left = memory
        features.plan(val=stream, train=other, epochs=3, micro=4)
        assert [features._places[stream], features._places[other]] == places


def test_a_full_disk_means_no_cache(make, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": SAMPLES * ROW})())
    features, stream = make(memory=LITTLE)
    assert features.keep(stream) is stream


def test_files_go_with_the_run_or_last(make, tmp_path):
    for lasting in (False, True):
        features, stream = make(memory=LITTLE, lasting=lasting)
        features.keep(stream)
        features.close()
        assert (tmp_path / "features").exists() == lasting


def test_what_is_found_again_is_not_computed(make, tmp_path, caplog):
    features, stream = make(memory=LITTLE, lasting=True)
    first = _whole(features.keep(stream), 0)
    _, again = make(memory=LITTLE, lasting=True)
    again.answers = None  # it would be called to compute
    assert _equal(_whole(features.keep(stream), 0), first)
    # Anything that it depends on makes it another one.
    _, other = make(memory=LITTLE, lasting=True)
    other.dataset.images.stamp = lambda: "two"
    assert other.key(batch=4) != stream.key(batch=4) != stream.key(batch=8)
    assert make(views=2)[1].key(batch=4) != stream.key(batch=4)


def test_a_damaged_entry_is_computed_again(make, tmp_path, caplog):
    features, stream = make(memory=LITTLE, lasting=True)
    first = _whole(features.keep(stream), 0)
    (path,) = (tmp_path / "features").glob("*/0.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert _equal(_whole(features.keep(stream), 0), first)
    assert "0.bin does not match its sha256" in caplog.text
    caplog.clear()
    features.keep(stream)
    assert caplog.text == ""


def test_all_forwards_have_one_size_so_that_all_are_compiled_or_none(make, monkeypatch):
    compiled = []
    monkeypatch.setattr("trainer.trunk.FastTrunk.compile", lambda self, shape, **_: compiled.append(shape[0]))
    features, stream = make()
    fresh = features.stream(stream.dataset, views=None)
    for streams, batch in (({"val": stream}, 4), ({"val": stream, "train": fresh}, 7)):
        features.plan(**streams, epochs=3, micro=7, compile="on")
        assert features.keep(stream).batch == compiled[-1] == batch
