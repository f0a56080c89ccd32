"""AdamW and SGD on many heads at once, each with its own rate and decay: as torch.optim does to each alone."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.errors import UsageError

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # torch's


class Optimizer:
    """Changes stacked tensors in place.

    Args:
        tensors: by name, `[H, ...]`; those with one dimension in a head get no decay.
        kind: "adamw" (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101) or "sgd", whose decay is in the
            gradient.
        lr: `[H]`, peak rates. weight_decay: `[H]`.
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
        self.tensors, self.kind, self.momentum, self.clip_norm = tensors, kind, momentum, clip_norm
        self.lr, self.weight_decay = lr.double().cpu(), weight_decay.double().cpu()
        self.steps = torch.zeros_like(self.lr)  # [H]; heads may have sat out different steps
        self.first = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if kind == "adamw"}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], factor: float, *, idle: Tensor | None = None) -> None:
        """One update.

        Args:
            gradients: `[H, ...]`, by the tensors' names; may be overwritten.
            factor: share of the peak rate, 0 to 1.
            idle: bool `[H]`, heads that sit this step out as if it had not been; None: none does.
        """
        states = [self.tensors, self.first, self.second] if idle is not None else []
        before = [{name: tensor[idle].clone() for name, tensor in state.items()} for state in states]
        self.steps += 1 if idle is None else (~idle).cpu()
        if self.clip_norm is not None:
            _clip(gradients, self.clip_norm)
        rate = self.lr * factor
        steps = self.steps.clamp(min=1)
        for name, tensor in self.tensors.items():
            shape = (-1, *[1] * (tensor.ndim - 1))

            def wide(values: Tensor, tensor: Tensor = tensor, shape: tuple[int, ...] = shape) -> Tensor:
                return values.to(device=tensor.device, dtype=tensor.dtype).view(shape)

            gradient, first = gradients[name], self.first[name]
            decays = tensor.ndim > 2
            if self.kind == "sgd":
                if decays:
                    gradient = torch.addcmul(gradient, tensor, wide(self.weight_decay))
                first.mul_(self.momentum).add_(gradient)
                tensor.addcmul_(first, wide(-rate))
                continue
            second = self.second[name]
            if decays:
                tensor.mul_(wide(1 - rate * self.weight_decay))
            first.lerp_(gradient, 1 - _BETA1)
            second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            # lr/c₁ · m / (√v/√c₂ + ε), with the numbers of each head in two places only.
            root = (1 - _BETA2**steps).sqrt()
            scale = second.sqrt().add_(wide(_EPS * root))
            tensor.addcmul_(torch.div(first, scale, out=scale), wide(-rate * root / (1 - _BETA1**steps)))
        for state, old in zip(states, before, strict=True):
            for name, tensor in old.items():
                state[name][idle] = tensor


def _clip(gradients: Mapping[str, Tensor], most: float) -> None:
    """Each head's by itself, as `torch.nn.utils.clip_grad_norm_` does."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)  # [H]
    scale = (most / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients.values():
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
