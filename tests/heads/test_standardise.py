"""A layer trained on scaled features, folded, reads raw ones."""

import pytest
import torch
import torch.nn.functional as F

from trainer.errors import UsageError
from trainer.heads.standardise import Scaling


def features(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[1] + 1).view(
        -1, *[1] * (len(shape) - 2)
    )
    x[:, 2] = 5.0
    return x + 10


@pytest.mark.parametrize("by", ["feature", "norm"])
def test_logits_are_equal(by):
    x = features(40, 6)
    scaling = Scaling.of(x, by=by)
    weight, bias = torch.randn(3, 6), torch.randn(3)
    expected, found = scaling(x) @ weight.T + bias, F.linear(x, *scaling.fold(weight, bias))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    x, weight, bias = x.double(), weight.double(), bias.double()
    torch.testing.assert_close(
        F.linear(x, *scaling.fold(weight, bias)), scaling(x) @ weight.T + bias, rtol=1e-6, atol=0
    )


def test_scales():
    x = features(400, 6)
    scaled = Scaling.of(x)(x)
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(6), rtol=0, atol=1e-5)
    expected = torch.tensor([1.0, 1, 0, 1, 1, 1])  # the third is constant: moved, not scaled
    torch.testing.assert_close(scaled.std(dim=0, correction=0), expected, rtol=1e-4, atol=1e-5)
    normed = Scaling.of(x, by="norm")
    assert normed(x).square().sum(dim=1).mean() == pytest.approx(6, rel=1e-5)
    assert len(set(normed.scale.tolist())) == 1


def test_kernels_over_maps():
    x = features(10, 6, 5, 5)
    scaling, weight, bias = Scaling.of(x), torch.randn(3, 6, 3, 3), torch.randn(3)
    found = F.conv2d(x.double(), *(part.double() for part in scaling.fold(weight.double(), bias.double())))
    torch.testing.assert_close(
        found, F.conv2d(scaling(x.double()), weight.double(), bias.double()), rtol=1e-6, atol=1e-9
    )
    with pytest.raises(UsageError, match="pads"):
        scaling.fold(weight, bias, padding=True)
    Scaling.of(x, by="norm").fold(weight, bias, padding=True)


def test_nothing_to_scale():
    x = torch.zeros(4, 3)
    for by in ("feature", "norm"):
        assert torch.equal(Scaling.of(x, by=by)(x), x)
