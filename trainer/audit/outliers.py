"""Images unlike all others."""

from torch import Tensor

from trainer.audit.neighbours import Neighbours

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
    far = Neighbours.of(features, k=k, centred=False).distance[:, -1].clamp(min=1e-6).log()
    gap = far - far.median()
    scores = gap / (1.4826 * gap.abs().median()).clamp(min=1e-6)
    order = scores.argsort(descending=True, stable=True).tolist()
    return [(image, float(scores[image])) for image in order if scores[image] > _FAR]
