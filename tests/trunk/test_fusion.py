"""Folded and fused copies compute what the original computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainer.trunk.fusion import folded_copy, fuse_convolutions


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


class _Chain(nn.Module):
    """Convolutions with all that may follow one, and some things that must not be taken for it."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(9))
        self.activations = nn.ModuleList([nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.SiLU()])

    def forward(self, x):
        a, b, c, d, e, f, g, h, i = self.convs
        x = self.activations[0](a(x))
        x = self.activations[1](10 * b(x)) + self.activations[1](c(x))
        x = self.activations[2](d(x))
        x = functional.relu(e(x) + x)  # a sum, and an activation
        x = self.activations[2](f(x) + x)  # only the sum: SiLU does not go with one
        y = g(x)
        x = y + y.relu()  # read twice: nothing
        x = h(x) + x.mean((2, 3), keepdim=True)  # of another shape: nothing
        return torch.add(i(x), x, alpha=2)  # more than a sum: nothing


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this CPU has no oneDNN")
def test_sums_and_activations_are_fused_into_convolutions():
    model = _Chain().eval().requires_grad_(False)
    copy, _ = folded_copy(model)
    assert fuse_convolutions(copy, torch.randn(2, 8, 6, 6)) == 5
    for count in (1, 2, 5):  # more and fewer than it was made for
        images = torch.randn(count, 8, 6, 6)
        torch.testing.assert_close(copy(images), model(images), rtol=1e-4, atol=1e-4)
    left = [node.name for node in copy.graph.nodes if node.op != "placeholder" and "fused" not in node.name]
    assert sum("activations" in name or "relu" in name for name in left) == 3, left  # ReLU6 of 10 b, SiLU of f, of y
