"""Measures of a classifier, against numbers worked out by hand, published ones, and those of scikit-learn."""

import math

import numpy as np
import pytest

from trainer.measures import (
    answers,
    average_precisions,
    calibration,
    confusion_matrix,
    coverage,
    f1_of_sets,
    mcnemar,
    scores,
    wilson,
)

# Six images of three classes by their probabilities; the third class is never predicted.
CHANCES = np.array(
    [
        [0.7, 0.2, 0.1],
        [0.6, 0.3, 0.1],
        [0.1, 0.8, 0.1],
        [0.2, 0.5, 0.3],
        [0.9, 0.05, 0.05],
        [0.3, 0.4, 0.3],
    ]
)
LABELS = np.array([0, 0, 1, 1, 1, 2])


@pytest.fixture
def found():
    return scores(answers(np.log(CHANCES), LABELS))


def test_counts_by_hand(found):
    assert (found.hits, found.images, found.hits_in_5) == (4, 6, None)
    assert found.confusion.tolist() == [[2, 0, 0], [1, 2, 0], [0, 1, 0]]
    per = found.per_class
    assert per.images.tolist() == [2, 3, 1]
    assert per.predicted.tolist() == [3, 3, 0]
    assert per.hits.tolist() == [2, 2, 0]


def test_shares_by_hand(found):
    per = found.per_class
    assert per.precision.tolist() == [2 / 3, 2 / 3, 0]
    assert per.recall.tolist() == [1, 2 / 3, 0]
    assert per.f1.tolist() == [4 / 5, 4 / 6, 0]
    assert per.confidence == pytest.approx([0.65, (0.8 + 0.5 + 0.9) / 3, 0.4], abs=1e-15)
    assert found.balanced == pytest.approx((1 + 2 / 3) / 3, abs=1e-15)
    assert found.macro.f1 == pytest.approx((4 / 5 + 4 / 6) / 3, abs=1e-15)
    assert found.weighted.recall == pytest.approx(4 / 6, abs=1e-15)
    assert found.weighted.precision == pytest.approx((2 * 2 / 3 + 3 * 2 / 3) / 6, abs=1e-15)


def test_probabilities_by_hand(found):
    assert found.nll == pytest.approx(-math.log(0.7 * 0.6 * 0.8 * 0.5 * 0.05 * 0.3) / 6, abs=1e-14)
    squares = [0.09 + 0.04 + 0.01, 0.16 + 0.09 + 0.01, 0.01 + 0.04 + 0.01, 0.04 + 0.25 + 0.09]
    squares += [0.81 + 0.95**2 + 0.05**2, 0.09 + 0.16 + 0.49]
    assert found.brier == pytest.approx(sum(squares) / 6, abs=1e-14)


def test_calibration_by_hand():
    bins = calibration(np.array([0.5, 0.45, 1.0, 0.9, 0.2]), np.array([True, False, True, False, True]), bins=5)
    assert bins.images.tolist() == [1, 0, 2, 0, 2]  # a bin includes its upper bound
    assert bins.confidence[[0, 2, 4]] == pytest.approx([0.2, 0.475, 0.95])
    assert bins.accuracy[[0, 2, 4]].tolist() == [1, 0.5, 0.5]
    assert np.isnan(bins.accuracy[[1, 3]]).all()
    assert bins.ece == pytest.approx((0.8 + 2 * 0.025 + 2 * 0.45) / 5)


def test_equal_logits_are_decided_as_argmax_does():
    given = answers(np.zeros((3, 7)), np.array([0, 4, 5]))
    assert given.predicted.tolist() == [0, 0, 0]
    assert given.ranks.tolist() == [0, 4, 5]
    assert scores(given).hits_in_5 == 2


def test_large_logits_and_many_rows():
    logits = np.tile([[1e4, 0.0], [-1e4, 1e4]], (2**21, 1)).astype(np.float32)  # more than are computed at a time
    given = answers(logits, np.tile([0, 0], 2**21))
    assert (given.nll[:2].tolist(), given.brier[:2].tolist()) == ([0, 2e4], [0, 2])
    assert given.hits.sum() == 2**21


@pytest.mark.parametrize(  # Newcombe 1998, table I
    ("hits", "images", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(hits, images, low, high):
    assert wilson(hits, images) == pytest.approx((low, high), abs=5e-5)
    assert wilson(images - hits, images) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_mcnemar_by_hand():
    first, second = np.zeros(20, dtype=bool), np.zeros(20, dtype=bool)
    first[0], second[1:10], first[15:], second[15:] = True, True, True, True
    assert mcnemar(first, second) == (1, 9, 2 * (1 + 10) / 2**10)
    assert mcnemar(second, first) == (9, 1, 22 / 1024)
    assert mcnemar(first, first) == (0, 0, 1)
    first[:], second[:] = np.arange(20) < 10, np.arange(20) >= 10
    assert mcnemar(first, second) == (10, 10, 1)


def test_mcnemar_of_many_images():
    first = np.arange(20_000) < 9_000
    lost, gained, chance = mcnemar(first, ~first)
    assert (lost, gained) == (9_000, 11_000)
    assert 0 < chance < 1e-40


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 11, 500)  # the last of 12 classes has no images
    logits = rng.normal(size=(500, 12)) + 1.5 * np.eye(12)[labels]
    given = answers(logits, labels)
    found = scores(given)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = chances.argmax(1)
    assert found.hits == metrics.accuracy_score(labels, predicted, normalize=False)
    every = np.arange(12)
    assert found.hits_in_5 == metrics.top_k_accuracy_score(labels, logits, k=5, labels=every, normalize=False)
    assert found.balanced == pytest.approx(np.mean([(predicted == k)[labels == k].mean() for k in range(11)]))
    assert (found.confusion == metrics.confusion_matrix(labels, predicted, labels=every)).all()
    assert found.nll == pytest.approx(metrics.log_loss(labels, chances, labels=every))
    for kind in ("macro", "weighted"):
        mine = getattr(found, kind)
        theirs = metrics.precision_recall_fscore_support(labels, predicted, average=kind, zero_division=0)[:3]
        assert (mine.precision, mine.recall, mine.f1) == pytest.approx(theirs)
    per = metrics.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    assert found.per_class.precision == pytest.approx(per[0])
    assert found.per_class.recall == pytest.approx(per[1])
    assert found.per_class.f1 == pytest.approx(per[2])
    assert (found.per_class.images == per[3]).all()


def test_confusion_keeps_classes_that_do_not_occur():
    assert confusion_matrix(np.array([0]), np.array([2]), classes=4).tolist() == [[0, 0, 1, 0], *[[0] * 4] * 3]


def test_coverage_by_hand():
    given = answers(np.log(CHANCES), LABELS)
    assert coverage(given, threshold=0.65) == (3, 2)  # 0.7, 0.8 and 0.9, of which the last is wrong
    assert coverage(given, threshold=1) == (0, 0)


def test_several_classes_of_an_image_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 5)) < [0.5, 0.1, 0.9, 0.3, 0]).astype(np.float32)  # the last class has no images
    outputs = (rng.normal(size=(200, 5)) + labels).round(1)  # with equal ones
    found = average_precisions(outputs, labels)
    expected = metrics.average_precision_score(labels[:, :4], outputs[:, :4], average=None)
    assert found[:4] == pytest.approx(expected)
    assert np.isnan(found[4])
    per_class, micro = f1_of_sets(outputs > 0, labels)
    assert per_class == pytest.approx(metrics.f1_score(labels, outputs > 0, average=None, zero_division=0))
    assert micro == pytest.approx(metrics.f1_score(labels, outputs > 0, average="micro"))
