"""Seeds from keys, the order of the images in an epoch, and their division into batches and over processes."""

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from trainer.errors import UsageError
from trainer.text import counted

# A request to a dataset: an epoch, whose random numbers the augmentation uses, and the index of an image.
Request = tuple[int, int]  # (epoch, index)


def random_key(*parts: int | str) -> int:
    """A seed of 63 bits that depends only on its parts, such as a seed, a purpose and an epoch."""
    text = "\x1f".join(str(part) for part in parts)
    (value,) = struct.unpack("<Q", hashlib.blake2b(text.encode(), digest_size=8).digest())
    return value >> 1  # torch.manual_seed takes a signed 64-bit integer


def seed_all(key: int, *, devices: bool = True) -> None:
    """Seed `random`, `numpy.random` and torch.

    Args:
        key: see `random_key`.
        devices: also seed the generators of GPUs; False for data workers, which must not touch a GPU.
    """
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    if devices and torch.accelerator.is_available():
        torch.manual_seed(key)
    else:  # the same for the CPU, in a tenth of the time
        torch.default_generator.manual_seed(key)


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Restore the states of `random`, `numpy.random` and torch's CPU generator at the end."""
    outside = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(outside[0])
        np.random.set_state(outside[1])
        torch.set_rng_state(outside[2])


def epoch_order(samples: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the images in an epoch: a permutation of `range(samples)`, the same on every process."""
    generator = torch.Generator().manual_seed(random_key(seed, "order", epoch))
    return torch.randperm(samples, generator=generator).tolist()


class Micro(NamedTuple):
    """The images of one forward and backward on one process."""

    number: int  # place in the optimizer step, over all processes; dropout is seeded with it
    indices: list[int]
    counts: bool  # False for a filler, whose gradient counts as zero


@dataclass(frozen=True, init=False)
class BatchPlan:
    """The division of images into optimizer steps, micro-batches and processes.

    A *window* is the images of one optimizer step over all processes; the last window of an epoch may be smaller.

    Args:
        samples: number of training images.
        batch_size: images per optimizer step, over all processes.
        micro_batch: images per forward on one process; None: `batch_size / processes`.
        processes: number of processes.

    Raises:
        UsageError: the numbers do not divide (names numbers that do), or there are fewer images than processes.
    """

    samples: int
    batch_size: int
    micro_batch: int
    processes: int

    def __init__(self, samples: int, batch_size: int, micro_batch: int | None, processes: int):
        batch, ranks = batch_size, processes
        if batch < 1 or (micro_batch is not None and micro_batch < 1):
            raise UsageError(f"batch_size ({batch}) and micro_batch ({micro_batch}) must be at least 1.")
        if micro_batch is None:
            if batch % ranks:
                near = sorted({max(batch // ranks, 1) * ranks, (batch // ranks + 1) * ranks})
                raise UsageError(
                    f"batch_size {batch} does not divide over {ranks} processes; {' or '.join(map(str, near))} would."
                )
            micro_batch = batch // ranks
        if batch % (micro_batch * ranks):
            fits = [m for m in range(1, batch // ranks + 1) if batch % (m * ranks) == 0]
            advice = f"with batch_size {batch}, micro_batch can be {', '.join(map(str, fits))}" if fits else ""
            unit = micro_batch * ranks
            near = sorted({max(batch // unit, 1) * unit, (batch // unit + 1) * unit})
            advice += f"{'; ' if advice else ''}with micro_batch {micro_batch}, batch_size can be "
            raise UsageError(
                f"batch_size {batch} is not micro_batch {micro_batch} × {counted(ranks, 'process')} × a whole "
                f"number; {advice}{' or '.join(map(str, near))}."
            )
        if samples < ranks:
            few = f"{samples} training image{'s are' if samples != 1 else ' is'} too few"
            raise UsageError(f"{few} for {ranks} processes; use fewer processes.")
        values = {"samples": samples, "batch_size": batch, "micro_batch": micro_batch, "processes": ranks}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # it is frozen

    @property
    def accumulation(self) -> int:
        """Micro-batches of each process in a full window."""
        return self.batch_size // (self.micro_batch * self.processes)

    @property
    def smallest(self) -> int:
        """Number of images in the smallest micro-batch of an epoch."""
        return self.samples % self.batch_size % self.micro_batch or min(self.micro_batch, self.samples)

    @property
    def steps_per_epoch(self) -> int:
        """Number of windows in an epoch, with the last one, which may be smaller."""
        return -(-self.samples // self.batch_size)

    def __str__(self) -> str:
        last = self.samples % self.batch_size
        return (
            f"batch {self.batch_size} = micro-batch {self.micro_batch} × {counted(self.processes, 'process')} "
            f"× accumulation {self.accumulation}; {counted(self.samples, 'image')} = "
            f"{counted(self.steps_per_epoch, 'step')} an epoch"
            + (f" (the last of {counted(last, 'image')})" if last else "")
        )

    def windows(self, *, seed: int, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """The windows of an epoch, as lists of at most `batch_size` indices.

        Args:
            seed: seed of the run.
            epoch: counted from 0.
            start: number of images of the epoch that were used before, for a run that is continued.
        """
        order = epoch_order(self.samples, seed=seed, epoch=epoch)
        for first in range(start, self.samples, self.batch_size):
            yield order[first : first + self.batch_size]

    def share(self, window: list[int], *, rank: int, filler: bool = True) -> list[Micro]:
        """The micro-batches of one process.

        Args:
            window: the images of the optimizer step.
            rank: index of the process.
            filler: return at least one micro-batch, so that each process can take part in the reduction of gradients.
                A filler has two images, because a BatchNorm that trains refuses one.
        """
        micros = [
            Micro(number, window[first : first + self.micro_batch], True)
            for number, first in enumerate(range(0, len(window), self.micro_batch))
        ]
        return micros[rank :: self.processes] or [Micro(len(micros), window[:2], False)] * filler

    def eval_batches(self, samples: int, *, rank: int) -> list[list[int]]:
        """The batches of `range(samples)` for one process; over all processes, each sample occurs exactly once."""
        batches = [
            list(range(first, min(first + self.micro_batch, samples))) for first in range(0, samples, self.micro_batch)
        ]
        return batches[rank :: self.processes]
