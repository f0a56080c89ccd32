"""Features of mean 0 and scale 1, and a layer trained on them as one that reads raw features."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import UsageError

_LEAST = 1e-6  # of the largest scale: below it a feature is constant up to rounding


@dataclass(frozen=True)
class Scaling:
    """x → (x − mean) / scale, of the second dimension.

    Attributes:
        mean: float64 `[D]`.
        scale: float64 `[D]`, positive.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor, *, by: Literal["feature", "norm"] = "feature") -> "Scaling":
        """That of a training set.

        Args:
            features: `[N, D]` or `[N, D, ...]`; all positions of a map count.
            by: "feature": each by its own mean and standard deviation; constant ones are moved to 0 and not scaled.
                "norm": all by one number, so that the root of the mean squared norm becomes that of standardised
                features, √D; nothing is moved.
        """
        values = features.transpose(0, 1).flatten(1)  # [D, N·...]
        if by == "norm":
            size = values.double().square().mean().sqrt()
            scale = torch.where(size > 0, size, 1.0).expand(len(values)).clone()
            return cls(torch.zeros_like(scale), scale)
        mean = values.mean(dim=1, dtype=torch.float64)
        scale = torch.stack(
            [(row.double() - centre).square().mean().sqrt() for row, centre in zip(values, mean, strict=True)]
        )
        return cls(mean, torch.where(scale > _LEAST * scale.max(), scale, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        """Scaled features, in the type of those given."""
        shape = (-1, *[1] * (features.ndim - 2))
        return (features - self.mean.to(features).view(shape)) / self.scale.to(features).view(shape)

    def fold(self, weight: Tensor, bias: Tensor, *, padding: bool = False) -> tuple[Tensor, Tensor]:
        """The layer that gives on raw features the logits that (weight, bias) gives on scaled ones.

        Args:
            weight: `[C, D]`, or a kernel `[C, D, ...]`. bias: `[C]`.
            padding: whether the layer pads with zeros, which are no raw features.

        Raises:
            UsageError: it pads and the features were moved: then there is no such layer.
        """
        if padding and bool(self.mean.any()):
            raise UsageError("a layer that pads its input cannot be folded with a mean; scale by norm instead.")
        shape = (1, -1, *[1] * (weight.ndim - 2))
        raw = weight.double() / self.scale.to(weight.device).view(shape)
        moved = (raw * self.mean.to(weight.device).view(shape)).flatten(1).sum(dim=1)
        return raw.to(weight), (bias.double() - moved).to(bias)
