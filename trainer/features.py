"""What the tail reads: trunk features, computed batch by batch, or once and kept.

A source has a length, and gives for lists of sample indices the batches that a step takes (see `steps.Batch`).
`Stream` decodes and runs the trunk each time; `Kept` has done both once. Which of the two a run can use depends on the
augmentation alone: a frozen trunk is a pure function of the image.
"""

import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import PIL
import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from trainer import cache
from trainer.processes import from_main, gather, raise_together, say
from trainer.sampling import BatchLoader, KeyedDataset, Request
from trainer.split import Uncut
from trainer.steps import Batch
from trainer.trunk import FastTrunk


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
        accelerator: for the device.
        views: how many augmented views of an image there are, used in turn, epoch by epoch; 1 if nothing is random.
            None: a new one each epoch.
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
        views: int | None = None,
        workers: int = 0,
        timeout: float = 0.0,
    ):
        pin_memory = accelerator.device.type == "cuda"
        self.loader = BatchLoader(dataset, workers=workers, pin_memory=pin_memory, timeout=timeout)
        self.dataset, self.trunk, self.normalize, self.views = dataset, trunk, normalize, views
        self.device, self.workers = accelerator.device, workers

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
            trunk=self.trunk.fingerprint(),
            images=self.dataset.images.stamp(),
            transform=repr(self.dataset.transform),
            normalize=[value.tolist() for _, value in self.normalize.named_buffers()],
            views=(self.views, self.dataset.seed if (self.views or 0) > 1 else None),
            versions=(torch.__version__, torchvision.__version__, PIL.__version__),
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            **more,
        )


class Kept:
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
    """The trunk of a run, at full speed, and what becomes of its features: kept in memory, in files, or not at all.

    Args:
        accelerator: of the run.
        trunk: frozen, or `split.Uncut`: then there is nothing to keep.
        normalize: uint8 → float, on the device.
        sample: a few images as the trunk gets them.
        batch: images that are decoded and go through the trunk together, where its features are kept; None: as many
            as it takes in one forward.
        memory: GiB that features may take on each process; 0 without `lasting`: none are kept.
        folder: for files of features that memory has no room for.
        lasting: put the features of all streams there, to be found again by the next run; else they go with this one.
        loading: "workers" and "timeout" of `Stream`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trunk: nn.Module,
        normalize: nn.Module,
        sample: Tensor,
        *,
        batch: int | None = None,
        memory: float = 2.0,
        folder: Path = Path("features"),
        lasting: bool = False,
        **loading: Any,
    ):
        self.accelerator, self.folder, self.lasting = accelerator, folder, lasting
        self.fast = None if isinstance(trunk, Uncut) else FastTrunk(accelerator, trunk, sample)
        self.batch = batch or (1 if self.fast is None else self.fast.most)
        self.rows = [] if self.fast is None else [(tensor.shape[1:], tensor.dtype) for tensor in self.fast(sample)]
        self._sample, self._left, self._keeps = sample, memory * 2**30, lasting or memory > 0
        self._stream = partial(
            Stream, trunk=self.fast or trunk, normalize=normalize, accelerator=accelerator, **loading
        )
        self._places: dict[Stream, str] = {}
        self._writer = from_main(accelerator, lambda: f"{socket.gethostname()}-{os.getpid()}")

    @property
    def compiled(self) -> bool:
        """Whether the trunk is."""
        return self.fast is not None and self.fast.compiled

    def stream(self, dataset: KeyedDataset, *, views: int | None) -> "Stream":
        """The features of a data set, computed as they are asked for; see `Stream`."""
        return self._stream(dataset, views=views)

    def plan(self, *, epochs: int, micro: int, compile: str = "auto", **streams: "Stream") -> list[str]:
        """Decide what is kept, and where, and whether to compile; gives that in words (a collective).

        Args:
            streams: by name, the one to keep first before the others.
            epochs: that are to come.
            micro: images in a forward of the trunk, if not all features are kept.
            compile: "on", "off", or "auto": if it pays.
        """
        if self.fast is None:
            return []
        size = sum(dtype.itemsize * math.prod(shape) for shape, dtype in self.rows)
        self._places = {stream: self._place(stream, size) for stream in streams.values()}
        coming = {name: len(s) * (s.views if self._places[s] else epochs) for name, s in streams.items()}
        fresh = [name for name, stream in streams.items() if stream.views is None]
        if not all(self._places.values()):
            self.batch = micro  # of one size for all, so that all are compiled, or none
        if compile != "off":
            shape = torch.Size((min(self.batch, self.fast.most), *self._sample.shape[1:]))
            self.fast.compile(shape, images=None if compile == "on" else sum(coming.values()))
        shapes = " + ".join("×".join(map(str, shape)) for shape, _ in self.rows)
        lines, seconds = [f"features of {shapes}, {_bytes(size)} an image"], {"once": 0.0, "an epoch": 0.0}
        for name, stream in streams.items():
            place = self._places[stream]
            where = {"memory": "kept in memory", "file": f"kept in {self.folder}", "": "computed in each epoch"}[place]
            lines.append(f"{name} {where}" + (f" ({_bytes(coming[name] * size)})" if place else ""))
            if place and stream.views > 1:
                lines[-1] += f", {stream.views} views: epoch {stream.views + 1} sees the images of epoch 1 again"
            images = coming[name] if place else len(stream)
            seconds["once" if place else "an epoch"] += images * self._seconds(stream) / self.accelerator.num_processes
        times = [f"about {_time(value)} {when}" for when, value in seconds.items() if value]
        lines = [f"plan    {'; '.join(lines)}: {' and '.join(times)} (trunk {self.fast.what})"]
        if fresh and epochs > 1:
            ratio, few = sum(coming.values()) / sum(map(len, streams.values())), min(4, epochs)
            lines.append(
                f"hint    --augment none would compute the features of {fresh[0]} once: {ratio:.1f}× less work; "
                f"--views {few}: once for each of {few} augmented views, used in turn"
            )
        elif (
            seconds["once"] + epochs * seconds["an epoch"] > 30
            and (ratio := self.fast.gain_of_bf16(self._sample)) > 1.5
        ):
            lines.append(f"hint    the trunk is {ratio:.1f}× faster in bf16: accelerate launch --mixed_precision bf16")
        return lines

    def keep(self, stream: "Stream", *, between: Callable[[], None] = lambda: None) -> Source:
        """The features of a stream where the plan has put them, computed once, each process its share (a collective).

        Args:
            between: called after each batch, the same number of times on every process.
        """
        place, accelerator = self._places.get(stream, ""), self.accelerator
        if not place:
            return stream
        rows = len(stream) * stream.views
        like = [((rows, *shape), dtype) for shape, dtype in self.rows]
        labels = torch.tensor(stream.dataset.labels, device=stream.device)
        if place == "memory" and not self.lasting:
            return Kept(self._compute(stream, like, between), labels, self.batch)
        entry = cache.Entry(self.folder, stream.key(batch=self.batch), like, writer=self._writer)
        if all(gather(accelerator, not accelerator.is_local_main_process or entry.is_good())):
            say(f"        {rows:,} features found in {entry.path}")
        else:
            try:
                self._on_each_machine(entry.reserve)
                self._compute(stream, like, between, outputs=entry.open_for_writing())
                self._on_each_machine(entry.commit)
            finally:
                entry.clean()
        found = entry.open()
        if place == "memory":
            found = tuple(tensor.to(stream.device, copy=True) for tensor in found)
        return Kept(found, labels, self.batch)

    def close(self) -> None:
        """Remove files that were for this run alone."""
        if not self.lasting and self.accelerator.is_local_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, stream: "Stream", size: int) -> str:
        """Where features of `size` bytes an image are kept: "memory", "file" or "" (a collective)."""
        if stream.views is None or not self._keeps:
            return ""
        size *= len(stream) * stream.views
        if size <= self._left:
            self._left -= size
            return "memory"

        def room() -> bool:
            folder = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
            return size * 1.05 < shutil.disk_usage(folder).free

        return "file" if from_main(self.accelerator, room) else ""

    def _on_each_machine(self, function: Callable[[], None]) -> None:
        """Call `function` on one process of each machine; what it raises, all raise (a collective)."""
        error = None
        if self.accelerator.is_local_main_process:
            try:
                function()
            except Exception as exception:
                error = exception
        raise_together(self.accelerator, error)

    def _compute(
        self,
        stream: Stream,
        like: cache.Like,
        between: Callable[[], None],
        outputs: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        """All rows: into `outputs`, which the processes of a machine share, or into memory of each process."""
        accelerator, samples, rows = self.accelerator, len(stream), like[0][0][0]
        ranks, rank, shared = accelerator.num_processes, accelerator.process_index, outputs is not None
        if shared:
            ranks, rank = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)), accelerator.local_process_index
        else:
            outputs = tuple(torch.empty(shape, dtype=dtype, device=stream.device) for shape, dtype in like)
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
        batches = stream.answers([[divmod(row, samples) for row in some] for some in mine])
        quiet = True if not accelerator.is_main_process else None  # None: quiet unless on a terminal
        for turn in tqdm(range(blocks), "features", leave=False, disable=quiet):
            if turn < len(mine):
                part = slice(mine[turn].start, mine[turn].stop)
                for output, computed in zip(outputs, next(batches)["inputs"], strict=True):
                    output[part] = computed
            between()
        for owner in range(ranks if not shared and ranks > 1 else 0):
            for tensor in outputs:
                if bounds[owner] < bounds[owner + 1]:
                    torch.distributed.broadcast(tensor[bounds[owner] : bounds[owner + 1]], src=owner)
        accelerator.wait_for_everyone()
        return outputs

    def _seconds(self, stream: "Stream") -> float:
        """For the whole way of an image, on one process: a guess from a few."""
        count = min(8, len(stream))
        stream.dataset[0, 0]  # the first one opens things
        began = time.perf_counter()
        for place in range(count):
            stream.dataset[0, place * len(stream) // count]
        decode = (time.perf_counter() - began) / count / max(stream.workers, 1)
        return max(decode, self.fast.seconds) if stream.device.type == "cuda" else decode + self.fast.seconds


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
