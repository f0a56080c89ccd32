"""Load batches of images in worker processes; the bytes do not depend on the number of workers."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from trainer.data.images import Images
from trainer.data.sampling import Request, kept_randomness, random_key, seed_all
from trainer.errors import DataError
from trainer.processes.cores import cores_per_process
from trainer.processes.workers import batches as batches_of


@dataclass(frozen=True)
class Workers:
    """Processes that load images.

    Attributes:
        count: number of processes per training process; 0: the training process loads its images itself.
        timeout: seconds to wait for a batch of one of them; 0: no limit.
    """

    count: int = 0
    timeout: float = 0.0

    @classmethod
    def of(cls, accelerator: Accelerator, count: int | None, *, minutes: float) -> "Workers":
        """The workers of a run: `count` of them, or one per core that the process may use; `minutes` is the timeout."""
        return cls(cores_per_process(accelerator) if count is None else count, 60 * minutes)


class Sample(TypedDict):
    """One image under its transform."""

    image: Tensor
    """`[..., C, S, S]`."""
    label: int | Tensor
    index: int


class KeyedDataset(Dataset):
    """Images with a transform whose random numbers depend only on seed, epoch (or view) and index.

    Args:
        images: the images, with their labels.
        transform: `[..., C, H, W]` → `[..., C, S, S]`; may draw from `random`, `numpy.random` and torch.
        seed: seed of the run.
        views: number of random views of each image, used in turn, epoch by epoch; 1: the transform is not random;
            None: a new view in each epoch.
    """

    def __init__(self, images: Images, transform: Callable[[Tensor], Tensor], *, seed: int, views: int | None = 1):
        self.images, self.transform, self.seed, self.views = images, transform, seed, views
        self.labels = images.labels

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, count: int) -> Tensor:
        """The first images as one batch, at most `count`: `[B, ..., C, S, S]`, such as uint8 `[B, 3, S, S]`."""
        return torch.stack([self[0, index]["image"] for index in range(min(count, len(self)))])

    def __getitem__(self, request: Request) -> Sample:
        with kept_randomness():
            return self.item(request)

    def item(self, request: Request) -> Sample:
        """As `self[request]`, for a caller that uses `kept_randomness` once for a whole batch, which is faster."""
        epoch, index = request
        seed_all(random_key(self.seed, "augment", epoch, index), devices=False)
        return {"image": self.transform(self.images[index]), "label": self.labels[index], "index": index}


def outlast_signals(worker: int) -> None:
    """Let a data worker ignore signals that are sent to the whole process group, because the trainer needs its batches.

    The trainer saves and stops after one more step. The second SIGTERM ends the worker: a DataLoader sends one to a
    worker that does not end by itself.
    """
    for number in (signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGINT)):  # Windows has no SIGUSR1
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class BatchLoader:
    """Loads batches on request, in order, in worker processes that live as long as the loader.

    Args:
        dataset: the images.
        workers: number of worker processes; 0: this process loads them. The bytes do not depend on it.
        pin_memory: put batches in page-locked memory, for faster copies to a GPU.
        timeout: seconds to wait for a batch; 0: no limit.
    """

    def __init__(self, dataset: KeyedDataset, *, workers: int = 0, pin_memory: bool = False, timeout: float = 0.0):
        self.dataset, self._timeout = dataset, timeout
        self._batches: list[list[Request]] = []  # the requests of the next iteration
        self._loader = DataLoader(
            _Reporting(dataset),
            collate_fn=_collate,
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=outlast_signals,
            generator=torch.Generator(),  # otherwise each iterator draws from torch's global generator
        )

    def __call__(self, batches: list[list[Request]]) -> Iterator[dict[str, Tensor]]:
        """Load batches.

        Args:
            batches: for each batch, the epoch and the index of each image.

        Yields:
            A dict for each batch, in order: "image" `[B, ..., C, S, S]` in the type that the transform returns (uint8
            `[B, 3, S, S]` by default), channels_last; "label" int64 `[B]`, or `[B, ...]` if labels are tensors;
            "index" int64 `[B]`.

        Raises:
            DataError: an image cannot be read; names it, and the number of others in its batch.
            OSError: an error of the machine, such as too many open files.
        """
        self._batches[:] = batches
        for batch in batches_of(self._loader, timeout=self._timeout):
            if isinstance(batch, Exception):
                raise batch
            images = batch["image"]
            yield batch | {"image": images.movedim(-1, -3) if images.ndim > 3 else images}


class _Reporting(Dataset):
    """Returns errors instead of raising them, because a DataLoader would add a worker's traceback to the message."""

    def __init__(self, dataset: KeyedDataset):
        self.dataset = dataset

    def __getitems__(self, requests: list[Request]) -> list[Sample] | Exception:
        samples, errors = [], []
        with kept_randomness():
            for request in requests:
                try:
                    samples.append(self.dataset.item(request))
                except DataError as error:
                    errors.append(error)
                except OSError as error:
                    return error
        if not errors:
            return samples
        more = f" (and {len(errors) - 1} more of the {len(requests)} images of this batch)" if len(errors) > 1 else ""
        return DataError(f"{errors[0]}{more}. To omit such images, start a new run with --bad-images skip")


def _collate(samples: list[Sample] | Exception) -> dict[str, Tensor] | Exception:
    if isinstance(samples, Exception):
        return samples
    # Stacked as [B, H, W, C], the memory layout of decoded images, so that each image is one copy.
    images = (sample["image"] for sample in samples)
    interleaved = [image.movedim(-3, -1) if image.ndim > 2 else image for image in images]
    return default_collate([{**sample, "image": image} for sample, image in zip(samples, interleaved, strict=True)])
