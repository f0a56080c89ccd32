"""Measures of a classifier, from its logits: accuracy, F1, NLL, Brier score, calibration, confidence intervals.

    found = scores(answers(logits, labels))
    found.hits / found.images, found.macro.f1, found.nll, found.bins.ece
    low, high = wilson(found.hits, found.images)

Counts stay integers until the last division, and probabilities are computed in float64.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

_CHUNK = 2**22  # values of [images, classes] in float64 at a time: 32 MiB


@dataclass(frozen=True, eq=False)
class Answers:
    """The predictions of a model for N images, one value per image.

    Attributes:
        classes: C, the number of classes.
        labels: int64 `[N]`, the true classes.
        predicted: int64 `[N]`, the class of the highest logit; the first of equal ones.
        ranks: int64 `[N]`, the place of the true class when classes are sorted by logit: 0 is a correct prediction.
        confidence: float64 `[N]`, the probability of the predicted class.
        own: float64 `[N]`, the probability of the true class.
        nll: float64 `[N]`, the negative log-likelihood of the true class, in nats.
        brier: float64 `[N]`, the squared distance of the probabilities from the one-hot label, 0 to 2 (Brier, 1950).
    """

    classes: int
    labels: np.ndarray
    predicted: np.ndarray
    ranks: np.ndarray
    confidence: np.ndarray
    own: np.ndarray
    nll: np.ndarray
    brier: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Bool `[N]`: whether each prediction is correct."""
        return self.ranks == 0


@dataclass(frozen=True)
class Averages:
    """Precision, recall and F1, averaged over classes; 0 to 1."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class PerClass:
    """Measures of each of C classes, all of shape `[C]`.

    Attributes:
        images: number of images of this class.
        predicted: number of images for which this class was predicted.
        hits: number of images of this class for which it was predicted.
        precision: hits / predicted; 0 where the class was never predicted.
        recall: hits / images; 0 where the class has no images.
        f1: 2 hits / (images + predicted); 0 where both are 0.
        confidence: mean confidence of the predictions for its images; NaN where it has none.
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
    """Predictions grouped by confidence in B bins of equal width from 0 to 1, all of shape `[B]`.

    Attributes:
        images: number of images.
        confidence: mean confidence; NaN in an empty bin.
        accuracy: share of correct predictions; NaN in an empty bin.
    """

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean over images of |accuracy − confidence| (Naeini et al., 2015)."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float(np.nansum(gaps * self.images) / self.images.sum())


@dataclass(frozen=True, eq=False)
class Scores:
    """All measures of a model on one set of N images.

    Attributes:
        images: N.
        hits: number of correct predictions; `hits / images` is the accuracy.
        hits_in_5: number of images whose class is among the five highest logits; None for five classes or fewer.
        balanced: balanced accuracy, the mean recall of the classes that have images.
        macro: means over the classes that occur among labels or predictions.
        weighted: means weighted by the number of images of each class.
        nll: mean negative log-likelihood, in nats.
        brier: mean Brier score, 0 to 2.
        bins: predictions by confidence; `bins.ece` is the expected calibration error.
        per_class: measures of each class.
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


def as_numbers(found: Scores) -> dict[str, Any]:
    """The scores as plain numbers by name; top-5 only where it says anything."""
    low, high = wilson(found.hits, found.images)
    top_5 = {} if found.hits_in_5 is None else {"top_5": found.hits_in_5 / found.images}
    numbers = {"accuracy": found.hits / found.images, "low_95": low, "high_95": high, **top_5}
    numbers |= {"balanced_accuracy": found.balanced, "macro": asdict(found.macro), "weighted": asdict(found.weighted)}
    return numbers | {"nll": found.nll, "ece": found.bins.ece, "brier": found.brier}


def several_labels(outputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scores of a multi-label model, in all and of each class `[C]`; a class without images has none (NaN).

    F1 is of outputs above 0, for logits; without any below 0 they may be probabilities, and F1 is omitted.

    Args:
        outputs: `[N, C]`.
        labels: `[N, C]`, 0 or 1.
    """
    per = {"average_precision": average_precisions(outputs, labels)}
    known = per["average_precision"][labels.any(0)]
    scores = {"mean_average_precision": float(known.mean())} if len(known) else {}
    if (outputs < 0).any():
        per["f1"], micro = f1_of_sets(outputs > 0, labels)
        scores |= {"macro_f1": float(per["f1"].mean()), "micro_f1": micro}
    return scores, per


def answers(logits: np.ndarray, labels: np.ndarray) -> Answers:
    """The predictions of a model, from its logits.

    Args:
        logits: `[N, C]`, of any floating-point type; not probabilities.
        labels: `[N]`, integers from 0 to C - 1.
    """
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
    return Answers(classes, labels, *(np.concatenate(column) for column in zip(*found, strict=True)))


def scores(given: Answers) -> Scores:
    """All measures of a model's predictions for at least one image."""
    confusion = confusion_matrix(given.labels, given.predicted, classes=given.classes)
    per = per_class(confusion, np.bincount(given.labels, given.confidence, given.classes))
    occurs = (per.images > 0) | (per.predicted > 0)
    measures = (per.precision, per.recall, per.f1)
    return Scores(
        images=len(given.labels),
        hits=int(per.hits.sum()),
        hits_in_5=int((given.ranks < 5).sum()) if given.classes > 5 else None,
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
    """`[C, C]`: the number of images by true class (row) and predicted class (column), from `[N]` of each."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(confusion: np.ndarray, confidence: np.ndarray) -> PerClass:
    """Measures of each class, from the confusion matrix `[C, C]` and the summed confidence of its images `[C]`."""
    images, predicted, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    shares = (_ratio(hits, predicted), _ratio(hits, images), _ratio(2 * hits, images + predicted))
    return PerClass(images, predicted, hits, *shares, _ratio(confidence, images, empty=math.nan))


def calibration(confidence: np.ndarray, hits: np.ndarray, *, bins: int = 15) -> Bins:
    """Group predictions by confidence; a bin includes its upper bound, not its lower one.

    Args:
        confidence: `[N]`, the probability of each predicted class.
        hits: bool `[N]`, whether each prediction is correct.
        bins: number of bins, of equal width.
    """
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    images = np.bincount(which, minlength=bins)
    sums = (np.bincount(which, values, bins) for values in (confidence, hits))
    return Bins(images, *(_ratio(values, images, empty=math.nan) for values in sums))


def wilson(hits: int, images: int, *, level: float = 0.95) -> tuple[float, float]:
    """The lower and upper bound of a proportion (Wilson, 1927).

    Args:
        hits: number of successes.
        images: number of trials, at least 1.
        level: confidence level of the interval.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / images, z * z / images
    centre = share + spread / 2
    width = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (centre - width) / (1 + spread), (centre + width) / (1 + spread)
    return (low if hits else 0.0), (high if hits < images else 1.0)  # exact, where rounding would miss the bound


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Test whether two models differ on the same N images: McNemar's exact test (1947).

    Args:
        first: bool `[N]`, whether the first model classified each image correctly.
        second: bool `[N]`, the same of the second model.

    Returns:
        The number of images that only the first classified correctly, the number that only the second did, and the
        two-sided p-value: the probability of a split at least as uneven if both models were equally good.
    """
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    changed, term, tail = lost + gained, 1, 0
    for k in range(min(lost, gained) + 1):
        tail += term  # the binomial coefficient of k out of those changed, as an integer of any size
        term = term * (changed - k) // (k + 1)
    return lost, gained, min(1.0, 2 * tail / 2**changed)


def coverage(given: Answers, *, threshold: float) -> tuple[int, int]:
    """How many predictions have at least this confidence, and how many of these are correct."""
    sure = given.confidence >= threshold
    return int(sure.sum()), int((sure & given.hits).sum())


def average_precisions(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The average precision of each class of a multi-label model: Σ (Rₙ − Rₙ₋₁) Pₙ, equal outputs as one threshold.

    Args:
        outputs: `[N, C]`, the higher the likelier; logits or probabilities.
        labels: `[N, C]`, 1 where an image has the class, else 0.

    Returns:
        float64 `[C]`; NaN for a class without images.
    """
    found = np.full(outputs.shape[1], math.nan)
    for at, (values, wanted) in enumerate(zip(outputs.T, labels.T > 0, strict=True)):
        if wanted.any():
            order = np.argsort(-values, kind="stable")
            last = np.append(np.diff(values[order]) != 0, True)  # of those with the same output
            hits, taken = np.cumsum(wanted[order])[last], np.flatnonzero(last) + 1
            found[at] = np.sum(np.diff(hits, prepend=0) * hits / taken) / wanted.sum()
    return found


def f1_of_sets(predicted: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """F1 of each class `[C]`, 0 where there is nothing to find, and micro F1; from predictions and labels `[N, C]`."""
    wanted = labels > 0
    hits, sums = (predicted & wanted).sum(0), predicted.sum(0) + wanted.sum(0)
    return _ratio(2 * hits, sums), float(2 * hits.sum() / max(sums.sum(), 1))


def _ratio(values: np.ndarray, of: np.ndarray, *, empty: float = 0.0) -> np.ndarray:
    return np.divide(values, of, out=np.full(len(of), empty), where=of > 0)
