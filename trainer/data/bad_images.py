"""Images that cannot be read: found before the first step, and reported together or left out."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from trainer.data.images import Images, Subset
from trainer.data.loader import outlast_signals
from trainer.errors import DataError
from trainer.processes.together import gather, raise_together
from trainer.processes.workers import batches

log = logging.getLogger(__name__)
T = TypeVar("T")


def check_images(
    accelerator: Accelerator,
    parts: Sequence[Images],
    *,
    check: bool,
    skip: bool,
    known: list[list[str]] | None = None,
    workers: int = 0,
    timeout: float = 0.0,
) -> tuple[list[Images], list[list[str]]]:
    """The images of each part that can be read, and the keys of those left out (a collective).

    Args:
        parts: such as the training and the validation images.
        check: decode every image once, each process its share; otherwise all is taken as it is.
        skip: check, and leave out what cannot be read: the same on every process. Not of a run that is continued.
        known: what a run that is continued has left out: left out again, and nothing else; None for a new run.
        workers: processes that decode, per training process.
        timeout: seconds without an image after which a worker is given up; 0 for none.

    Raises:
        DataError: on every process; names every image that cannot be read, and why; or nothing is left of a class.
    """
    if known is not None:
        parts, skip = [without(images, keys) for images, keys in zip(parts, known, strict=True)], False
    bad: list[tuple[int, int, str]] = []
    if check or skip:
        reasons = look_at_all(accelerator, parts, _reason, workers=workers, timeout=timeout)
        bad = [(part, i, reason) for part, some in enumerate(reasons) for i, reason in enumerate(some) if reason]
    if bad and not skip:
        listed = "\n  ".join(reason for _, _, reason in bad)
        ways = "Repair or remove them, or leave them out with --bad-images skip."
        if known is not None:  # it goes on with the images it had, no more and no fewer
            ways = "The run had them: put them back as they were, or start a new run with its checkpoint as --weights."
        raise DataError(f"{len(bad)} image{'s' * (len(bad) > 1)} cannot be read:\n  {listed}\n{ways}")
    found = [[] for _ in parts]
    for part, index, reason in bad:
        if accelerator.is_main_process:
            log.warning("skipped: %s", reason)
        found[part].append(parts[part].key(index))
    rest = [without(images, keys) for images, keys in zip(parts, found, strict=True)]
    return rest, found if known is None else known


def look_at_all(
    accelerator: Accelerator,
    parts: Sequence[Images],
    look: Callable[[Images, int], T],
    *,
    workers: int = 0,
    timeout: float = 0.0,
) -> list[list[T]]:
    """Call `look(images, index)` for each image of each part, each process its share (a collective).

    Args:
        look: a function of a module, as it is sent to data workers.
        workers, timeout: see `check_images`.

    Returns:
        What it returned, the same on every process.
    """
    error, mine, ranks = None, [], accelerator.num_processes
    try:
        for images in parts:
            share = range(accelerator.process_index, len(images), ranks)
            options = {"num_workers": workers, "worker_init_fn": outlast_signals}
            loader = DataLoader(_Looks(images, look), sampler=share, batch_size=32, collate_fn=list, **options)
            mine.append([value for batch in batches(loader, timeout=timeout) for value in batch])
    except Exception as exception:
        error = exception
    raise_together(accelerator, error)
    shares = gather(accelerator, mine)
    return [
        [shares[index % ranks][part][index // ranks] for index in range(len(images))]
        for part, images in enumerate(parts)
    ]


def without(images: Images, keys: list[str]) -> Images:
    """The images but those of some keys; DataError if they are not there, or if nothing is left."""
    if not keys:
        return images
    here, bad = [images.key(index) for index in range(len(images))], set(keys)
    if (gone := sorted(bad.difference(here))) and isinstance(images, Subset):
        raise DataError(
            f"the run left out images that are not here: {', '.join(gone[:8])}. The split for validation counts them: "
            "put files of these names back, whatever they hold."
        )
    left = [index for index, key in enumerate(here) if key not in bad]
    rest = Subset(images, left)
    if not left:
        raise DataError("no image is left that can be read and is not excluded")
    if isinstance(images.labels, list) and (empty := set(images.labels) - set(rest.labels)):
        names = ", ".join(images.classes[label] for label in sorted(empty))
        raise DataError(f"no image is left that can be read and is not excluded of {names}")
    return rest


def _reason(images: Images, index: int) -> str:
    """Why an image cannot be read; "" if it can be."""
    try:
        images[index]
    except DataError as error:
        return str(error)
    return ""


class _Looks(Dataset):
    def __init__(self, images: Images, look: Callable[[Images, int], Any]):
        self.images, self.look = images, look

    def __getitem__(self, index: int) -> Any:
        return self.look(self.images, index)
