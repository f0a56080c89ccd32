import copy

import pytest
import torch
from torch import nn

from trainer.errors import CheckpointError, UsageError
from trainer.freezing import (
    check_fingerprint,
    fingerprint,
    freeze,
    frozen_tensors,
    lock_eval,
    trained_tensors,
)


def test_freeze_by_name_pattern_and_word(tiny):
    assert freeze(tiny, ["head"], head=["fc"]).trainable == ("fc.weight", "fc.bias")
    assert freeze(tiny, ["fc.bias"]).trainable == ("fc.bias",)
    assert freeze(tiny, ["block", "fc"]).trainable == (
        *("block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias", "fc.weight", "fc.bias"),
    )
    assert freeze(tiny, ["b*"]).trainable[:2] == ("bn.weight", "bn.bias")
    assert freeze(tiny, ["block.[01].bias"]).trainable == ("block.0.bias", "block.1.bias")
    assert len(freeze(tiny, ["all"]).trainable) == len(list(tiny.parameters()))
    assert str(freeze(tiny, ["fc"])) == "fc: 27 of 459 parameters train (5.88%)"


@pytest.mark.parametrize("pattern", ["layer4", "bloc", "fc.weigth", ""])
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_what_there_is(tiny, pattern):
    before = [parameter.requires_grad for parameter in tiny.parameters()]
    with pytest.raises(UsageError, match="conv, bn, block, fc"):
        freeze(tiny, ["head", pattern], head=["fc"])
    assert [parameter.requires_grad for parameter in tiny.parameters()] == before
    with pytest.raises(UsageError, match="did you mean block"):
        freeze(tiny, ["bloc"])
    with pytest.raises(UsageError, match="nothing to train"):
        freeze(tiny, [])


def test_frozen_parts_stay_in_eval_mode_whoever_calls_train(tiny):
    freeze(tiny, ["fc"])
    parent = nn.Sequential(tiny)
    for call in (tiny.train, parent.train, tiny.block.train, tiny.bn.train, lambda: tiny.apply(lambda m: m.train())):
        call()
        assert not any(module.training for module in (tiny.conv, tiny.bn, *tiny.block.modules()))
    assert tiny.training
    assert tiny.fc.training
    assert tiny.late.training
    before = tiny.bn.running_mean.clone()
    tiny(torch.randn(4, 3, 8, 8))
    assert torch.equal(tiny.bn.running_mean, before)


def test_the_lock_survives_deepcopy_and_ends_with_the_plan(tiny):
    freeze(tiny, ["fc"])
    twin = copy.deepcopy(tiny)
    twin.eval()
    twin.train()
    assert twin.training
    assert not twin.bn.training
    assert tiny.bn is not twin.bn
    freeze(tiny, ["bn", "fc"])
    assert tiny.bn.training
    assert not tiny.block.training


def test_trained_and_frozen_tensors_are_the_whole_state(tiny):
    freeze(tiny, ["block", "fc"])
    trained, frozen = trained_tensors(tiny), frozen_tensors(tiny)
    assert not trained.keys() & frozen.keys()
    assert trained.keys() | frozen.keys() == tiny.state_dict().keys()
    assert {"block.1.running_mean", "block.1.num_batches_tracked"} <= trained.keys()  # a BatchNorm that trains moves
    assert {"bn.running_mean", "bn.num_batches_tracked", "conv.weight"} <= frozen.keys()
    assert trained["fc.weight"] is tiny.fc.weight


def test_buffers_without_parameters_are_frozen_once_locked():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(12, 2))
    freeze(model, ["2"])
    assert "0.running_mean" in trained_tensors(model)
    lock_eval(model[0])
    assert "0.running_mean" in frozen_tensors(model)


def test_fingerprint_names_one_flipped_bit(tiny):
    freeze(tiny, ["fc"])
    before = fingerprint(tiny)
    with torch.no_grad():
        tiny.fc.weight.add_(1)  # trains: not part of it
    check_fingerprint(fingerprint(tiny), before)
    tiny.bn.running_var.view(torch.int32)[2] ^= 1
    with pytest.raises(
        CheckpointError, match=r"1 of 14 tensors differ:\n  bn.running_var: expected sha256 [0-9a-f]{16}…"
    ):
        check_fingerprint(fingerprint(tiny), before)
    with pytest.raises(CheckpointError, match=r"block\.0\.bias: in the checkpoint, not in this model"):
        check_fingerprint({}, before)


def test_fingerprint_takes_every_dtype():
    model = nn.Linear(3, 2)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert len(fingerprint(model.to(dtype).requires_grad_(False))) == 2
