"""Leave-one-out predictions are those of fits without the sample; moments add up."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import DataError
from trainer.heads.ridge import Moments, Score, ridge


def data(samples: int, size: int, *, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(samples) % (classes - 1)
    labels[0] = classes - 1  # a class of one sample
    features = torch.randn(samples, size, generator=generator, dtype=torch.float64) + 3
    features[:, 0] += labels
    features[:, 1] = 7.0  # tells nothing
    return features, labels


def solved(x: Tensor, labels: Tensor, strength: float, *, classes: int = 4) -> tuple[Tensor, Tensor]:
    y = F.one_hot(labels, classes).double()
    centred = x - x.mean(dim=0)
    left = centred.T @ centred + strength * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(left, centred.T @ (y - y.mean(dim=0))).T
    return weight, y.mean(dim=0) - weight @ x.mean(dim=0)


@pytest.mark.parametrize(("samples", "size"), [(30, 6), (12, 40), (20, 20)])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_a_sample_left_out_is_predicted_as_by_a_fit_without_it(samples, size, strength):
    x, labels = data(samples, size)
    found = ridge(x, labels, classes=4, strengths=torch.tensor([strength], dtype=torch.float64))
    expected = []
    for out in range(samples):
        rest = torch.arange(samples) != out
        weight, bias = solved(x[rest], labels[rest], strength)
        expected.append(weight @ x[out] + bias)
    expected = torch.stack(expected)
    torch.testing.assert_close(found.scores, expected, rtol=1e-8, atol=1e-10)
    assert found.accuracy[0] == (expected.argmax(dim=1) == labels).double().mean()
    residual = F.one_hot(labels, 4) - expected
    torch.testing.assert_close(found.error[0], residual.square().mean(), rtol=1e-8, atol=0)
    weight, bias = solved(x, labels, strength)
    torch.testing.assert_close(found.weight, weight, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(found.bias, bias, rtol=1e-7, atol=1e-9)


def test_both_branches_agree_on_all_strengths():
    x, labels = data(20, 20)
    dual = ridge(x, labels, classes=4)
    primal = Moments.of(x, labels, classes=4).decompose()
    fit = primal.fit([(x, labels)], dual.strengths[10:])
    torch.testing.assert_close(fit.error, dual.error[10:], rtol=1e-4, atol=0)
    assert len(dual.strengths) == 50
    assert dual.accuracy[dual.best] == dual.accuracy.max()


def test_moments_and_scores_add_up():
    x, labels = data(50, 8)
    parts = [Moments.of(x[s], labels[s], classes=4) for s in (slice(0, 7), slice(7, 30), slice(30, 50))]
    spectrum = (parts[0] + parts[1] + parts[2]).decompose()
    strengths = spectrum.strengths()
    score = spectrum.score(x[:11], labels[:11], strengths) + spectrum.score(x[11:], labels[11:], strengths)
    whole, found = ridge(x, labels, classes=4), spectrum.chosen(score, strengths)
    torch.testing.assert_close(found.strengths, whole.strengths)
    torch.testing.assert_close(found.weight, whole.weight)
    torch.testing.assert_close(found.accuracy, whole.accuracy, rtol=0, atol=0)
    torch.testing.assert_close(found.error, whole.error)
    assert found.best == whole.best
    assert whole.scores.shape == (50, 4)


def test_among_equal_accuracies_the_lowest_error_wins():
    strengths = torch.ones(3, dtype=torch.float64)
    score = Score(4, torch.tensor([2.0, 3.0, 3.0]), torch.tensor([0.1, 0.9, 0.5]))
    assert score.best() == 2
    assert (Score.zero(strengths) + score).count == 4


def test_features_that_tell_nothing_or_are_no_numbers():
    labels = torch.tensor([0, 1, 0])
    found = ridge(torch.ones(3, 5), labels, classes=2)
    assert found.weight.abs().max() == 0
    assert found.scores.isfinite().all()
    with pytest.raises(DataError, match="not finite"):
        ridge(torch.full((3, 5), torch.nan), labels, classes=2)
    with pytest.raises(DataError, match="at least 2"):
        ridge(torch.ones(1, 5), labels[:1], classes=2)
