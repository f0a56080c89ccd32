"""Batches of images, loaded by worker processes: the same bytes from any number of them."""

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
        count: per training process; 0: the process loads its images itself.
        timeout: seconds to wait for one of them; 0: for ever.
    """

    count: int = 0
    timeout: float = 0.0

    @classmethod
    def of(cls, accelerator: Accelerator, count: int | None, *, minutes: float) -> "Workers":
        """The workers of a run; None: one per core that the process may use."""
        return cls(cores_per_process(accelerator) if count is None else count, 60 * minutes)


class Sample(TypedDict):
    """One image under its transform."""

    image: Tensor
    """`[..., C, S, S]`."""
    label: int | Tensor
    index: int


class KeyedDataset(Dataset):
    """Images under a transform whose randomness depends on (seed, epoch, index) alone.

    Args:
        images: the images, with their labels.
        transform: `[..., C, H, W]` → `[..., C, S, S]`; may draw from `random`, `numpy.random` and torch.
        seed: of the run.
        views: random views of an image, used in turn, epoch by epoch; 1: nothing is random. None: a new view in each
            epoch.
    """

    def __init__(self, images: Images, transform: Callable[[Tensor], Tensor], *, seed: int, views: int | None = 1):
        self.images, self.transform, self.seed, self.views = images, transform, seed, views
        self.labels = images.labels

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, count: int) -> Tensor:
        """A batch of its first images, at most `count`: `[B, ..., C, S, S]`, such as uint8 `[B, 3, S, S]`."""
        return torch.stack([self[0, index]["image"] for index in range(min(count, len(self)))])

    def __getitem__(self, request: Request) -> Sample:
        with kept_randomness():
            return self.item(request)

    def item(self, request: Request) -> Sample:
        """As `self[request]`, inside `kept_randomness`: to keep it once for a batch takes less time."""
        epoch, index = request
        seed_all(random_key(self.seed, "augment", epoch, index), devices=False)
        return {"image": self.transform(self.images[index]), "label": self.labels[index], "index": index}


def outlast_signals(worker: int) -> None:
    """In a data worker: a signal to the whole process group means the trainer, which needs its data for one more step.

    The second SIGTERM ends it: a DataLoader sends one to a worker that does not end by itself.
    """
    for number in (signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGINT)):  # which Windows has not
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class BatchLoader:
    """Loads the batches it is asked for, in order, in worker processes that live as long as the loader.

    Args:
        dataset: the images.
        workers: worker processes; 0 loads in this one. Any number gives the same bytes.
        pin_memory: put batches in page-locked memory (faster copies to a GPU).
        timeout: seconds to wait for a worker's batch before it is an error; 0 waits for ever.
    """

    def __init__(self, dataset: KeyedDataset, *, workers: int = 0, pin_memory: bool = False, timeout: float = 0.0):
        self.dataset, self._timeout = dataset, timeout
        self._batches: list[list[Request]] = []  # what the workers are asked for next
        self._loader = DataLoader(
            _Reporting(dataset),
            collate_fn=_collate,
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=outlast_signals,
            generator=torch.Generator(),  # else every iterator draws a number from torch's global generator
        )

    def __call__(self, batches: list[list[Request]]) -> Iterator[dict[str, Tensor]]:
        """Load batches, in order.

        Yields:
            A dict per batch: "image" `[B, ..., C, S, S]`, channels_last, as the transform returns them (uint8
            `[B, 3, S, S]`); "label" int64 `[B]`, or `[B, ...]` where labels are tensors; "index" int64 `[B]`.

        Raises:
            DataError: an image cannot be read; names it, and how many more of its batch.
            OSError: the machine cannot read it.
        """
        self._batches[:] = batches
        for batch in batches_of(self._loader, timeout=self._timeout):
            if isinstance(batch, Exception):
                raise batch
            images = batch["image"]
            yield batch | {"image": images.movedim(-1, -3) if images.ndim > 3 else images}


class _Reporting(Dataset):
    """Returns an error instead of raising it: a DataLoader would wrap a worker's traceback around the message."""

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
        return DataError(f"{errors[0]}{more}. To omit such images, train anew with --bad-images skip")


def _collate(samples: list[Sample] | Exception) -> dict[str, Tensor] | Exception:
    if isinstance(samples, Exception):
        return samples
    # As decoders return them, colour by colour of each pixel: putting them side by side is all there is to do.
    images = (sample["image"] for sample in samples)
    interleaved = [image.movedim(-3, -1) if image.ndim > 2 else image for image in images]
    return default_collate([{**sample, "image": image} for sample, image in zip(samples, interleaved, strict=True)])
