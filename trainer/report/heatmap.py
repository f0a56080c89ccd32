"""Where in an image the evidence for an answer lies: class activation maps."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_RAMP = np.array([[20, 8, 60], [160, 30, 110], [213, 94, 0], [240, 228, 66]], dtype=float)  # darker to brighter
_OPACITY = (0.35, 0.6)  # from the lowest to the highest


def cam(feature_maps: Tensor, weight_row: Tensor) -> Tensor:
    """Class activation map of a linear head on globally average-pooled features (Zhou et al. 2016).

    It is exact: its mean plus the bias of the class is the logit.

    Args:
        feature_maps: `[C, h, w]`, what is pooled.
        weight_row: `[C]`, the weights of the class in the head.

    Returns:
        `[h, w]`, in units of the logit; negative where a place spoke against the class.
    """
    return torch.einsum("chw,c->hw", feature_maps, weight_row)


def grad_cam(feature_maps: Tensor, target: int, *, tail: Callable[[Tensor], Tensor]) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017), for any tail; parameters and their gradients are not touched.

    Args:
        feature_maps: `[C, h, w]`, what the tail reads.
        target: the class whose logit is explained.
        tail: from feature maps `[1, C, h, w]`, logits `[1, K]`; differentiable and in evaluation mode.

    Returns:
        `[h, w]`, zero or positive.
    """
    with torch.enable_grad():
        maps = feature_maps.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(tail(maps[None])[0, target], maps)
    return cam(maps.detach(), gradient.mean((1, 2))).relu()


def layer(heat: np.ndarray | Tensor) -> Image.Image:
    """A heat map `[h, w]` as a translucent image of that size: dark where it is zero or less, bright at its highest."""
    values = torch.as_tensor(heat).detach().cpu().double().clamp(min=0).numpy()
    steps = values / (values.max() or 1.0) * (len(_RAMP) - 1)  # [h, w]
    channels = [np.interp(steps, range(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)]
    alpha = 255 * np.interp(steps, (0, len(_RAMP) - 1), _OPACITY)
    return Image.fromarray(np.stack([*channels, alpha], axis=-1).round().astype(np.uint8))


def overlay(image: Image.Image, heat: np.ndarray | Tensor) -> Image.Image:
    """An image with a heat map `[h, w]` over all of it, scaled smoothly to its size."""
    over = layer(heat).resize(image.size, Image.Resampling.BICUBIC)
    return Image.alpha_composite(image.convert("RGBA"), over).convert("RGB")
