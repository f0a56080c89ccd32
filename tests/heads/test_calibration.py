"""Values that are known."""

import math

import pytest
import torch

from trainer.heads.calibration import brier, calibration_error, nll, temperature, wilson


def test_temperature_is_found_and_lowers_the_nll():
    # Of two classes with logit difference d, 3 of 4 right: the best T has sigmoid(d / T) = 3/4, T = d / ln 3.
    logits, labels = torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    found = temperature(logits, labels)
    assert found == pytest.approx(4 / math.log(3), rel=1e-9)
    assert nll(logits / found, labels) < nll(logits / (found * 1.01), labels)
    assert nll(logits / found, labels) < nll(logits / (found / 1.01), labels)


def test_temperatures_at_the_bounds():
    assert temperature(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == pytest.approx(1e-3)
    assert temperature(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == pytest.approx(1e3)
    assert temperature(torch.ones(3, 2), torch.tensor([0, 1, 0])) == 1.0


def test_scores_of_known_probabilities():
    logits, labels = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log(), torch.tensor([0, 1])
    assert nll(logits, labels) == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2, rel=1e-6)
    assert brier(logits, labels) == pytest.approx((0.08 + 0.72) / 2, rel=1e-6)
    assert calibration_error(logits, labels) == pytest.approx((0.2 + 0.6) / 2, rel=1e-6)  # one in each of two bins
    assert calibration_error(logits, labels, bins=1) == pytest.approx(abs(0.5 - 0.7), rel=1e-6)


def test_wilson():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe (1998), table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0
