"""A fast trunk gives what the plain one gives, and leaves it alone."""

import re

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, build
from torch import nn

from trainer.model.freezing import fingerprint, freeze
from trainer.model.split import split_model
from trainer.trunk.fast import FastTrunk
from trainer.trunk.fusion import folded_copy, fuse_convolutions


@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_it_is_folded_and_the_model_stays_as_it_is(name):
    model, images = build(name)
    freeze(model, [FAMILIES[name][0]])
    trunk = split_model(model, images).trunk
    before, expected = fingerprint(model), trunk(images)
    fast = FastTrunk(Accelerator(cpu=True), trunk, images)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    assert re.match(r"\d+ BatchNorms folded, \d+ convolutions fused with what follows, channels last", fast.what)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in fast.module.modules())
    assert left < norms or norms == 0
    for one, other in zip(fast(images), expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
        assert not one.requires_grad
    assert fingerprint(model) == before
    assert all(torch.equal(one, other) for one, other in zip(trunk(images), expected, strict=True))


def test_a_trunk_that_cannot_be_followed_runs_as_it_is():
    class Branch(nn.Module):
        def forward(self, x):
            return (x if x.sum() > 0 else -x,)

    fast = FastTrunk(Accelerator(cpu=True), Branch(), torch.ones(2, 3, 4, 4))
    assert fast.what == "as it is"
    assert torch.equal(fast(-torch.ones(1, 3, 4, 4))[0], torch.ones(1, 3, 4, 4))


def _fast(model, images):
    return FastTrunk(Accelerator(cpu=True), split_model(model, images).trunk, images)


def test_a_copy_that_is_wrong_is_not_used(tiny, monkeypatch):
    def wrong(trunk):
        copy, folded = folded_copy(trunk)
        for parameter in copy.parameters():
            parameter.data += 0.01
        return copy, folded

    monkeypatch.setattr("trainer.trunk.fast.folded_copy", wrong)
    freeze(tiny, ["fc"])
    images = torch.randn(2, 3, 8, 8)
    assert _fast(tiny, images).what == "as it is"


def test_a_fused_copy_that_is_wrong_is_not_used(tiny, monkeypatch):
    def wrong(module, sample):
        fuse_convolutions(module, sample)
        module.fused_0.bias.data += 1
        return 1

    monkeypatch.setattr("trainer.trunk.fast.fuse_convolutions", wrong)
    freeze(tiny, ["fc"])
    images = torch.randn(2, 3, 8, 8)
    assert re.fullmatch(r"\d BatchNorms? folded, channels last, float32", _fast(tiny, images).what)


def test_compiling_is_chosen_by_the_time_it_saves(tiny, monkeypatch):
    freeze(tiny, ["fc"])
    images = torch.randn(4, 3, 8, 8)
    fast = _fast(tiny, images)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    fast.seconds = 0.1
    assert not fast.compile(images.shape, images=100_000)  # its convolutions are fused as the compiler would
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fast = _fast(tiny, images)
    fast.seconds = 0.1
    assert not fast.compile(images.shape, images=100)
    assert compiled == []
    assert fast.compile(images.shape, images=100_000)
    assert fast.compiled
    assert len(compiled) == 1
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda images: (torch.zeros(4, 8),))
    assert not fast.compile(images.shape)
    assert not fast.compiled


def test_what_bf16_would_gain_is_measured_and_changes_nothing(tiny):
    freeze(tiny, ["fc"])
    images = torch.randn(4, 3, 8, 8)
    fast = _fast(tiny, images)
    before = fast(images)
    assert fast.gain_of_bf16(images) > 0
    assert torch.equal(fast(images)[0], before[0])
    assert fast(images)[0].dtype == torch.float32


def test_many_images_go_through_it_in_turn(tiny):
    freeze(tiny, ["fc"])
    images, sizes = torch.randn(10, 3, 8, 8), []
    fast = _fast(tiny, images[:2])
    fast.most = 4
    fast.module.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    (features,) = fast(images)
    assert sizes == [4, 4, 2]
    assert torch.equal(features, torch.cat([fast(some)[0] for some in images.split(4)]))


def test_a_trunk_with_nothing_to_fuse_may_be_compiled(monkeypatch):
    class Plain(nn.Module):
        def forward(self, x):
            return (x.flatten(1) * 2,)

    images, compiled = torch.randn(4, 3, 8, 8), []
    fast = FastTrunk(Accelerator(cpu=True), Plain(), images)
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    fast.seconds = 0.1
    assert fast.compile(images.shape, images=100_000)
    assert len(compiled) == 1
