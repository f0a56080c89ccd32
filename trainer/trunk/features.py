"""What the tail reads: features of the trunk, computed batch by batch, or computed once and kept.

A source has a length, and returns the batches (see `steps.Batch`) for lists of sample indices. `ComputedFeatures`
decodes images and runs the trunk each time; `CachedFeatures` did both once. A frozen trunk is a pure function of the
image, so which of the two a run can use depends on the augmentation alone.
"""

import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import PIL
import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from trainer.config import SpeedConfig
from trainer.data.loader import BatchLoader, KeyedDataset, Workers
from trainer.data.sampling import BatchPlan, Request
from trainer.model.freezing import digest
from trainer.model.split import Uncut
from trainer.processes.together import gather, on_each_machine, on_main, print_main
from trainer.steps import Batch
from trainer.storage import files
from trainer.text import counted
from trainer.trunk import cache
from trainer.trunk.fast import FastTrunk
from trainer.trunk.plan import FeaturePlan, Part, bytes_per_image


class Source(Protocol):
    """Batches of features with labels."""

    def __len__(self) -> int: ...

    def batches(self, indices: Sequence[list[int]], *, epoch: int) -> Iterator[Batch]:
        """One batch for each list of sample indices, in order; `epoch` is the key of the augmentation."""
        ...


class ComputedFeatures:
    """Images through the trunk, each time anew.

    Args:
        dataset: gives uint8 images `[3, S, S]`, labels and indices for `(epoch, index)` requests.
        trunk: frozen; float `[B, 3, S, S]` → tuple of tensors `[B, ...]`; on the accelerator's device.
        normalize: uint8 → float, on the device.
        accelerator: for the device.
        workers: load the images.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        *,
        trunk: nn.Module,
        normalize: nn.Module,
        accelerator: Accelerator,
        workers: Workers = Workers(),
    ):
        pin_memory = accelerator.device.type == "cuda"
        self.loader = BatchLoader(dataset, workers=workers.count, pin_memory=pin_memory, timeout=workers.timeout)
        self.dataset, self.trunk, self.normalize, self.views = dataset, trunk, normalize, dataset.views
        self.device, self.workers = accelerator.device, workers.count
        self._probe: list[str] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, indices: Sequence[list[int]], *, epoch: int) -> Iterator[Batch]:
        view = epoch if self.views is None else epoch % self.views
        return self.answers([[(view, index) for index in some] for some in indices])

    def answers(self, requests: list[list[Request]]) -> Iterator[Batch]:
        """One batch for each list of `(view, index)`, in order."""
        for batch in self.loader(requests):
            images, label = (batch[name].to(self.device, non_blocking=True) for name in ("image", "label"))
            yield {"inputs": self.trunk(self.normalize(images)), "label": label, "index": batch["index"]}

    def key(self, **more: object) -> str:
        """What its features depend on, as one hash."""
        return cache.key_of(
            trunk=self.trunk.fingerprint(),  # pyright: ignore[reportCallIssue]  # a FastTrunk, as only that is kept
            images=self.dataset.images.stamp(),
            transform=re.sub(r" at 0x\w+", "", repr(self.dataset.transform)),  # no addresses of functions
            pixels=self._pixels(),
            normalize=[value.tolist() for _, value in self.normalize.named_buffers()],
            views=(self.views, self.dataset.seed if (self.views or 0) > 1 else None),
            versions=(torch.__version__, torchvision.__version__, PIL.__version__),
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            **more,
        )

    def _pixels(self) -> list[str]:
        """Hashes of a few images as they come from the transform: other code of the user's makes others of them."""
        if self._probe is None:
            places = range(0, len(self), max(len(self) // 8, 1))
            self._probe = [digest(torch.as_tensor(self.dataset[0, place]["image"])) for place in places]
        return self._probe


class CachedFeatures:
    """Features in memory, or in a mapped file: a batch costs one `index_select`.

    Args:
        inputs: `[views · N, ...]` each; row `view · N + index`.
        labels: int64 `[N]`, on the device that gets the batches.
        batch: images in the forwards that they are from.
    """

    def __init__(self, inputs: tuple[Tensor, ...], labels: Tensor, batch: int | None = None):
        self.inputs, self.labels, self.batch = inputs, labels, batch
        self.views = len(inputs[0]) // max(len(labels), 1)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: Sequence[list[int]], *, epoch: int) -> Iterator[Batch]:
        first, device = epoch % self.views * len(self), self.labels.device
        every = torch.tensor([*chain.from_iterable(indices)], dtype=torch.int64)  # at once: many small ones take longer
        for index in every.split([len(some) for some in indices]):
            labels = self.labels.index_select(0, index.to(device))
            rows = (index + first).to(self.inputs[0].device)
            inputs = tuple(tensor.index_select(0, rows).to(device) for tensor in self.inputs)
            yield {"inputs": inputs, "label": labels, "index": index}


class Features:
    """The trunk of a run, at full speed, and its features: kept in memory, in files, or computed when needed.

        features = Features(accelerator, split.trunk, normalize, sample, {"val": val_set, "train": train_set})
        print(features.plan)
        val = features.open("val")

    Args:
        accelerator: of the run.
        trunk: frozen, or `split.Uncut`: then there is nothing to keep.
        normalize: images as decoded → float, on the device.
        sample: a few images as the trunk gets them, float `[B, C, S, S]`.
        datasets: by name, the one to keep first before the others.
        config: cache and compilation.
        epochs: still to train.
        plan: its micro-batch is the size of forwards of the trunk, if not all features are kept.
        exact: the micro-batch is that size in any case: another one may change the last digits.
        batch: that size, where features are kept; None: as many as the trunk takes in one forward.
        folder: for files of features, unless `config` names one.
        workers: load the images.

    Attributes:
        plan: where features are kept; prints itself.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trunk: nn.Module,
        normalize: nn.Module,
        sample: Tensor,
        datasets: Mapping[str, KeyedDataset],
        *,
        config: SpeedConfig | None = None,
        epochs: int = 1,
        plan: BatchPlan,
        exact: bool = False,
        batch: int | None = None,
        folder: Path = Path("features"),
        workers: Workers = Workers(),
    ):
        config = config or SpeedConfig()
        self.accelerator, self._lasting = accelerator, config.cache_dir is not None
        self.folder = folder if config.cache_dir is None else Path(config.cache_dir)
        self.fast = None if isinstance(trunk, Uncut) else FastTrunk(accelerator, trunk, sample)
        batch = batch or (plan.micro_batch if exact or self.fast is None else self.fast.most)
        self.batch: int = batch
        self._rows = [] if self.fast is None else [(tensor.shape[1:], tensor.dtype) for tensor in self.fast(sample)]
        self._computed = {
            name: ComputedFeatures(
                dataset,
                trunk=self.fast or trunk,
                normalize=normalize,
                accelerator=accelerator,
                workers=workers,
            )
            for name, dataset in datasets.items()
        }
        self._writer = on_main(accelerator, lambda: f"{socket.gethostname()}-{os.getpid()}")
        self.plan = self._plan(config, sample, epochs=epochs, micro_batch=plan.micro_batch)

    @property
    def compiled(self) -> bool:
        """Whether the trunk is compiled."""
        return self.fast is not None and self.fast.compiled

    def open(self, name: str, *, between: Callable[[], Any] = lambda: None) -> Source:
        """The features of a data set: kept ones are computed now, once, each process its share (a collective).

        Args:
            name: one of `datasets`.
            between: called after each batch, the same number of times on every process.
        """
        computed, accelerator = self._computed[name], self.accelerator
        (place,) = (part.place for part in self.plan.parts if part.name == name)
        if not place:
            return computed
        like, views = self._like(computed), computed.views or 1
        labels = torch.as_tensor(computed.dataset.labels).to(computed.device)
        if place == "memory" and not self._lasting:
            return CachedFeatures(self._compute(computed, like, between), labels, self.batch)
        entry = self._entry(computed)
        if all(gather(accelerator, not accelerator.is_local_main_process or entry.is_good())):
            print_main(f"        {counted(len(computed) * views, 'feature')} found in {entry.path}")
        else:
            try:
                on_each_machine(accelerator, entry.reserve)
                self._compute(computed, like, between, outputs=entry.open_for_writing())
                on_each_machine(accelerator, entry.commit)
            finally:
                entry.clean()
        found = entry.open()
        if place == "memory":
            found = tuple(tensor.to(computed.device, copy=True) for tensor in found)
        return CachedFeatures(found, labels, self.batch)

    def __enter__(self) -> "Features":
        return self

    def __exit__(self, *_: object) -> None:
        """Remove files that were for this run alone, unless its folder is another run's now."""
        lost = files.lost_lock(self.folder.parent / "lock")
        if not self._lasting and self.accelerator.is_local_main_process and not lost:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _plan(self, config: SpeedConfig, sample: Tensor, *, epochs: int, micro_batch: int) -> FeaturePlan:
        """Decide where features are kept, and whether to compile the trunk (a collective)."""
        size, left, parts = bytes_per_image(self._rows), config.cache_memory * 2**30, []
        for name, computed in self._computed.items():
            place, total = "", size * len(computed) * (computed.views or 1)
            if self.fast is not None and computed.views is not None and (self._lasting or config.cache_memory > 0):
                place = (
                    "memory" if total <= left else "file" if on_main(self.accelerator, self._has_room, total) else ""
                )
                left -= total if place == "memory" else 0
            parts.append(Part(name, len(computed), computed.views, place))
        if not all(part.place for part in parts):
            self.batch = micro_batch  # one size of forwards for all, so that all are compiled, or none
        if self._lasting and self.fast is not None:
            entries = [self._entry(self._computed[part.name]) for part in parts]
            there = on_main(self.accelerator, lambda: [entry.path.is_dir() for entry in entries])
            parts = [replace(part, found=bool(part.place) and found) for part, found in zip(parts, there, strict=True)]
        shapes = [shape for shape, _ in self._rows]
        plan = FeaturePlan(shapes, size, parts, epochs, self.accelerator.num_processes, self.folder, "")
        if self.fast is None:
            return plan
        if config.compile != "off":
            shape = torch.Size((min(self.batch, self.fast.most), *sample.shape[1:]))
            self.fast.compile(shape, images=None if config.compile == "on" else plan.images)
        parts = [p if p.found else replace(p, seconds=self._seconds(self._computed[p.name])) for p in parts]
        plan = replace(plan, parts=parts, trunk=self.fast.what)
        once, each = plan.seconds
        if once + epochs * each > 30:  # seconds: shorter runs need no hint, and the measurement takes time
            plan = replace(plan, gain_of_bf16=self.fast.gain_of_bf16(sample))
        return plan

    def _has_room(self, size: int) -> bool:
        folder = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        return size * 1.05 < shutil.disk_usage(folder).free

    def _like(self, computed: ComputedFeatures) -> cache.Like:
        """Shape and type of the kept tensors of a data set."""
        return [((len(computed) * (computed.views or 1), *shape), dtype) for shape, dtype in self._rows]

    def _entry(self, computed: ComputedFeatures) -> cache.Entry:
        return cache.Entry(self.folder, computed.key(batch=self.batch), self._like(computed), writer=self._writer)

    def _compute(
        self,
        computed: ComputedFeatures,
        like: cache.Like,
        between: Callable[[], None],
        outputs: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        """All rows: into `outputs`, which the processes of a machine share, or into memory of each process."""
        accelerator, samples, rows = self.accelerator, len(computed), like[0][0][0]
        ranks, rank, shared = accelerator.num_processes, accelerator.process_index, outputs is not None
        if shared:
            ranks, rank = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks), accelerator.local_process_index
        if outputs is None:
            outputs = tuple(torch.empty(shape, dtype=dtype, device=computed.device) for shape, dtype in like)
        # Whole batches, of one view each, in contiguous blocks: each process has one slice, and batches are the same on
        # any number of processes.
        every = [
            range(view + first, view + min(first + self.batch, samples))
            for view in range(0, rows, samples)
            for first in range(0, samples, self.batch)
        ]
        blocks = math.ceil(len(every) / ranks)
        bounds = [every[part * blocks].start if part * blocks < len(every) else rows for part in range(ranks + 1)]
        mine = every[rank * blocks : (rank + 1) * blocks]
        batches = computed.answers([[divmod(row, samples) for row in some] for some in mine])
        quiet = True if not accelerator.is_main_process else None  # None: quiet unless on a terminal
        for turn in tqdm(range(blocks), "features", leave=False, disable=quiet):
            if turn < len(mine):
                part = slice(mine[turn].start, mine[turn].stop)
                for output, values in zip(outputs, next(batches)["inputs"], strict=True):
                    output[part] = values
            between()
        for owner in range(ranks if not shared and ranks > 1 else 0):
            for tensor in outputs:
                if bounds[owner] < bounds[owner + 1]:
                    torch.distributed.broadcast(tensor[bounds[owner] : bounds[owner + 1]], src=owner)
        accelerator.wait_for_everyone()
        return outputs

    def _seconds(self, computed: ComputedFeatures) -> float:
        """For the whole way of an image, on one process: a guess from a few."""
        count = min(8, len(computed))
        computed.dataset[0, 0]  # the first one opens things
        began = time.perf_counter()
        for place in range(count):
            computed.dataset[0, place * len(computed) // count]
        decode = (time.perf_counter() - began) / count / max(computed.workers, 1)
        trunk = 0.0 if self.fast is None else self.fast.seconds
        return max(decode, trunk) if computed.device.type == "cuda" else decode + trunk
