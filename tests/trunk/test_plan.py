"""The plan of features by itself: what it counts and what it says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.trunk.plan import FeaturePlan, Part, bytes_per_image, time_text

VAL = Part("val", images=1000, views=1, place="memory", seconds=0.01)
FRESH = Part("train", images=4000, views=None, place="", seconds=0.01)
KEPT = replace(FRESH, views=1, place="file")


def _plan(
    *parts: Part, epochs: int = 10, processes: int = 1, trunk: str = "as it is", gain: float = 1.0
) -> FeaturePlan:
    return FeaturePlan([torch.Size([512])], 2048, parts, epochs, processes, Path("here"), trunk, gain)


def test_kept_features_are_computed_once_and_others_in_each_epoch():
    for plan, images, once, each in (
        (_plan(VAL, KEPT), 5000, 50, 0),
        (_plan(VAL, FRESH), 1000 + 10 * 4000, 10, 40),
        (_plan(VAL, replace(KEPT, views=3)), 1000 + 3 * 4000, 130, 0),
        (_plan(replace(VAL, found=True), KEPT), 4000, 40, 0),
        (_plan(VAL, FRESH, processes=4), 41_000, 2.5, 10),
    ):
        assert plan.images == images
        assert plan.seconds == pytest.approx((once, each))


def test_it_is_one_line():
    assert str(_plan(VAL, KEPT)) == (
        "plan    features of 512, 2.05 kB an image; val kept in memory (2.05 MB); train kept in here (8.19 MB), "
        "without augmentation (--augment crop: about 40 s in each epoch): about 50 s once (trunk as it is)"
    )
    assert ": about 10 s once and about 40 s an epoch (trunk" in str(_plan(VAL, FRESH, epochs=2))
    two = replace(_plan(VAL), shapes=[torch.Size([64, 7, 7]), torch.Size([512])])
    assert str(two).startswith("plan    features of 64×7×7 + 512, ")


def test_features_of_an_earlier_run_are_found_and_take_no_time():
    found = [replace(part, found=True) for part in (VAL, KEPT)]
    assert str(_plan(*found)) == (
        "plan    features of 512, 2.05 kB an image; val found in memory (2.05 MB); train found in here (8.19 MB): "
        "nothing to compute (trunk as it is)"
    )
    text = str(_plan(found[0], KEPT))
    assert "val found in memory (2.05 MB); train kept in here (8.19 MB), without augmentation (" in text
    assert "in each epoch): about 40 s once (" in text


def test_several_views_are_counted_and_said():
    text = str(_plan(VAL, replace(KEPT, views=3)))
    assert "train kept in here (24.6 MB), 3 views: epoch 4 sees the images of epoch 1 again: about 2 min once" in text


def test_a_model_without_trunk_has_one_line_and_no_hints():
    for parts in ([VAL, FRESH], [replace(VAL, place=""), FRESH]):
        plan = FeaturePlan([], 0, parts, 10, 1, Path("here"), "", gain_of_bf16=3.0)
        assert str(plan) == (
            "plan    nothing is frozen before the first layer that trains: every image goes through the model"
        )


def _hints(plan: FeaturePlan) -> list[str]:
    return str(plan).splitlines()[1:]


@pytest.mark.parametrize("epochs", range(1, 12))
def test_a_hint_never_recommends_as_many_views_as_epochs(epochs):
    hints = _hints(_plan(VAL, FRESH, epochs=epochs))
    if epochs <= 2:
        assert hints == [], "two views would be as many as there are epochs, one is --augment none"
        return
    (hint,) = hints
    (views,) = map(int, re.findall(r"--views (\d+)", hint))
    assert 2 <= views <= 4
    assert views < epochs
    assert f"once for each of {views} augmented views" in hint
    assert f"train once: {(1000 + epochs * 4000) / 5000:.1f}× less work" in hint


def test_a_faster_trunk_is_a_hint_where_it_saves_time():
    assert _hints(_plan(VAL, KEPT, gain=2.04)) == [
        "hint    the trunk is 2.0× faster in bf16: accelerate launch --mixed_precision bf16"
    ]
    assert _hints(_plan(VAL, KEPT, gain=1.5)) == []
    assert _hints(_plan(VAL, replace(KEPT, images=1000), gain=2.0)) == [], "a run of 20 seconds"
    assert _hints(_plan(VAL, FRESH, epochs=2, gain=2.0)) != []


def test_sizes_and_times_are_for_people():
    rows = [(torch.Size([512]), torch.float32), (torch.Size([64, 7, 7]), torch.bfloat16)]
    assert bytes_per_image(rows) == 4 * 512 + 2 * 64 * 49
    assert bytes_per_image([]) == 0
    assert [time_text(seconds) for seconds in (0.1, 4, 89, 90, 720, 5399, 5400)] == [
        *("1 s", "4 s", "89 s", "2 min", "12 min", "90 min", "1.5 h")
    ]
