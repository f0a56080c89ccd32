"""Images unlike all others."""

import torch
import torch.nn.functional as F
from torch import Tensor

_FAR = 3.5  # of the modified z-score (Iglewicz & Hoaglin, How to Detect and Handle Outliers, 1993)


def outliers(features: Tensor, *, k: int = 5) -> list[tuple[int, float]]:
    """The images unlike all others, and how unlike: the robust z-score of the log-distance to the k-th neighbour.

    Args:
        features: `[N, D]`, of images of which no two are equal. Not centred: seen from the mean, an image in which the
            features find little lies in any direction.
        k: more than there are of one odd kind.

    Returns:
        Index and z-score of those above 3.5, the strangest first.
    """
    if len(features) < k + 2:
        return []
    bank = F.normalize(features.float())
    similar = [
        (rows @ bank.T).topk(k + 1).values[:, -1] for rows in bank.split(1024)
    ]  # each is its own first neighbour
    far = (2 - 2 * torch.cat(similar).cpu()).clamp(min=0).sqrt().clamp(min=1e-6).log()
    gap = far - far.median()
    scores = gap / (1.4826 * gap.abs().median()).clamp(min=1e-6)
    order = scores.argsort(descending=True, stable=True).tolist()
    return [(image, float(scores[image])) for image in order if scores[image] > _FAR]
