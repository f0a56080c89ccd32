"""Images that cannot be read: found before the first step, and reported together or left out."""

import logging
from collections.abc import Sequence

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from trainer.data.images import Images, Subset
from trainer.data.loader import outlast_signals
from trainer.errors import DataError
from trainer.processes.together import gather, raise_together
from trainer.processes.workers import batches
from trainer.text import counted

log = logging.getLogger(__name__)


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
    bad = _unreadable(accelerator, parts, workers=workers, timeout=timeout) if check or skip else []
    if bad and not skip:
        reasons = "\n  ".join(reason for _, _, reason in bad)
        ways = "Repair or remove them, or leave them out with --bad-images skip."
        if known is not None:  # it goes on with the images it had, no more and no fewer
            ways = "The run had them: put them back as they were, or start a new run with its checkpoint as --weights."
        raise DataError(f"{counted(len(bad), 'image')} cannot be read:\n  {reasons}\n{ways}")
    found = [[] for _ in parts]
    for part, index, reason in bad:
        if accelerator.is_main_process:
            log.warning("skipped: %s", reason)
        found[part].append(parts[part].key(index))
    rest = [without(images, keys) for images, keys in zip(parts, found, strict=True)]
    return rest, found if known is None else known


def _unreadable(
    accelerator: Accelerator, parts: Sequence[Images], *, workers: int, timeout: float
) -> list[tuple[int, int, str]]:
    """Part, index and reason of each image that cannot be read, the same on every process."""
    error, mine = None, []
    try:
        for part, images in enumerate(parts):
            share = range(accelerator.process_index, len(images), accelerator.num_processes)
            options = {"num_workers": workers, "worker_init_fn": outlast_signals}
            loader = DataLoader(_Attempts(images), sampler=share, batch_size=32, collate_fn=list, **options)
            reasons = [reason for batch in batches(loader, timeout=timeout) for reason in batch]
            mine += [(part, index, reason) for index, reason in zip(share, reasons, strict=True) if reason]
    except Exception as exception:
        error = exception
    raise_together(accelerator, error)
    return sorted(found for share in gather(accelerator, mine) for found in share)


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
        raise DataError("no image can be read")
    if isinstance(images.labels, list) and (empty := set(images.labels) - set(rest.labels)):
        raise DataError(f"no image can be read of {', '.join(images.classes[label] for label in sorted(empty))}")
    return rest


class _Attempts(Dataset):
    """Why an image cannot be read; None if it can be."""

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, index: int) -> str | None:
        try:
            self.images[index]
        except DataError as error:
            return str(error)
        return None
