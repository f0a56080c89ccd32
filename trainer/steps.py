"""One batch in, one number per sample and metric out.

A step is any function `(model, batch) -> {"loss": [B], "accuracy": [B], ...}`: the place for another loss or another
metric. It gives a value per *sample*, not their mean, so that means over windows, epochs and processes are exact.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# "inputs": a tuple of tensors [B, ...] for `model(*inputs)`; "label": int64 [B]; "index": int64 [B], in the dataset.
Batch = dict[str, Tensor | tuple[Tensor, ...]]
Step = Callable[[nn.Module, Batch], dict[str, Tensor]]


def classification(*, label_smoothing: float = 0.0) -> Step:
    """Cross-entropy and top-1 accuracy.

    Args:
        label_smoothing: share of the target spread over all classes, 0 to 1, in training only (Szegedy et al., 2016,
            https://arxiv.org/abs/1512.00567).

    Returns:
        A step: "loss" float32 `[B]`; "accuracy" bool `[B]`, which is counted, not averaged.
    """

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(*batch["inputs"]).float()  # [B, C]
        smoothing = label_smoothing if model.training else 0.0
        loss = F.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=smoothing)  # [B]
        return {"loss": loss, "accuracy": logits.argmax(dim=1) == batch["label"]}

    return step


def check_outputs(outputs: dict[str, Tensor], *, size: int) -> None:
    """Refuse what a step must not return; `size` is the number of samples it was given.

    Raises:
        TypeError, ValueError: says which entry is wrong, what was found and what is expected.
    """
    if not isinstance(outputs, dict) or "loss" not in outputs:
        found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise TypeError(f'a step returns a dict with "loss" and one tensor per metric; found {found}.')
    for name, value in outputs.items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        if shape != (size,):
            raise ValueError(f"step output {name!r} is {shape}; expected one value per sample, shape ({size},).")
