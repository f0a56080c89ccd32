"""Sum gradients so that their bits depend neither on the number of processes nor on where a run was interrupted."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from trainer.data.sampling import BatchPlan, Micro
from trainer.errors import UsageError
from trainer.steps import Batch


class Loop(Protocol):
    """The parts of a `trainer.Trainer` that are used here."""

    accelerator: Accelerator
    tail: nn.Module
    optimizer: Any
    plan: BatchPlan
    trainable: dict[str, nn.Parameter]
    try_one_image: Any
    arrange_buckets: Any

    def backward(self, micro: Micro, batch: Batch, *, scale: float) -> None: ...


def sum_in_order(loop: Loop, window: list[int], share: list[Micro], batches: Iterator[Batch]) -> None:
    """Set the gradient of a window to g₀ + g₁ + ..., the sum over its micro-batches in their order (a collective).

    DDP instead adds the sums of each process, so another number of processes has another order, and other bits.

    Args:
        loop: a `Trainer`; backward passes add to the gradients of its parameters.
        window: indices of the samples of the optimizer step, over all processes.
        share: micro-batches of this process.
        batches: their batches, in order.
    """
    ranks, micros = loop.plan.processes, math.ceil(len(window) / loop.plan.micro_batch)
    parameters = list(loop.trainable.values())
    total = torch.zeros(())
    for first in range(0, micros, ranks):  # in this round, process r has the micro-batch first + r
        if first // ranks < len(share):
            with loop.accelerator.no_sync(loop.tail):
                loop.backward(share[first // ranks], next(batches), scale=1 / len(window))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        loop.optimizer.zero_grad()
        rows = [flat]
        if ranks > 1:
            rows = [torch.empty_like(flat) for _ in range(ranks)]
            torch.distributed.all_gather(rows, flat)
        for number, row in enumerate(rows[: micros - first]):
            total = row if first + number == 0 else total + row
    for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def rehearse(loop: Loop, share: list[Micro], batches: Iterator[Batch]) -> Iterator[Batch]:
    """Prepare the first optimizer step with the first batch (a collective).

    A backward pass whose gradients are dropped lets DDP arrange its buckets: after its first backward DDP orders
    parameters by the arrival of their gradients, and the place of a parameter in a bucket decides the order in which
    more than two processes are summed. Without this, the first step after a resume would have other bits than the same
    step of an uninterrupted run.

    Args:
        loop: a `Trainer`.
        share: micro-batches of this process.
        batches: their batches, in order.

    Returns:
        All batches, with the first one.

    Raises:
        UsageError: a BatchNorm that trains cannot take the last micro-batch of an epoch, which has one image.
    """
    if not share or not (loop.try_one_image or loop.arrange_buckets):
        return batches
    first = next(batches)
    if loop.try_one_image:
        try:
            with torch.no_grad(), _same_buffers(loop.tail):
                loop.accelerator.unwrap_model(loop.tail)(*(tensor[:1] for tensor in first["inputs"]))
        except ValueError as error:
            raise UsageError(
                f"a BatchNorm that trains cannot take the last micro-batch of an epoch, which has one image: {error} "
                f"({loop.plan}). Choose another --batch-size or --micro-batch, or leave BatchNorm frozen."
            ) from error
    if loop.arrange_buckets:
        with _same_buffers(loop.tail):
            loop.backward(share[0]._replace(counts=False), first, scale=0.0)
        loop.optimizer.zero_grad()
    loop.try_one_image = loop.arrange_buckets = False
    return chain([first], batches)


@contextmanager
def _same_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the buffers of a module at the end, so that a BatchNorm that trains does not count this batch."""
    before = {name: value.clone() for name, value in module.named_buffers()}
    try:
        yield
    finally:
        for name, value in module.named_buffers():
            value.copy_(before[name])
