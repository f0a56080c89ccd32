"""The nearest neighbours of images in feature space."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.heads.knn import similarities


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest neighbours of N images, nearest first, each without itself.

    Attributes:
        index: int64 `[N, K]`.
        distance: `[N, K]`, between features of length 1: 0 to 2.
    """

    index: Tensor
    distance: Tensor

    @classmethod
    def of(cls, features: Tensor, *, k: int = 10, centred: bool = True) -> "Neighbours":
        """Those of features `[N, D]`, in the CPU's memory; fewer than `k` where there are not as many images.

        Args:
            centred: take the mean away before: features after a ReLU all point the same way, and cosines then tell
                more.
        """
        features = features.float()
        bank = F.normalize(features - features.mean(dim=0) if centred else features)
        k, index, distance = min(k, len(bank) - 1), [], []
        for _, similar in similarities(bank, bank, leave=True):
            top = similar.topk(k, dim=1)
            index.append(top.indices.cpu())
            distance.append((2 - 2 * top.values.cpu()).clamp(min=0).sqrt())
        return cls(torch.cat(index), torch.cat(distance))

    def scale(self) -> Tensor:
        """How far the last of the neighbours is, `[N]`: what is near is a question of how many are around.

        At least half of its median, as many nearly equal images would else hide each other.
        """
        far = self.distance[:, -1]
        return far.clamp(min=float(far.median()) / 2)
