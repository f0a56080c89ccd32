"""Find images that cannot be read before training starts, and report all of them or leave them out."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from trainer.data.images import Images, Subset
from trainer.data.loader import Workers, outlast_signals
from trainer.errors import DataError
from trainer.processes.together import gather, on_all
from trainer.processes.workers import batches
from trainer.text import counted

log = logging.getLogger(__name__)
T = TypeVar("T")


def check_images(
    accelerator: Accelerator,
    parts: Sequence[Images],
    *,
    check: bool,
    skip: bool,
    known: list[list[str]] | None = None,
    workers: Workers = Workers(),
) -> tuple[list[Images], list[list[str]]]:
    """Check that images can be read, and leave out those that cannot (a collective).

    Args:
        accelerator: each process checks its share.
        parts: such as the training and the validation images.
        check: decode every image once; otherwise no image is decoded, unless `skip` is True.
        skip: decode every image once, and leave out those that cannot be read; not used if `known` is given.
        known: keys of the images that a run left out when it was started: the same are left out again. None for a new
            run.
        workers: processes that decode.

    Returns:
        The images of each part that are used, and the keys of those that were left out.

    Raises:
        DataError: on every process: images cannot be read (names all of them, and why), or a class has none left.
    """
    if known is not None:
        parts, skip = [without(images, keys) for images, keys in zip(parts, known, strict=True)], False
    bad: list[tuple[int, int, str]] = []
    if check or skip:
        reasons = look_at_all(accelerator, parts, _reason, workers)
        bad = [(part, i, reason) for part, some in enumerate(reasons) for i, reason in enumerate(some) if reason]
    if bad and not skip:
        reasons = "\n  ".join(reason for _, _, reason in bad)
        ways = "Repair or remove them, or leave them out with --bad-images skip."
        if known is not None:  # a run continues with the images that it had
            ways = "The run had them: put them back as they were, or start a new run with its checkpoint as --weights."
        raise DataError(f"{counted(len(bad), 'image')} cannot be read:\n  {reasons}\n{ways}")
    found = [[] for _ in parts]
    for part, index, reason in bad:
        if accelerator.is_main_process:
            log.warning("skipped: %s", reason)
        found[part].append(parts[part].key(index))
    rest = [without(images, keys) for images, keys in zip(parts, found, strict=True)]
    return rest, found if known is None else known


def look_at_all(
    accelerator: Accelerator, parts: Sequence[Images], look: Callable[[Images, int], T], workers: Workers
) -> list[list[T]]:
    """Call `look(images, index)` for each image of each part (a collective).

    Args:
        accelerator: each process looks at its share.
        parts: such as the training and the validation images.
        look: a function of a module, as it is sent to data workers.
        workers: processes that look.

    Returns:
        What it returned for each image of each part, the same on every process.
    """
    ranks = accelerator.num_processes

    def look_at_share() -> list[list[T]]:
        found = []
        for images in parts:
            share = range(accelerator.process_index, len(images), ranks)
            options = {"num_workers": workers.count, "worker_init_fn": outlast_signals}
            loader = DataLoader(_Looks(images, look), sampler=share, batch_size=32, collate_fn=list, **options)
            found.append([value for batch in batches(loader, timeout=workers.timeout) for value in batch])
        return found

    shares = gather(accelerator, on_all(accelerator, look_at_share))
    return [[shares[i % ranks][part][i // ranks] for i in range(len(images))] for part, images in enumerate(parts)]


def without(images: Images, keys: list[str]) -> Images:
    """The images without those of some keys; DataError if a key or all images of a class are missing."""
    if not keys:
        return images
    here, bad = [images.key(index) for index in range(len(images))], set(keys)
    if (gone := sorted(bad.difference(here))) and isinstance(images, Subset):
        raise DataError(
            f"the run left out images that are not here: {', '.join(gone[:8])}. The split for validation counts them: "
            "put files of these names back; their content does not matter."
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
