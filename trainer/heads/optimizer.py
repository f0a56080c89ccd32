"""AdamW and SGD on many heads at once, each with its own rate and decay: as torch.optim does to each alone.

A head is kept in units of its own peak rate: w = lr · u. Then all heads make steps of the same size, which one call of
torch.optim makes for all, given their gradients with respect to w: AdamW's step does not depend on u, and neither does
SGD's without its decay, which is added to the gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.errors import UsageError


class Optimizer:
    """Changes stacked tensors in place.

    Args:
        tensors: by name, `[H, ...]`, in units of the rates; those with one dimension in a head get no decay.
        kind: "adamw" (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101) or "sgd", whose decay is in the
            gradient.
        lr: `[H]`, peak rates. weight_decay: `[H]`. Both on the tensors' device.
        momentum: of SGD.
        clip_norm: largest 2-norm of a head's gradient; None clips nothing.

    Raises:
        UsageError: unknown kind.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        kind: str = "adamw",
        *,
        lr: Tensor,
        weight_decay: Tensor,
        momentum: float = 0.9,
        clip_norm: float | None = None,
    ):
        if kind not in ("adamw", "sgd"):
            raise UsageError(f"unknown optimizer {kind!r}; expected adamw or sgd.")
        self.tensors, self.kind, self.clip_norm = tensors, kind, clip_norm
        self.decay = lr * weight_decay if bool(weight_decay.any()) else None
        values = list(tensors.values())
        if kind == "adamw":
            self.optimizer = torch.optim.AdamW(values, weight_decay=0.0, fused=True)
        else:
            self.optimizer = torch.optim.SGD(values, momentum=momentum, fused=True)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        """One update.

        Args:
            gradients: `[H, ...]`, of the losses with respect to the heads' own tensors, lr · u, by name; may be
                overwritten.
            factor: share of the peak rate, 0 to 1.
        """
        if self.clip_norm is not None:
            _clip(gradients, self.clip_norm)
        for name, tensor in self.tensors.items():
            tensor.grad = gradients[name].contiguous()  # the fused kernels read memory in order
            if self.decay is None or tensor.ndim < 3:
                continue
            decay = self.decay.view(-1, *[1] * (tensor.ndim - 1))
            if self.kind == "adamw":
                tensor.mul_(1 - factor * decay)
            else:
                tensor.grad.addcmul_(tensor, decay)
        self.optimizer.param_groups[0]["lr"] = factor
        self.optimizer.step()


def _clip(gradients: Mapping[str, Tensor], most: float) -> None:
    """Each head's by itself, as `torch.nn.utils.clip_grad_norm_` does."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)  # [H]
    scale = (most / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients.values():
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
