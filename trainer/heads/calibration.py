"""What the probabilities of a classifier are worth: temperature, calibration error, proper scores, and intervals."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 100
_LEAST, _MOST = math.log(1e-3), math.log(1e3)  # a set that is all right wants 0, one that is all wrong ∞


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 for which softmax(logits / T) has the lowest NLL (Guo et al., 2017, https://arxiv.org/abs/1706.04599).

    Args:
        logits: `[N, C]`, of samples that were not trained on.
        labels: int64 `[N]`.

    Returns:
        T, from 0.001 to 1,000; 1 if no T is better than another.

    The NLL is convex in 1/T, so that its derivative has one zero, which bisection finds in any case.
    """
    logits, labels = _double(logits), labels.cpu()
    own = logits.gather(1, labels[:, None])[:, 0]

    def slope(log: float) -> float:
        """The derivative of the NLL in 1/T: expected logit less that of the label."""
        share = F.softmax(logits / math.exp(log), dim=1)
        return float(((share * logits).sum(dim=1) - own).mean())

    if float((logits.amax(dim=1) - logits.amin(dim=1)).max()) == 0:
        return 1.0
    low, high = _LEAST, _MOST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if slope(middle) <= 0:  # a higher 1/T is better, or as good
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)


def nll(logits: Tensor, labels: Tensor) -> float:
    """The mean negative log-likelihood, in nats."""
    return float(F.cross_entropy(_double(logits), labels.cpu()))


def brier(logits: Tensor, labels: Tensor) -> float:
    """The mean over samples of the squared distance between probabilities and one-hot label, 0 to 2 (Brier, 1950)."""
    share = F.softmax(_double(logits), dim=1)
    return float((share - F.one_hot(labels.cpu(), share.shape[1])).square().sum(dim=1).mean())


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """ECE: |accuracy − confidence| in bins of equal width, weighted by their samples (Naeini et al., 2015)."""
    confidence, chosen = F.softmax(_double(logits), dim=1).max(dim=1)
    gap = (chosen == labels.cpu()).double() - confidence
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # a bin has its upper bound, not its lower
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gap).abs().sum() / len(gap))


def wilson(right: int, count: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """Bounds of a share of which `right` in `count` were seen; 95 % by default (Wilson, 1927)."""
    share, weight = right / count, z * z / count
    centre, half = share + weight / 2, z * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max((centre - half) / (1 + weight), 0.0), min((centre + half) / (1 + weight), 1.0)


def _double(logits: Tensor) -> Tensor:
    """In float64, which not every device has."""
    return logits.detach().cpu().double()
