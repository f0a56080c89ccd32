"""Leave-one-out predictions are those of fits without the sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import DataError
from trainer.heads import ridge as module
from trainer.heads.ridge import left_out, ridge


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


@pytest.mark.parametrize("values", [20, 2**24])
@pytest.mark.parametrize(("samples", "size"), [(30, 6), (12, 40), (20, 20)])
def test_a_sample_left_out_is_predicted_as_by_a_fit_without_it(monkeypatch, samples, size, values):
    monkeypatch.setattr(module, "_VALUES", values)  # 20: blocks of a few samples
    x, labels = data(samples, size)
    strengths = torch.tensor([1e-3, 1.0, 100.0], dtype=torch.float64)
    found = ridge(x, labels, classes=4, strengths=strengths)
    for place, strength in enumerate(strengths.tolist()):
        expected = []
        for out in range(samples):
            rest = torch.arange(samples) != out
            weight, bias = solved(x[rest], labels[rest], strength)
            expected.append(weight @ x[out] + bias)
        scores = torch.stack(expected)
        torch.testing.assert_close(left_out(x, labels, classes=4, strength=strength), scores, rtol=1e-8, atol=1e-8)
        assert found.accuracy[place] == (scores.argmax(dim=1) == labels).double().mean()
        error = (F.one_hot(labels, 4) - scores).square().mean()
        torch.testing.assert_close(found.error[place], error, rtol=1e-8, atol=0)


def test_in_float32_it_is_the_same_but_for_the_last_digits(monkeypatch):
    x, labels = data(200, 30)
    exact = ridge(x, labels, classes=4)
    monkeypatch.setattr(module, "_MANY", 0)
    found = ridge(x, labels, classes=4)
    torch.testing.assert_close(found.error, exact.error, rtol=1e-4, atol=0)
    assert found.error.ne(exact.error).any()
    assert (found.accuracy - exact.accuracy).abs().max() <= 1 / 200


def test_both_branches_agree_on_all_strengths():
    x, labels = data(21, 21)
    gram = ridge(x, labels, classes=4)
    covariance = ridge(x[:, :20], labels, classes=4, strengths=gram.strengths)
    again = ridge(torch.cat([x[:, :20], x[:, 1:2]], dim=1), labels, classes=4, strengths=gram.strengths)
    torch.testing.assert_close(covariance.error[10:], again.error[10:], rtol=1e-4, atol=0)  # a constant changes nothing
    assert len(gram.strengths) == 50
    assert gram.accuracy[gram.best] == gram.accuracy.max()
    equals = [s for s in range(50) if gram.accuracy[s] == gram.accuracy.max()]
    assert gram.best == min(equals, key=lambda s: float(gram.error[s]))


def test_many_classes_get_fewer_strengths():
    x, labels = data(30, 6)
    assert [len(ridge(x, labels, classes=classes).strengths) for classes in (50, 250, 2000)] == [50, 10, 5]


def test_features_that_tell_nothing_or_are_no_numbers():
    labels = torch.tensor([0, 1, 0])
    for size in (2, 5):
        found = ridge(torch.ones(3, size), labels, classes=2)
        assert found.error.isfinite().all()
        with pytest.raises(DataError, match="not finite"):
            ridge(torch.full((3, size), torch.nan), labels, classes=2)
    with pytest.raises(DataError, match="at least 2"):
        ridge(torch.ones(1, 5), labels[:1], classes=2)
