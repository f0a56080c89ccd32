"""Nearest neighbours among kept features: what the features are worth without a head, and how far an image is.

Similarity is the cosine. Features that are zero are similar to nothing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import UsageError

_ROWS = 1024  # queries at a time: their similarities to 10⁵ samples take 400 MB


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int] = (1, 3, 5, 10, 20),
    queries: tuple[Tensor, Tensor] | None = None,
) -> dict[int, float]:
    """The share that a vote of the k nearest training samples gets right, for each k.

    Args:
        features: `[N, D]`, training. labels: int64 `[N]`.
        ks: neighbours that vote; those above the number of neighbours there are, are omitted.
        queries: features `[M, D]` and labels `[M]` to classify; None: the training samples, each without itself.

    Of classes with the same number of votes wins the one with the greatest sum of similarities.
    """
    leave = queries is None
    ks = [k for k in ks if k <= len(features) - leave]
    if not ks:
        return {}
    wanted, truth = (features, labels) if queries is None else queries
    bank, classes = F.normalize(features.float()), int(labels.max()) + 1
    right = torch.zeros(len(ks), dtype=torch.int64, device=bank.device)
    for first, similar in _similar(bank, wanted, leave=leave):
        top, near = similar.topk(max(ks), dim=1)  # [B, K]
        votes = F.one_hot(labels[near], classes).float()  # [B, K, C]
        weighed = votes * (top[:, :, None] + 2)  # 1 to 3 a vote: only the sum of one k's votes is compared
        for place, k in enumerate(ks):
            counts, sums = votes[:, :k].sum(dim=1), weighed[:, :k].sum(dim=1)
            leaders = counts == counts.amax(dim=1, keepdim=True)
            chosen = torch.where(leaders, sums, -1.0).argmax(dim=1)
            right[place] += (chosen == truth[first : first + len(chosen)].to(chosen.device)).sum()
    return {k: value / len(wanted) for k, value in zip(ks, right.tolist(), strict=True)}


class Distances:
    """The distance to the k-th nearest training sample: large for an image unlike any of them (Sun et al., 2022,
    https://arxiv.org/abs/2204.06507).

    Args:
        features: `[N, D]`, training.
        k: the neighbour that counts.

    Raises:
        UsageError: there are not more than k samples.
    """

    def __init__(self, features: Tensor, *, k: int = 10):
        if not 1 <= k < len(features):
            raise UsageError(f"k is {k}: expected 1 to {len(features) - 1}, one less than there are training samples.")
        self.bank, self.k = F.normalize(features.float()), k

    def __call__(self, features: Tensor) -> Tensor:
        """Distances `[M]`, 0 to 2, between features `[M, D]` and the samples, all of length 1."""
        return self._distances(features, leave=False)

    def threshold(self, quantile: float = 0.95) -> float:
        """The distance that this share of the training samples, each without itself, does not exceed."""
        return float(torch.quantile(self._distances(self.bank, leave=True), quantile))

    def _distances(self, features: Tensor, *, leave: bool) -> Tensor:
        nearest = [
            similar.topk(self.k, dim=1).values[:, -1] for _, similar in _similar(self.bank, features, leave=leave)
        ]
        return (2 - 2 * torch.cat(nearest)).clamp(min=0).sqrt()


def _similar(bank: Tensor, features: Tensor, *, leave: bool):
    """Block by block, the place of its first query and its similarities `[B, N]`; its own, with `leave`, is −∞."""
    for first in range(0, len(features), _ROWS):
        similar = F.normalize(features[first : first + _ROWS].float()).to(bank.device) @ bank.T
        if leave:
            rows = torch.arange(len(similar), device=bank.device)
            similar[rows, rows + first] = -torch.inf
        yield first, similar
