"""The loss and the metrics of a batch, one value for each sample.

A step is any function `(model, batch) -> {"loss": [B], "accuracy": [B], ...}`: write one to have another loss or other
metrics. It returns one value per sample and not their mean, so that means over steps, epochs and processes are exact.
"outputs", of any shape `[B, ...]`, are the outputs of the model, for predictions and metrics of the whole data set.
"""

from collections.abc import Callable
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import UsageError


class Batch(TypedDict):
    """The features and labels of some samples."""

    inputs: tuple[Tensor, ...]
    """For `model(*inputs)`: `[B, ...]` each."""
    label: Tensor
    """int64 `[B]` for classes; float `[B]`, `[B, C]` or any `[B, ...]` for other targets."""
    index: Tensor
    """int64 `[B]`: indices in the data set."""


Step = Callable[[nn.Module, Batch], dict[str, Tensor]]


def classification(*, label_smoothing: float = 0.0) -> Step:
    """A step with cross-entropy and top-1 accuracy, for classification.

    Args:
        label_smoothing: share of the target that is spread over all classes, 0 to 1; only in training (Szegedy et al.,
            2016, https://arxiv.org/abs/1512.00567).

    Returns:
        A step that returns "loss" float32 `[B]`; "accuracy" bool `[B]`, so that its sum is an exact count;
        "outputs", the logits float32 `[B, C]`.
    """

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(*batch["inputs"]).float()  # [B, C]
        smoothing = label_smoothing if model.training else 0.0
        loss = F.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=smoothing)  # [B]
        return {"loss": loss, "accuracy": logits.argmax(dim=1) == batch["label"], "outputs": logits}

    return step


def check_outputs(outputs: dict[str, Tensor], *, size: int) -> None:
    """Check the values that a step returned.

    Args:
        outputs: returned by the step.
        size: number of samples of the batch.

    Raises:
        UsageError: names the wrong entry, its shape and the expected shape.
    """
    if not isinstance(outputs, dict) or "loss" not in outputs:
        found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise UsageError(
            f'step() of the recipe returned {found}; expected a dict with "loss" and one tensor for each metric.'
        )
    for name, value in outputs.items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        good = shape[:1] == (size,) if name == "outputs" else shape == (size,)
        if not good:
            expected = f"({size}, ...)" if name == "outputs" else f"({size},)"
            raise UsageError(f"step output {name!r} is {shape}; expected one value per sample, shape {expected}.")
