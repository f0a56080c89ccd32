"""Evaluate a model on a data set: means of per-sample values, and metrics that need all outputs at once."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.data.sampling import BatchPlan
from trainer.errors import UsageError
from trainer.metrics import Totals, means
from trainer.processes.together import gather, on_main
from trainer.steps import Step
from trainer.trunk.features import Source

# Outputs [N, ...] and labels [N, ...] of a data set, in its order → numbers by name.
Metrics = Callable[[Tensor, Tensor], dict[str, float]]


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    tail: nn.Module,
    source: Source,
    *,
    plan: BatchPlan,
    step: Step,
    metrics: Metrics | None = None,
    between: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """The means of a step's values over all samples, each counted once, and the numbers of `metrics` (a collective).

    Args:
        accelerator: of the run.
        tail: prepared by the accelerator, without the wrapper that reduces gradients; it is put in eval mode.
        source: the features of the images.
        plan: its micro-batch and number of processes are used.
        step: `(tail, batch) → {"loss": [B], ...}`.
        metrics: called once, on the main process, with the "outputs" of the step and the labels of all samples, in the
            order of the data set, whatever the batches and the number of processes are. None: no such numbers.
        between: called after each batch, the same number of times on every process.

    Raises:
        UsageError: `metrics` is given and the step returns no "outputs"; or both return a value of the same name.
    """
    tail.eval()
    totals, seen = Totals(accelerator.device), []
    batches = source.batches(plan.eval_batches(len(source), rank=accelerator.process_index), epoch=0)
    for _ in plan.eval_batches(len(source), rank=0):  # the main process has at least as many batches as any other
        if batch := next(batches, None):
            values = step(tail, batch)
            totals.add(values)
            if metrics is not None and (outputs := values.get("outputs")) is not None:
                seen.append((batch["index"].cpu(), outputs, batch["label"].cpu()))
        between()
    sums = totals.over_processes(accelerator)
    assert sums["samples"] == len(source), f"evaluated {sums['samples']} samples of {len(source)}"
    result = means(sums)
    if metrics is not None:
        seen = [(index, outputs.cpu(), label) for index, outputs, label in seen]
        every = [part for parts in gather(accelerator, seen) for part in parts]
        more = on_main(accelerator, lambda: _whole(metrics, every, len(source)))
        if both := result.keys() & more.keys():
            raise UsageError(f"step() and metrics() of the recipe both return {min(both)}: rename one of them.")
        result |= more
    return result


def _whole(metrics: Metrics, parts: list[tuple[Tensor, Tensor, Tensor]], samples: int) -> dict[str, float]:
    """The numbers of `metrics` from (index, outputs, labels) of batches in any order."""
    if sum(len(index) for index, *_ in parts) != samples:
        raise UsageError('metrics() of the recipe needs the outputs of the model: let step() return them as "outputs".')
    index, outputs, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = index.argsort()
    found = metrics(outputs[order].float(), labels[order])
    if not isinstance(found, dict) or any(isinstance(value, Tensor) and value.numel() != 1 for value in found.values()):
        raise UsageError("metrics() of the recipe returns a dict with one number for each name.")
    return {name: float(value) for name, value in found.items()}
