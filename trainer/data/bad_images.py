"""Find images that cannot be read before training starts, and report all of them or leave them out."""

import logging
from collections.abc import Sequence

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from trainer.data.images import Images, Subset
from trainer.data.loader import Workers, outlast_signals
from trainer.errors import DataError
from trainer.processes.together import gather, on_all
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
    bad = _unreadable(accelerator, parts, workers) if check or skip else []
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


def _unreadable(accelerator: Accelerator, parts: Sequence[Images], workers: Workers) -> list[tuple[int, int, str]]:
    """Part, index and reason of each image that cannot be read, the same on every process."""

    def read_share() -> list[tuple[int, int, str]]:
        found = []
        for part, images in enumerate(parts):
            share = range(accelerator.process_index, len(images), accelerator.num_processes)
            options = {"num_workers": workers.count, "worker_init_fn": outlast_signals}
            loader = DataLoader(_Attempts(images), sampler=share, batch_size=32, collate_fn=list, **options)
            reasons = [reason for batch in batches(loader, timeout=workers.timeout) for reason in batch]
            found += [(part, index, reason) for index, reason in zip(share, reasons, strict=True) if reason]
        return found

    return sorted(found for share in gather(accelerator, on_all(accelerator, read_share)) for found in share)


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
        raise DataError("no image can be read")
    if isinstance(images.labels, list) and (empty := set(images.labels) - set(rest.labels)):
        raise DataError(f"no image can be read of {', '.join(images.classes[label] for label in sorted(empty))}")
    return rest


class _Attempts(Dataset):
    """For each image the reason why it cannot be read; None if it can."""

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, index: int) -> str | None:
        try:
            self.images[index]
        except DataError as error:
            return str(error)
        return None
