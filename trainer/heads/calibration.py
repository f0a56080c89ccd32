"""Temperature scaling: probabilities that say how often the classifier is right."""

import math

import torch.nn.functional as F
from torch import Tensor

_STEPS = 100
_LEAST, _MOST = math.log(1e-3), math.log(1e3)  # a set that is all right wants 0, one that is all wrong ∞


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 for which softmax(logits / T) has the lowest NLL (Guo et al., 2017, https://arxiv.org/abs/1706.04599).

    The NLL is convex in 1/T: its derivative has at most one zero, which bisection always finds.

    Args:
        logits: `[N, C]`, of samples that were not trained on.
        labels: int64 `[N]`.

    Returns:
        T, from 0.001 to 1,000; 1 if no T is better than another.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()  # not every device has float64
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
