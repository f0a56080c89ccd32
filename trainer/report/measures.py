"""Measures of a classifier, from its logits and the labels: integers are counted first, then divided."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_CHUNK = 2**22  # values of [images, classes] in float64 at a time: 32 MiB


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model answered to each of N images.

    Attributes:
        labels: `[N]`, true classes.
        predicted: `[N]`, the class of the highest logit; of equals the first.
        ranks: `[N]`, how many classes come before the true one: 0 is a hit.
        confidence: `[N]`, the probability of the predicted class.
        own: `[N]`, the probability of the true class.
        nll: `[N]`, negative log-likelihood of the true class, in nats.
        brier: `[N]`, squared distance of the probabilities from the truth, summed over classes, 0 to 2 (Brier 1950).
    """

    labels: np.ndarray
    predicted: np.ndarray
    ranks: np.ndarray
    confidence: np.ndarray
    own: np.ndarray
    nll: np.ndarray
    brier: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """`[N]`, whether each image was classified as it is labelled."""
        return self.ranks == 0


@dataclass(frozen=True)
class Averages:
    """Precision, recall and F1, averaged over classes."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class PerClass:
    """Measures of each of C classes, all of shape `[C]`.

    Attributes:
        images: how many there are.
        predicted: how many images were taken for this class.
        hits: how many of both.
        precision: hits / predicted, 0 where nothing was predicted.
        recall: hits / images, 0 where there are no images.
        f1: 2 hits / (images + predicted), 0 where both are 0.
        confidence: mean confidence of the answers to its images, NaN where there are none.
    """

    images: np.ndarray
    predicted: np.ndarray
    hits: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True, eq=False)
class Bins:
    """Answers by confidence, in B equal bins from 0 to 1; all of shape `[B]`, means are NaN where a bin is empty."""

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error (Guo et al. 2017): the mean gap of confidence and accuracy, over images."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float(np.nansum(gaps * self.images) / self.images.sum())


@dataclass(frozen=True, eq=False)
class Scores:
    """All measures of one run.

    Attributes:
        images: N.
        hits: images whose highest logit is that of their class.
        hits_in_5: images whose class is among the five highest; None for five classes or fewer.
        balanced: mean recall of the classes that have images.
        macro: means over the classes that occur among labels or predictions.
        weighted: means weighted by the images of each class.
        nll: mean negative log-likelihood, in nats.
        brier: mean Brier score, 0 to 2.
        confusion: `[C, C]`, number of images by true class (row) and predicted class (column).
    """

    images: int
    hits: int
    hits_in_5: int | None
    balanced: float
    macro: Averages
    weighted: Averages
    nll: float
    brier: float
    bins: Bins
    per_class: PerClass
    confusion: np.ndarray


def answers(logits: np.ndarray, labels: np.ndarray) -> Answers:
    """What the model answered, from logits `[N, C]` and labels `[N]`; computed in float64."""
    images, classes = logits.shape
    labels = labels.astype(np.int64)
    found: list[list[np.ndarray]] = []
    for start in range(0, images, rows := max(1, _CHUNK // classes)):
        part, label = logits[start : start + rows].astype(np.float64), labels[start : start + rows, None]
        part -= part.max(1, keepdims=True)
        true = np.take_along_axis(part, label, 1)  # [rows, 1]
        ranks = ((part > true) | ((part == true) & (np.arange(classes) < label))).sum(1)
        weights = np.exp(part)
        total = weights.sum(1, keepdims=True)
        chances = weights / total
        own = np.take_along_axis(chances, label, 1)[:, 0]
        brier = (chances**2).sum(1) - own**2 + (1 - own) ** 2
        found.append([part.argmax(1), ranks, chances.max(1), own, (np.log(total) - true)[:, 0], brier])
    return Answers(labels, *(np.concatenate(column) for column in zip(*found, strict=True)))


def scores(given: Answers, *, classes: int) -> Scores:
    """All measures of answers among `classes` classes."""
    confusion = confusion_matrix(given.labels, given.predicted, classes=classes)
    per = per_class(confusion, np.bincount(given.labels, given.confidence, classes))
    occurs = (per.images > 0) | (per.predicted > 0)
    measures = (per.precision, per.recall, per.f1)
    return Scores(
        images=len(given.labels),
        hits=int(per.hits.sum()),
        hits_in_5=int((given.ranks < 5).sum()) if classes > 5 else None,
        balanced=float(per.recall[per.images > 0].mean()),
        macro=Averages(*(float(values[occurs].mean()) for values in measures)),
        weighted=Averages(*(float(values @ per.images / per.images.sum()) for values in measures)),
        nll=float(given.nll.mean()),
        brier=float(given.brier.mean()),
        bins=calibration(given.confidence, given.hits),
        per_class=per,
        confusion=confusion,
    )


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, *, classes: int) -> np.ndarray:
    """`[C, C]`, number of images by true class (row) and predicted class (column)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(confusion: np.ndarray, confidence: np.ndarray) -> PerClass:
    """Measures of each class, from the confusion matrix `[C, C]` and the summed confidence of its images `[C]`."""
    images, predicted, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    shares = (_ratio(hits, predicted), _ratio(hits, images), _ratio(2 * hits, images + predicted))
    return PerClass(images, predicted, hits, *shares, _ratio(confidence, images, empty=math.nan))


def calibration(confidence: np.ndarray, hits: np.ndarray, *, bins: int = 15) -> Bins:
    """Answers by confidence `[N]`, with hits `[N]`; a bin includes its upper bound, not its lower one."""
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    images = np.bincount(which, minlength=bins)
    sums = (np.bincount(which, values, bins) for values in (confidence, hits))
    return Bins(images, *(_ratio(values, images, empty=math.nan) for values in sums))


def wilson(hits: int, images: int, *, level: float = 0.95) -> tuple[float, float]:
    """Bounds of a proportion, at a level of confidence (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / images, z * z / images
    centre = share + spread / 2
    width = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (centre - width) / (1 + spread), (centre + width) / (1 + spread)
    return (low if hits else 0.0), (high if hits < images else 1.0)  # where rounding would leave a trace


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Whether two runs differ on the same images, by McNemar's exact test (1947).

    Args:
        first: `[N]`, whether the first run classified each image correctly.
        second: `[N]`, the same of the second run.

    Returns:
        the images that only the first got right, those that only the second did, and the probability (two-sided) of a
        split at least as uneven if both runs were equally good.
    """
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    changed, term, tail = lost + gained, 1, 0
    for k in range(min(lost, gained) + 1):
        tail += term  # the binomial coefficient of k out of those changed, as an integer of any size
        term = term * (changed - k) // (k + 1)
    return lost, gained, min(1.0, 2 * tail / 2**changed)


def _ratio(values: np.ndarray, of: np.ndarray, *, empty: float = 0.0) -> np.ndarray:
    return np.divide(values, of, out=np.full(len(of), empty), where=of > 0)
