"""A fast trunk gives what the plain one gives, and leaves it alone."""

import pytest
import torch
from accelerate import Accelerator
from test_split import FAMILIES, _build
from torch import nn

from trainer.freezing import fingerprint, freeze
from trainer.split import split_model
from trainer.trunk import FastTrunk, folded_copy


@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_it_is_folded_and_the_model_stays_as_it_is(name):
    model, images = _build(name)
    freeze(model, [FAMILIES[name][0]])
    trunk = split_model(model, images).trunk
    before, expected = fingerprint(model), trunk(images)
    fast = FastTrunk(Accelerator(cpu=True), trunk, images)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    assert "folded, channels last" in fast.what, fast.what
    left = sum(isinstance(module, nn.BatchNorm2d) for module in fast.module.modules())
    assert left < norms or norms == 0
    for one, other in zip(fast(images), expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
        assert not one.requires_grad
    assert fingerprint(model) == before
    assert all(torch.equal(one, other) for one, other in zip(trunk(images), expected, strict=True))


class _Odd(nn.Module):
    """A convolution that is used twice, one whose value is also read elsewhere, and one that may be folded."""

    def __init__(self):
        super().__init__()
        self.twice, self.read, self.plain = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.norms[0](self.twice(x)) + self.norms[1](self.twice(x.relu()))
        y = self.read(x)
        return self.norms[3](self.plain(self.norms[2](y) + y))


def test_only_what_nothing_else_reads_is_folded():
    model = _Odd().eval()
    copy, folded = folded_copy(model)
    assert folded == 1
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(copy(images), model(images))


def test_a_trunk_that_cannot_be_followed_runs_as_it_is():
    class Branch(nn.Module):
        def forward(self, x):
            return (x if x.sum() > 0 else -x,)

    fast = FastTrunk(Accelerator(cpu=True), Branch(), torch.ones(2, 3, 4, 4))
    assert fast.what == "as it is"
    assert torch.equal(fast(-torch.ones(1, 3, 4, 4))[0], torch.ones(1, 3, 4, 4))


def test_a_copy_that_is_wrong_is_not_used(tiny, monkeypatch):
    def wrong(trunk):
        copy, folded = folded_copy(trunk)
        for parameter in copy.parameters():
            parameter.data += 0.01
        return copy, folded

    monkeypatch.setattr("trainer.trunk.folded_copy", wrong)
    freeze(tiny, ["fc"])
    images = torch.randn(2, 3, 8, 8)
    assert FastTrunk(Accelerator(cpu=True), split_model(tiny, images).trunk, images).what == "as it is"


def test_compiling_is_chosen_by_the_time_it_saves(tiny, monkeypatch):
    freeze(tiny, ["fc"])
    images = torch.randn(4, 3, 8, 8)
    fast = FastTrunk(Accelerator(cpu=True), split_model(tiny, images).trunk, images)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
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
    fast = FastTrunk(Accelerator(cpu=True), split_model(tiny, images).trunk, images)
    before = fast(images)
    assert fast.gain_of_bf16(images) > 0
    assert torch.equal(fast(images)[0], before[0])
    assert fast(images)[0].dtype == torch.float32
