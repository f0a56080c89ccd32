"""One batch in, one number per sample and metric out.

A step is any function `(model, batch) -> {"loss": [B], "accuracy": [B], ...}`: the place for another loss or another
metric. It returns one value per *sample*, not their mean, so that means over steps, epochs and processes are exact.
"outputs", of any shape [B, ...], are what the model says of each sample: for metrics of the whole set, for predictions.
"""

from collections.abc import Callable
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import UsageError


class Batch(TypedDict):
    """Features of some samples, with their labels."""

    inputs: tuple[Tensor, ...]
    """For `model(*inputs)`: `[B, ...]` each."""
    label: Tensor
    """int64 `[B]` for classes; float `[B]`, `[B, C]` or any `[B, ...]` for other targets."""
    index: Tensor
    """int64 `[B]`: places in the dataset."""


Step = Callable[[nn.Module, Batch], dict[str, Tensor]]


def classification(*, label_smoothing: float = 0.0) -> Step:
    """Cross-entropy and top-1 accuracy.

    Args:
        label_smoothing: share of the target spread over all classes, 0 to 1, in training only (Szegedy et al., 2016,
            https://arxiv.org/abs/1512.00567).

    Returns:
        A step that returns "loss" float32 `[B]`; "accuracy" bool `[B]`, which is counted, not averaged; "outputs", the
        logits float32 `[B, C]`.
    """

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(*batch["inputs"]).float()  # [B, C]
        smoothing = label_smoothing if model.training else 0.0
        loss = F.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=smoothing)  # [B]
        return {"loss": loss, "accuracy": logits.argmax(dim=1) == batch["label"], "outputs": logits}

    return step


def check_outputs(outputs: dict[str, Tensor], *, size: int) -> None:
    """Check what a step returned for `size` samples.

    Raises:
        UsageError: names the wrong entry, what was found and what was expected.
    """
    if not isinstance(outputs, dict) or "loss" not in outputs:
        found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise UsageError(f'a step returns a dict with "loss" and one tensor per metric; found {found}.')
    for name, value in outputs.items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        good = shape[:1] == (size,) if name == "outputs" else shape == (size,)
        if not good:
            expected = f"({size}, ...)" if name == "outputs" else f"({size},)"
            raise UsageError(f"step output {name!r} is {shape}; expected one value per sample, shape {expected}.")
