"""Values that are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from trainer.heads.calibration import temperature


def test_temperature_is_found_and_lowers_the_nll():
    # Of two classes with logit difference d, 3 of 4 right: the best T has sigmoid(d / T) = 3/4, T = d / ln 3.
    logits, labels = torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    found = temperature(logits, labels)
    assert found == pytest.approx(4 / math.log(3), rel=1e-9)
    for other in (found * 1.01, found / 1.01):
        assert F.cross_entropy(logits / found, labels) < F.cross_entropy(logits / other, labels)


def test_temperatures_at_the_bounds():
    assert temperature(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == pytest.approx(1e-3)
    assert temperature(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == pytest.approx(1e3)
    assert temperature(torch.ones(3, 2), torch.tensor([0, 1, 0])) == 1.0
