"""Ridge regression to one-hot targets, for many strengths, with exact leave-one-out predictions.

One eigendecomposition serves all strengths, and no model is fitted again: the residual of a sample that a linear
smoother has not seen is its residual divided by one minus its leverage (Hastie, Tibshirani & Friedman, The Elements of
Statistical Learning, 2nd ed., 7.10; Rifkin & Lippert, Notes on Regularized Least Squares, 2007).

The intercept is not penalised: features and targets are centred.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import DataError
from trainer.text import counted

_LOWEST, _HIGHEST = -8.0, 1.0  # powers of ten, of the largest eigenvalue
_COLUMNS = 2500  # predictions of one sample: 50 strengths for up to 50 classes, at least 5 for more
_VALUES = 2**24  # in one block of samples
# Numbers in the features above which predictions are made in float32. Rounding moves a leverage by some 1e-7 then, as
# no strength is below 1e-8 of the largest eigenvalue; the covariance is always in float64.
_MANY = 2**22


@dataclass(frozen=True)
class Ridge:
    """What ridge regression is worth at every strength.

    Attributes:
        strengths: float64 `[S]`, ascending: λ in ‖Y − XW‖² + λ‖W‖².
        accuracy: float64 `[S]`, share of the samples that are right when left out.
        error: float64 `[S]`, mean over samples and classes of the squared leave-one-out residual.
        best: the strength of highest accuracy, among equals that of lowest error; a place in `strengths`.
    """

    strengths: Tensor
    accuracy: Tensor
    error: Tensor
    best: int


def ridge(features: Tensor, labels: Tensor, *, classes: int, strengths: Tensor | None = None) -> Ridge:
    """Predict each sample by a fit of all others, from the smaller of the Gram and the covariance matrix.

    Args:
        features: `[N, D]`, of at least two samples.
        labels: int64 `[N]`.
        classes: C; a class may have no sample.
        strengths: `[S]`, positive; None: 50, or fewer for more than 50 classes, log-spaced, from 1e-8 to 10 times the
            largest eigenvalue.

    Raises:
        DataError: fewer than two samples, or a feature that is not finite.
    """
    if len(features) < 2:
        raise DataError(f"ridge regression was given {counted(len(features), 'sample')}; expected at least 2.")
    if features.device.type == "mps":  # it has no float64
        features, labels = features.cpu(), labels.cpu()
    y = F.one_hot(labels, classes).double()
    strengths, blocks = _predict(features, y, strengths)
    right, squares = torch.zeros_like(strengths), torch.zeros_like(strengths)
    done = 0
    for residuals in blocks:  # [B, S, C]
        own = slice(done, done + len(residuals))
        scores = y[own, None].to(residuals) - residuals
        right += (scores.argmax(dim=2) == labels[own, None]).sum(dim=0)
        squares += residuals.square().mean(dim=2).sum(dim=0, dtype=torch.float64)
        done += len(residuals)
    best = min(range(len(right)), key=lambda s: (-float(right[s]), float(squares[s])))
    return Ridge(strengths, right / done, squares / done, best)


def left_out(features: Tensor, labels: Tensor, *, classes: int, strength: float) -> Tensor:
    """The predictions float64 `[N, C]` of samples, each by a fit of all others at one strength; see `ridge`."""
    if features.device.type == "mps":
        features, labels = features.cpu(), labels.cpu()
    y = F.one_hot(labels, classes).double()
    _, blocks = _predict(features, y, torch.tensor([strength], dtype=torch.float64))
    return y - torch.cat([residuals[:, 0].double() for residuals in blocks])


_Blocks = tuple[Tensor, Iterator[Tensor]]  # strengths [S], and leave-one-out residuals [B, S, C] of all samples in turn


def _predict(features: Tensor, y: Tensor, strengths: Tensor | None) -> _Blocks:
    return (_from_gram if len(features) <= features.shape[1] else _from_covariance)(features, y, strengths)


def _from_covariance(features: Tensor, y: Tensor, strengths: Tensor | None) -> _Blocks:
    samples, size = features.shape
    mean, y_mean = features.mean(dim=0, dtype=torch.float64), y.mean(dim=0)
    every = list(zip(features.split(max(_VALUES // size, 1)), y.split(max(_VALUES // size, 1)), strict=True))
    covariance, target = torch.zeros_like(mean).expand(size, size).clone(), torch.zeros_like(y[:1]).repeat(size, 1)
    for x, own in every:
        centred = x.double() - mean
        covariance.addmm_(centred.T, centred)
        target.addmm_(centred.T, own)
    squares, vectors = _eigh(covariance)  # [D], [D, D]
    strengths = _strengths(squares, y.shape[1]) if strengths is None else strengths.to(squares)
    dtype = torch.float32 if features.numel() > _MANY else torch.float64
    inverse = 1 / (squares[:, None] + strengths)  # [D, S]
    weights = (inverse[:, :, None] * (vectors.T @ target)[:, None]).flatten(1).to(dtype)  # [D, S·C]
    vectors, inverse, mean, y_mean = vectors.to(dtype), inverse.to(dtype), mean.to(dtype), y_mean.to(dtype)

    def blocks() -> Iterator[Tensor]:
        rows = max(_VALUES // (size + weights.shape[1]), 1)
        for x, own in zip(features.split(rows), y.to(dtype).split(rows), strict=True):
            turned = (x.to(dtype) - mean) @ vectors  # [B, D]
            rest = 1 - 1 / samples - turned.square() @ inverse  # [B, S], one minus the leverage
            fits = (turned @ weights).view(len(x), len(strengths), -1).add_(y_mean)  # [B, S, C]
            yield (own[:, None] - fits).div_(rest[:, :, None])

    return strengths, blocks()


def _from_gram(features: Tensor, y: Tensor, strengths: Tensor | None) -> _Blocks:
    """Residuals and leverages are sums of positive parts, exact where the fit interpolates."""
    centred = features.double()
    centred = centred - centred.mean(dim=0)
    squares, vectors = _eigh(centred @ centred.T)  # [N], [N, N]
    strengths = _strengths(squares, y.shape[1]) if strengths is None else strengths.to(squares)
    shrunk = strengths / (squares[:, None] + strengths)  # [N, S], the share of each direction that is not fitted
    targets = (shrunk[:, :, None] * (vectors.T @ (y - y.mean(dim=0)))[:, None]).flatten(1)  # [N, S·C]

    def blocks() -> Iterator[Tensor]:
        for rows in vectors.split(max(_VALUES // targets.shape[1], 1)):
            # Ones are a direction of eigenvalue 0, which the intercept fits: its share 1/N is not missing.
            rest = rows.square() @ shrunk - 1 / len(y)  # [B, S]
            yield (rows @ targets).view(len(rows), len(strengths), -1).div_(rest[:, :, None])

    return strengths, blocks()


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none negative, and eigenvectors."""
    if not matrix.isfinite().all():
        raise DataError("features are not finite: look for NaN or infinity in the trunk's output.")
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[-1:].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > floor, values, 0.0), vectors


def _strengths(squares: Tensor, classes: int) -> Tensor:
    count = min(max(_COLUMNS // classes, 5), 50)
    powers = torch.logspace(_LOWEST, _HIGHEST, count, dtype=squares.dtype, device=squares.device)
    top = squares.max()
    return powers * torch.where(top > 0, top, 1.0)  # 1: all samples are the same
