"""Ridge regression to one-hot targets, for many strengths, with exact leave-one-out predictions.

One eigendecomposition serves all strengths, and no model is fitted again: the residual of a sample that a linear
smoother has not seen is its residual divided by one minus its leverage (Hastie, Tibshirani & Friedman, The Elements of
Statistical Learning, 2nd ed., 7.10; Rifkin & Lippert, Notes on Regularized Least Squares, 2007).

The intercept is not penalised: features and targets are centred. All sums are in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import DataError

STRENGTHS = 50
_LOWEST, _HIGHEST = -8.0, 1.0  # powers of ten, of the largest eigenvalue
_ROWS = 8192  # samples in one block: 128 MiB of float64 at 2,048 features


@dataclass(frozen=True)
class Ridge:
    """A fit at every strength, and the weights at the best.

    Attributes:
        strengths: float64 `[S]`, ascending: λ in ‖Y − XW‖² + λ‖W‖².
        accuracy: float64 `[S]`, share of the samples that are right when left out.
        error: float64 `[S]`, mean over samples and classes of the squared leave-one-out residual.
        best: the strength of highest accuracy, among equals that of lowest error; a place in `strengths`.
        weight: `[C, D]` and bias: `[C]`, float64, at the best strength, on all samples.
        scores: float64 `[N, C]`, the leave-one-out predictions at the best strength; None if there was no pass for it.
    """

    strengths: Tensor
    accuracy: Tensor
    error: Tensor
    best: int
    weight: Tensor
    bias: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """Sums over samples, which add up over batches and processes: `sum(parts[1:], parts[0])`, or an all-reduce of each.

    Attributes:
        count: samples.
        x: float64 `[D]`, the sum of the features.
        y: float64 `[C]`, the samples of each class.
        xx: float64 `[D, D]`, XᵀX. xy: float64 `[D, C]`, XᵀY, of one-hot Y.
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, *, classes: int) -> "Moments":
        """Those of one batch: features `[B, D]`, labels int64 `[B]`."""
        x, y = _double(features), _one_hot(features, labels, classes)
        return cls(len(x), x.sum(dim=0), y.sum(dim=0), x.T @ x, x.T @ y)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy
        )

    def decompose(self) -> "Spectrum":
        """The eigenvectors of the features' covariance, from which a fit at any strength follows.

        Raises:
            DataError: a feature is not finite.
        """
        centred = self.xx - torch.outer(self.x, self.x) / self.count
        target = self.xy - torch.outer(self.x, self.y) / self.count
        squares, vectors = _eigh(centred)  # [D], [D, D]
        return Spectrum(self.count, self.x / self.count, self.y / self.count, squares, vectors, vectors.T @ target)


@dataclass(frozen=True)
class Spectrum:
    """Ridge regression in the eigenvectors of the covariance.

    Attributes:
        count: samples.
        x_mean: `[D]` and y_mean: `[C]`.
        squares: `[R]`, eigenvalues of XᵀX, centred.
        vectors: `[D, R]`, its eigenvectors.
        targets: `[R, C]`, XᵀY in them.
    """

    count: int
    x_mean: Tensor
    y_mean: Tensor
    squares: Tensor
    vectors: Tensor
    targets: Tensor

    def strengths(self, count: int = STRENGTHS) -> Tensor:
        """Log-spaced strengths `[S]` around the eigenvalues."""
        return _strengths(self.squares, count)

    def weights(self, strength: float) -> tuple[Tensor, Tensor]:
        """Weight `[C, D]` and bias `[C]` for one strength."""
        weight = (self.vectors @ (self.targets / (self.squares + strength)[:, None])).T
        return weight, self.y_mean - weight @ self.x_mean

    def left_out(self, features: Tensor, labels: Tensor, strengths: Tensor) -> Tensor:
        """The second pass: predictions `[S, B, C]` for samples of the fit, each without itself.

        Args:
            features: `[B, D]`, which were among those in the moments. labels: int64 `[B]`.
            strengths: `[S]`.
        """
        x = (_double(features) - self.x_mean) @ self.vectors  # [B, R]
        y = _one_hot(features, labels, len(self.y_mean))
        inverse = 1 / (self.squares[:, None] + strengths)  # [R, S]
        fits = x @ (inverse.T[:, :, None] * self.targets) + self.y_mean  # [S, B, C]
        rest = (1 - 1 / self.count - x.square() @ inverse).T[:, :, None]  # [S, B, 1], one minus the leverage
        return y - (y - fits) / rest

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]], strengths: Tensor | None = None) -> Ridge:
        """The best strength by a second pass over all batches (features, labels) of this process.

        With several processes each has its batches: add up the `Score`s of `score` instead, and ask `chosen`.
        """
        strengths = self.strengths() if strengths is None else strengths
        return self.chosen(sum((self.score(*batch, strengths) for batch in batches), Score.zero(strengths)), strengths)

    def score(self, features: Tensor, labels: Tensor, strengths: Tensor) -> "Score":
        """The sums over one batch that `chosen` needs."""
        return Score.of(self.left_out(features, labels, strengths), labels)

    def chosen(self, score: "Score", strengths: Tensor) -> Ridge:
        """The fit at the strength that left-out samples like best."""
        best = score.best()
        return Ridge(strengths, score.accuracy, score.error, best, *self.weights(float(strengths[best])))


@dataclass(frozen=True)
class Score:
    """Sums over left-out samples for each strength; they add up like moments.

    Attributes:
        count: samples. right: float64 `[S]`, of them. squares: float64 `[S]`, sums of mean squared residuals.
    """

    count: int
    right: Tensor
    squares: Tensor

    @classmethod
    def zero(cls, strengths: Tensor) -> "Score":
        """Of no sample."""
        return cls(0, torch.zeros_like(strengths), torch.zeros_like(strengths))

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor) -> "Score":
        """Of predictions `[S, B, C]`."""
        labels = labels.to(scores.device)
        residuals = F.one_hot(labels, scores.shape[2]) - scores
        right = (scores.argmax(dim=2) == labels).sum(dim=1).double()
        return cls(len(labels), right, residuals.square().mean(dim=2).sum(dim=1))

    def __add__(self, other: "Score") -> "Score":
        return Score(self.count + other.count, self.right + other.right, self.squares + other.squares)

    @property
    def accuracy(self) -> Tensor:
        return self.right / self.count

    @property
    def error(self) -> Tensor:
        return self.squares / self.count

    def best(self) -> int:
        """The place of the highest accuracy; among equals, of the lowest error."""
        return min(range(len(self.right)), key=lambda s: (-float(self.right[s]), float(self.squares[s])))


def ridge(features: Tensor, labels: Tensor, *, classes: int, strengths: Tensor | None = None) -> Ridge:
    """Fit all samples, from the smaller of the Gram and the covariance matrix.

    Args:
        features: `[N, D]`, of at least two samples.
        labels: int64 `[N]`.
        classes: C; a class may have no sample.
        strengths: `[S]`; None: 50, log-spaced, from 1e-8 to 10 times the largest eigenvalue.

    Raises:
        DataError: fewer than two samples, or a feature that is not finite.
    """
    if len(features) < 2:
        raise DataError(f"ridge regression was given {len(features)} samples; expected at least 2.")
    if len(features) <= features.shape[1]:
        return _dual(_double(features), labels, classes, strengths)
    blocks = [*zip(features.split(_ROWS), labels.split(_ROWS), strict=True)]
    parts = (Moments.of(*block, classes=classes) for block in blocks)
    spectrum = sum(parts, next(parts)).decompose()
    fit = spectrum.fit(blocks, strengths)
    best = fit.strengths[fit.best : fit.best + 1]
    scores = torch.cat([spectrum.left_out(*block, best)[0] for block in blocks])
    return Ridge(fit.strengths, fit.accuracy, fit.error, fit.best, fit.weight, fit.bias, scores)


def _dual(x: Tensor, labels: Tensor, classes: int, strengths: Tensor | None) -> Ridge:
    """From the Gram matrix. Residuals and leverages are sums of positive parts, exact where the fit interpolates."""
    labels = labels.to(x.device)
    y, mean = _one_hot(x, labels, classes), x.mean(dim=0)
    centred, y_mean = x - mean, y.mean(dim=0)
    squares, vectors = _eigh(centred @ centred.T)  # [N], [N, N]
    strengths = _strengths(squares, STRENGTHS) if strengths is None else strengths.to(squares)
    shrunk = strengths / (squares[:, None] + strengths)  # [N, S], the share of each direction that is not fitted
    targets = vectors.T @ (y - y_mean)  # [N, C]
    residuals = vectors @ (shrunk.T[:, :, None] * targets)  # [S, N, C]
    # Ones are a direction of eigenvalue 0, which the intercept fits: its share 1/N is not missing.
    rest = (vectors.square() @ shrunk - 1 / len(x)).T[:, :, None]  # [S, N, 1]
    scores = y - residuals / rest
    score = Score.of(scores, labels)
    best = score.best()
    weight = (centred.T @ (vectors @ (targets / (squares + strengths[best])[:, None]))).T
    return Ridge(strengths, score.accuracy, score.error, best, weight, y_mean - weight @ mean, scores[best])


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none negative, and eigenvectors."""
    if not matrix.isfinite().all():
        raise DataError("features are not finite: look for NaN or infinity in the trunk's output.")
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[-1:].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > floor, values, 0.0), vectors


def _strengths(squares: Tensor, count: int) -> Tensor:
    powers = torch.logspace(_LOWEST, _HIGHEST, count, dtype=squares.dtype, device=squares.device)
    top = squares.max()
    return powers * torch.where(top > 0, top, 1.0)  # 1: all samples are the same


def _double(features: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (features.cpu() if features.device.type == "mps" else features).double()


def _one_hot(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    device = "cpu" if features.device.type == "mps" else features.device
    return F.one_hot(labels.to(device), classes).double()
