import copy
import json
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

from trainer.errors import CheckpointError, UsageError
from trainer.model.classifiers import build_model
from trainer.model.freezing import (
    check_fingerprint,
    fingerprint,
    freeze,
    frozen_tensors,
    lock_eval,
    trained_tensors,
)
from trainer.model.patterns import read
from trainer.model.split import split_model


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


def test_the_first_rule_that_names_a_parameter_decides(tiny):
    assert freeze(tiny, ["freeze:block.1", "block", "fc"]).trainable == (
        *("block.0.weight", "block.0.bias", "fc.weight", "fc.bias"),
    )
    assert not tiny.block[1].training
    assert tiny.block[0].training
    assert "block.1.running_mean" in frozen_tensors(tiny)
    assert "block.1.weight" in freeze(tiny, ["block", "freeze:block.1", "fc"]).trainable
    assert freeze(tiny, ["freeze:*.bias", "freeze:re:.*bn", "head"], head=["fc"]).trainable == ("fc.weight",)
    assert freeze(tiny, ["block[1:]", "[-1:]"]).trainable[0] == "block.1.weight"


@pytest.mark.parametrize("rules", [["freeze:all"], ["freeze:fc", "fc"]])
def test_a_plan_that_trains_nothing_is_refused(tiny, rules):
    with pytest.raises(UsageError, match="nothing to train: the rules are freeze:"):
        freeze(tiny, rules)
    assert all(parameter.requires_grad for parameter in tiny.parameters())


def test_a_freezing_rule_that_names_nothing_is_an_error(tiny):
    with pytest.raises(UsageError, match=r"'block\[7:9\]' matches no parameter of TinyNet"):
        freeze(tiny, ["freeze:block[7:9]", "fc"])


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("names", [True, False])
def test_an_exported_plan_applies_to_another_model(tiny, tmp_path, suffix, names):
    plan = freeze(tiny, ["freeze:re:.*\\.1", "block", "head"], head=["fc"])
    if names:
        (tmp_path / f"plan{suffix}").write_text(json.dumps(plan.content()))
    else:
        plan.save(tmp_path / f"plan{suffix}")
    freeze(tiny, ["all"])
    again = freeze(tiny, read(tmp_path / f"plan{suffix}"), head=["fc"])
    assert (again.trainable, again.frozen, again.counts) == (plan.trainable, plan.frozen, plan.counts)
    assert str(again).startswith("freeze:conv.weight " if names else "freeze:re:.*\\.1 block head: ")
    assert str(freeze(tiny, ["fc"] * 9)) == "9 rules: 27 of 459 parameters train (5.88%)"
    if not names:
        assert again == plan


class Tied(nn.Module):
    """The first and the last layer are one parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, images):
        return self.last(self.middle(self.first(images)))


def test_tied_parameters_are_one():
    model = Tied()
    plan = freeze(model, ["first", "last"])
    assert plan.trainable == ("first.weight", "first.bias", "last.bias")
    assert plan.counts == (24, 44)
    assert trained_tensors(model).keys() == {"first.weight", "first.bias", "last.bias"}, "saved once"
    plan = freeze(model, ["middle"])
    assert set(plan.frozen) == {"first.weight", "last.weight", "first.bias", "last.bias"}, "each by all its names"
    assert "last.weight" not in frozen_tensors(model)


def test_a_plan_that_parts_tied_parameters_is_refused():
    model = Tied()
    for rules in (["last"], ["freeze:first", "all"], ["freeze:last.weight", "all"]):
        with pytest.raises(UsageError, match=r"(first|last).weight and (first|last).weight are one tied parameter"):
            freeze(model, rules)
        assert all(parameter.requires_grad for parameter in model.parameters())


FAMILIES = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "maxvit_t", "mnasnet0_5")
FAMILIES += ("mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1")
FAMILIES += ("swin_v2_t", "vgg11_bn", "vit_b_32")


@pytest.mark.parametrize("name", FAMILIES)
def test_plans_of_torchvisions_models(name, tmp_path):
    with torch.device("meta"):
        classifier = build_model(name, 7, weights="none")
    model, head = classifier.model, classifier.head
    last = list(model._modules)[-2:]
    plan = freeze(model, ["freeze:*.bias", "[-2:]", "head"], head=head)
    expected = [key for key, _ in model.named_parameters() if key.split(".")[0] in last and not key.endswith(".bias")]
    assert list(plan.trainable) == expected
    assert [key for key, p in model.named_parameters() if p.requires_grad] == expected
    (tmp_path / "plan.json").write_text(json.dumps(plan.content()))
    assert freeze(model, read(tmp_path / "plan.json")).trainable == plan.trainable


def _stays_frozen(model: nn.Module) -> bool:
    model.train()
    frozen = [model.conv, model.bn, *model.block.modules()]
    return model.training and model.fc.training and not any(module.training for module in frozen)


def _answer(model: nn.Module, answers: multiprocessing.SimpleQueue) -> None:
    answers.put(_stays_frozen(model))


def test_a_frozen_model_is_saved_copied_and_sent_whole(tiny, tmp_path):
    freeze(tiny, ["fc"])
    images = torch.randn(2, 3, 8, 8)
    parts = split_model(tiny, images)
    expected = tiny.eval()(images)
    torch.save(tiny, tmp_path / "whole.pt")
    twins = [
        torch.load(tmp_path / "whole.pt", weights_only=False),
        pickle.loads(pickle.dumps(tiny)),
        copy.deepcopy(tiny),
    ]
    for twin in twins:
        assert type(twin) is type(tiny)
        assert torch.equal(twin.eval()(images), expected)
        assert _stays_frozen(twin)
        assert frozen_tensors(twin).keys() == frozen_tensors(tiny).keys()
        freeze(twin, ["all"])
        assert twin.bn.training
        assert not tiny.bn.training, "the twin's lock was its own"
    assert torch.equal(parts.tail.eval()(*copy.deepcopy(parts.trunk)(images)), expected)
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_answer, args=(tiny, answers))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answers.get() is True
