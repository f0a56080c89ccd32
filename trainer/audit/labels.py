"""Labels that are likely wrong: what the features say of an image when its own label is left out.

Predictions are out of sample, as in confident learning (Northcutt, Jiang & Chuang, 2021,
https://arxiv.org/abs/1911.00068): those of ridge regression without the image, in closed form. An image is a suspect
where two witnesses agree: that margin, and its neighbours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.heads.ridge import left_out, ridge

_MARGIN = 0.3  # by which the score of another class is higher; one-hot targets are 0 and 1
_SHARE = 0.2  # of the neighbours, which have the label at most


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What is predicted for N images, each without itself.

    Attributes:
        labels: int64 `[N]`, as given.
        suggested: int64 `[N]`, the best of the other classes.
        margin: `[N]`, by how much its score is higher than that of the label: above 0, the prediction is another.
    """

    labels: Tensor
    suggested: Tensor
    margin: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, *, classes: int) -> "LeftOut":
        """By ridge regression: features `[N, D]`, labels int64 `[N]`."""
        scores = left_out(features, labels, classes=classes, strength=_strength(features, labels, classes)).cpu()
        labels = labels.cpu()
        own = scores.gather(1, labels[:, None])[:, 0]
        best = scores.scatter(1, labels[:, None], -torch.inf).max(dim=1)
        return cls(labels, best.indices, best.values - own)

    @property
    def accuracy(self) -> float:
        """Share of the images that are predicted as they are labelled."""
        return float((self.margin <= 0).double().mean())

    def ranked(self) -> list[int]:
        """All images, the likeliest wrong label first."""
        return self.margin.argsort(descending=True, stable=True).tolist()

    def suspects(self, neighbours: Tensor) -> list[int]:
        """The images with a likely wrong label, the likeliest first.

        Args:
            neighbours: int64 `[N, K]`, the nearest images of each.
        """
        share = (self.labels[neighbours] == self.labels[:, None]).double().mean(dim=1)
        doubtful = (self.margin > _MARGIN) & (share <= _SHARE)
        return [image for image in self.ranked() if doubtful[image]]

    def confusion(self, classes: int) -> Tensor:
        """Number of images by label (row) and prediction (column), int64 `[C, C]`."""
        predicted = torch.where(self.margin > 0, self.suggested, self.labels)
        return torch.bincount(self.labels * classes + predicted, minlength=classes**2).view(classes, classes)


def held_out_hits(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], *, classes: int) -> Tensor:
    """Which images `[M]` of validation a ridge head of the training images gets right; features and labels of each."""
    (x, labels), (other, expected) = train, val
    strength = _strength(x, labels, classes)
    x, labels, other = x.cpu().double(), labels.cpu(), other.cpu().double()
    y, mean = F.one_hot(labels, classes).double(), x.mean(dim=0)
    gram = (x - mean).T @ (x - mean) + strength * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, (x - mean).T @ (y - y.mean(dim=0)))  # [D, C]
    return ((other - mean) @ weight + y.mean(dim=0)).argmax(dim=1) == expected.cpu()


def _strength(features: Tensor, labels: Tensor, classes: int) -> float:
    """The strength of ridge regression at which left-out images are predicted best."""
    fit = ridge(features, labels, classes=classes)
    return float(fit.strengths[fit.best])
