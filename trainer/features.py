"""What the tail reads: trunk features, computed batch by batch, or once and kept.

A source has a length, and gives for lists of sample indices the batches that a step takes (see `steps.Batch`).
`Stream` decodes and runs the trunk each time; `Kept` has done both once. Which of the two a run can use depends on the
augmentation alone: a frozen trunk is a pure function of the image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from trainer.sampling import BatchLoader, BatchPlan, KeyedDataset
from trainer.steps import Batch


class Source(Protocol):
    """Batches of features with labels."""

    def __len__(self) -> int: ...

    def batches(self, indices: Sequence[list[int]], *, epoch: int) -> Iterator[Batch]:
        """One batch for each list of sample indices, in order; `epoch` is the key of the augmentation."""


class Stream:
    """Images through the trunk, each time anew.

    Args:
        dataset: gives uint8 images `[3, S, S]`, labels and indices for `(epoch, index)` requests.
        trunk: frozen; float `[B, 3, S, S]` → tuple of tensors `[B, ...]`; on the accelerator's device.
        normalize: uint8 → float, on the device.
        accelerator: for the device and the precision.
        workers: processes that load images; 0 loads in this one.
        timeout: seconds to wait for one of them; 0 waits for ever.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        *,
        trunk: nn.Module,
        normalize: nn.Module,
        accelerator: Accelerator,
        workers: int = 0,
        timeout: float = 0.0,
    ):
        pin_memory = accelerator.device.type == "cuda"
        self.loader = BatchLoader(dataset, workers=workers, pin_memory=pin_memory, timeout=timeout)
        self.trunk, self.normalize = trunk, normalize
        self.samples, self.accelerator = len(dataset), accelerator

    def __len__(self) -> int:
        return self.samples

    def batches(self, indices: Sequence[list[int]], *, epoch: int) -> Iterator[Batch]:
        device = self.accelerator.device
        for batch in self.loader([[(epoch, index) for index in some] for some in indices]):
            images = batch["image"].to(device, non_blocking=True)
            # no_grad, not inference_mode: autograd refuses to save inference tensors for the tail's backward.
            with torch.no_grad(), self.accelerator.autocast():
                inputs = self.trunk(self.normalize(images))
            yield {"inputs": inputs, "label": batch["label"].to(device, non_blocking=True), "index": batch["index"]}


class Kept:
    """Features in memory, on the accelerator's device: a batch costs one `index_select`."""

    def __init__(self, inputs: tuple[Tensor, ...], labels: Tensor):
        self.inputs, self.labels = inputs, labels  # [N, ...] each; int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: Sequence[list[int]], *, epoch: int) -> Iterator[Batch]:
        for some in indices:
            index = torch.tensor(some)
            rows = index.to(self.labels.device)
            inputs = tuple(tensor.index_select(0, rows) for tensor in self.inputs)
            yield {"inputs": inputs, "label": self.labels.index_select(0, rows), "index": index}


def keep(
    stream: Stream, plan: BatchPlan, *, limit: float, name: str = "", between: Callable[[], None] = lambda: None
) -> Source:
    """Compute all features once, each process its share, and keep them on every process (a collective).

    Args:
        stream: with a transform that does not depend on the epoch.
        plan: its micro-batch and processes are used.
        limit: GiB that the features may take on each process; if they would take more, `stream` itself comes back.
        name: for the progress bar.
        between: called after each batch, the same number of times on every process.
    """
    accelerator, samples = stream.accelerator, len(stream)
    ranks, rank = plan.processes, accelerator.process_index
    # Whole micro-batches, in contiguous blocks, so that each process sends one slice and batches are the same on any
    # number of processes.
    blocks = math.ceil(math.ceil(samples / plan.micro_batch) / ranks)
    bounds = [min(samples, part * blocks * plan.micro_batch) for part in range(ranks + 1)]
    firsts = range(bounds[rank], bounds[rank + 1], plan.micro_batch)
    mine = [list(range(first, min(first + plan.micro_batch, bounds[rank + 1]))) for first in firsts]

    probe = next(stream.batches([[0]], epoch=0))
    if samples * sum(tensor[0].nbytes for tensor in probe["inputs"]) > limit * 2**30:
        return stream
    inputs = tuple(tensor.new_empty((samples, *tensor.shape[1:])) for tensor in probe["inputs"])
    labels = probe["label"].new_empty(samples)
    batches = stream.batches(mine, epoch=0)
    quiet = True if not accelerator.is_main_process else None  # None: quiet unless on a terminal
    for turn in tqdm(range(blocks), f"features {name}", leave=False, disable=quiet):
        if turn < len(mine):
            batch, rows = next(batches), slice(mine[turn][0], mine[turn][-1] + 1)
            labels[rows] = batch["label"]
            for kept, computed in zip(inputs, batch["inputs"], strict=True):
                kept[rows] = computed
        between()
    if ranks > 1:
        for owner in range(ranks):
            for tensor in (*inputs, labels):
                if bounds[owner] < bounds[owner + 1]:
                    torch.distributed.broadcast(tensor[bounds[owner] : bounds[owner + 1]], src=owner)
    return Kept(inputs, labels)
