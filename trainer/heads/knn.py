"""Nearest neighbours among kept features: what the features are worth without a head.

Similarity is the cosine. Features that are zero are similar to nothing.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
    bank, classes = F.normalize(features.float()), int(labels.max()) + 1
    wanted, truth = (bank, labels) if queries is None else (F.normalize(queries[0].float()), queries[1])
    right = torch.zeros(len(ks), dtype=torch.int64, device=bank.device)
    for first, similar in similarities(wanted, bank, leave=leave):
        top, near = similar.topk(max(ks), dim=1)  # [B, K]
        votes = F.one_hot(labels[near], classes).float()  # [B, K, C]
        weighed = votes * (top[:, :, None] + 2)  # 1 to 3 a vote: only the sum of one k's votes is compared
        for place, k in enumerate(ks):
            counts, sums = votes[:, :k].sum(dim=1), weighed[:, :k].sum(dim=1)
            leaders = counts == counts.amax(dim=1, keepdim=True)
            chosen = torch.where(leaders, sums, -1.0).argmax(dim=1)
            right[place] += (chosen == truth[first : first + len(chosen)].to(chosen.device)).sum()
    return {k: value / len(wanted) for k, value in zip(ks, right.tolist(), strict=True)}


def similarities(queries: Tensor, bank: Tensor, *, leave: bool) -> Iterator[tuple[int, Tensor]]:
    """The cosines of queries `[M, D]` and a bank `[N, D]`, all of length 1, for a block of queries at a time.

    Args:
        queries: the bank itself, if `leave`. bank: on the device that computes.
        leave: whether each query is left out of its own neighbours: then that cosine is -inf.

    Yields:
        The place of the first query of the block, and `[B, N]`.
    """
    for first in range(0, len(queries), _ROWS):
        similar = queries[first : first + _ROWS].to(bank.device) @ bank.T
        if leave:
            rows = torch.arange(len(similar), device=bank.device)
            similar[rows, rows + first] = -torch.inf
        yield first, similar
