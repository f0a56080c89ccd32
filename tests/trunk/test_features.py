from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator

from trainer.config import SpeedConfig
from trainer.data.loader import KeyedDataset
from trainer.data.sampling import BatchPlan
from trainer.data.transforms import Normalize
from trainer.model.freezing import freeze
from trainer.model.split import split_model
from trainer.trunk.features import CachedFeatures, ComputedFeatures, Features

SAMPLES = 21
ROW = 8 * 4  # bytes of TinyNet's features
LITTLE = 1e-9  # GiB


class _Images(list):
    """Images with labels, and the stamp that a cache asks for."""

    def __init__(self, images: torch.Tensor, stamp: str):
        super().__init__(images)
        self.labels = [index % 3 for index in range(SAMPLES)]
        self.stamp = lambda: stamp


def _augment(image: torch.Tensor) -> torch.Tensor:
    return image.flip(-1) if torch.rand(()) < 0.5 else image


def _same(image: torch.Tensor) -> torch.Tensor:
    return image


@pytest.fixture
def make(tiny, tmp_path):
    """Features of data sets of 21 images each, in batches of 4; returns a function of their views by name."""
    images = torch.randint(0, 256, (SAMPLES, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    freeze(tiny, ["fc"])
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    sample = normalize(images[:2])
    trunk = split_model(tiny, sample).trunk

    def make(
        *,
        memory: float = 2.0,
        lasting: bool = False,
        compile: str = "off",
        epochs: int = 3,
        batch: int | None = 4,
        micro: int = 4,
        exact: bool = False,
        stamp: str = "one",
        seed: int = 0,
        trunk: torch.nn.Module = trunk,
        transform: Callable[[torch.Tensor], torch.Tensor] = _same,
        **views: int | None,
    ) -> Features:
        source = _Images(images, stamp)
        datasets = {
            name: KeyedDataset(source, transform if count == 1 else _augment, seed=seed, views=count)
            for name, count in (views or {"val": 1}).items()
        }
        cache_dir = str(tmp_path / "features") if lasting else None
        return Features(
            Accelerator(cpu=True),
            trunk,
            normalize,
            sample,
            datasets,
            config=SpeedConfig(cache_memory=memory, cache_dir=cache_dir, compile=compile),
            epochs=epochs,
            plan=BatchPlan(SAMPLES, micro, micro, 1),
            exact=exact,
            batch=batch,
            folder=tmp_path / "features",
        )

    return make


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


def _places(features: Features) -> list[str]:
    return [part.place for part in features.plan.parts]


def test_computed_features_are_the_trunk_on_normalised_images(make, tiny):
    computed = make(memory=0).open("val")
    assert isinstance(computed, ComputedFeatures)
    (batch,) = computed.batches([[3, 1, 20]], epoch=5)
    images = torch.stack([computed.dataset[5, index]["image"] for index in (3, 1, 20)])
    expected = computed.trunk((images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(batch["inputs"], expected)
    assert not batch["inputs"][0].requires_grad
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([0, 1, 2], [3, 1, 20])
    tiny.train()
    (again,) = computed.batches([[3, 1, 20]], epoch=5)
    assert torch.equal(batch["inputs"][0], again["inputs"][0])


def test_a_model_that_trains_from_its_first_layer_gets_the_images(make, tiny):
    freeze(tiny, ["all"])
    features = make(trunk=split_model(tiny, torch.rand(2, 3, 8, 8)).trunk, lasting=True, compile="on")
    assert "nothing is frozen before the first layer" in str(features.plan)
    assert not features.compiled
    computed = features.open("val")
    (batch,) = computed.batches([[3, 1]], epoch=0)
    images = torch.stack([computed.dataset[0, index]["image"] for index in (3, 1)])
    torch.testing.assert_close(batch["inputs"], ((images / 255 - 0.5) / 0.25,))


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"memory": LITTLE}, {"lasting": True}, {"memory": LITTLE, "lasting": True}], ids=str
)
def test_kept_features_are_the_computed_ones(make, options, views):
    kept = make(val=views, **options).open("val")
    computed = make(val=views, memory=0).open("val")
    assert isinstance(kept, CachedFeatures)
    assert isinstance(computed, ComputedFeatures)
    assert len(kept) == len(computed) == SAMPLES
    for epoch in range(4):
        assert _equal(_whole(kept, epoch), _whole(computed, epoch))
    assert _equal(_whole(kept, 0), _whole(kept, views))
    assert views == 1 or not _equal(_whole(kept, 0), _whole(kept, 1))
    (mixed,) = kept.batches([[20, 0, 7]], epoch=0)
    assert mixed["label"].tolist() == [2, 0, 1]


def test_something_can_be_done_between_the_batches(make):
    calls = []
    make(val=2).open("val", between=lambda: calls.append(1))
    assert len(calls) == 2 * 6, "two views, in batches of 4 each"


def test_the_plan_says_what_is_kept_where_and_how_random_it_still_is(make):
    plan, hint = str(make(val=2, train=None, epochs=10).plan).splitlines()
    assert "features of 8, 32 B an image; val kept in memory (1.34 kB), 2 views: epoch 3 sees the images of ep" in plan
    assert "train computed in each epoch: about 1 s once and about 1 s an epoch (trunk 2 BatchNorms folded" in plan
    assert hint.startswith("hint    --augment none would compute the features of train once: 6.0× less work; --views 4")


def test_new_views_in_each_epoch_are_not_kept(make):
    computed = make(val=None).open("val")
    assert isinstance(computed, ComputedFeatures)
    assert not _equal(_whole(computed, 0), _whole(computed, 1))


def test_without_memory_nothing_is_kept(make, tmp_path):
    features = make(memory=0)
    assert isinstance(features.open("val"), ComputedFeatures)
    assert str(features.plan).count("val computed in each epoch:") == 1
    assert not (tmp_path / "features").exists()


def test_the_budget_is_for_all_together(make):
    size = SAMPLES * ROW
    for memory, places in ((2 * size, ["memory", "memory"]), (2 * size - 1, ["memory", "file"]), (1, ["file", "file"])):
        assert _places(make(memory=memory / 2**30, val=1, train=1)) == places


def test_a_full_disk_means_no_cache(make, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": SAMPLES * ROW})())
    features = make(memory=LITTLE)
    assert _places(features) == [""]
    assert isinstance(features.open("val"), ComputedFeatures)
    assert not (tmp_path / "features").exists()


def test_files_go_with_the_run_or_last(make, tmp_path):
    for lasting in (False, True):
        with make(memory=LITTLE, lasting=lasting) as features:
            features.open("val")
            assert (tmp_path / "features").exists()
        assert (tmp_path / "features").exists() == lasting


def test_what_is_found_again_is_not_computed(make, monkeypatch, capsys):
    first = make(memory=LITTLE, lasting=True)
    assert not first.plan.parts[0].found
    batches = _whole(first.open("val"), 0)
    again = make(memory=LITTLE, lasting=True)
    assert again.plan.parts[0].found
    monkeypatch.setattr(ComputedFeatures, "answers", None)  # it would be called to compute
    assert _equal(_whole(again.open("val"), 0), batches)
    assert "21 features found in " in capsys.readouterr().out


def test_anything_that_features_depend_on_makes_them_others(make, tiny):
    make(lasting=True, val=1).open("val")
    make(lasting=True, val=2).open("val")

    def found(**options) -> bool:
        return make(lasting=True, **options).plan.parts[0].found

    assert found(val=1)
    assert found(val=2)
    assert found(val=1, seed=1), "nothing random in it"
    assert not found(val=2, seed=1)
    assert not found(val=3)
    assert not found(val=1, stamp="two")
    assert not found(val=1, batch=8)
    tiny.conv.weight.data += 1
    assert not found(val=1)


def test_features_are_those_of_the_code_of_a_transform_and_not_of_its_address(make, capsys):
    def brighter(by: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda image: image + by

    first = make(lasting=True, transform=brighter(1)).open("val")
    again = make(lasting=True, transform=brighter(1)).open("val")
    assert "features found" in capsys.readouterr().out
    other = make(lasting=True, transform=brighter(2)).open("val")
    assert "features found" not in capsys.readouterr().out
    assert _equal(_whole(first, 0), _whole(again, 0))
    assert not _equal(_whole(first, 0), _whole(other, 0))


def test_a_damaged_entry_is_computed_again(make, tmp_path, caplog):
    features = make(memory=LITTLE, lasting=True)
    first = _whole(features.open("val"), 0)
    (path,) = (tmp_path / "features").glob("*/0.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert _equal(_whole(features.open("val"), 0), first)
    assert "0.bin does not match its sha256" in caplog.text
    caplog.clear()
    features.open("val")
    assert caplog.text == ""


def test_all_forwards_have_one_size_so_that_all_are_compiled_or_none(make, monkeypatch):
    compiled = []
    monkeypatch.setattr("trainer.trunk.fast.FastTrunk.compile", lambda self, shape, **_: compiled.append(shape[0]))
    for options, batch in (
        ({"val": 1}, 4),
        ({"val": 1, "train": None}, 7),
        ({"val": 1, "batch": None}, 16),  # as many as the trunk takes
        ({"val": 1, "batch": None, "exact": True}, 7),
    ):
        assert make(micro=7, compile="on", **options).open("val").batch == compiled[-1] == batch
