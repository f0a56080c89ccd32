"""Classify image files with a trained model: `python -m trainer predict`."""

import csv
import errno
import glob
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from trainer.commands.arguments import Predict
from trainer.commands.loaded import Loaded, load
from trainer.commands.text import columns, shorten
from trainer.data.images import EXTENSIONS, left_by_programs, printable
from trainer.errors import DataError, UsageError, check_least, first_sentence
from trainer.processes.cores import cores_here
from trainer.storage import files


def predict(command: Predict) -> None:
    """Print what the recipe's `prediction` says of each image: by default its most probable classes.

    Raises:
        UsageError: `paths` match nothing, or a number is too small.
        OSError: the table cannot be written; before anything is classified, if that can be known then.
        DataError: after all others have been classified: some files cannot be read, each with its reason.
    """
    check_least(1, top=command.top, batch_size=command.batch_size)
    check_least(0, workers=command.workers)
    found = find_images(command.paths)
    if not found:
        raise UsageError("no image to classify: expected files, folders or patterns such as 'photos/*.jpg'.")
    csv_file = Path(os.path.expanduser(command.csv)) if command.csv else None
    if csv_file:
        _check_writable(csv_file)
    loaded = load(command.run, weights=command.weights, device=command.device, recipe=command.recipe)
    rows, problems = [], []
    for path, result in classify(loaded, found, batch_size=command.batch_size, workers=command.workers):
        if isinstance(result, str):
            problems.append(result)
            continue
        text, row = loaded.recipe.prediction(result, loaded.classes, top=command.top)
        tqdm.write(f"{shorten(printable(path), max(columns() - len(text) - 2, 20))}  {text}")
        rows.append((printable(path), row))
    if csv_file:
        files.replace(csv_file, _csv(rows))
        print(f"{command.csv}: {len(rows):,} rows")
    if problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems):,} of {len(found):,} files could not be read:\n  {listed}")


def find_images(paths: tuple[str, ...]) -> list[str]:
    """Files by name, image files below folders, and matches of patterns; each once, in the order of `paths`."""
    found: dict[str, None] = {}
    for path in map(os.path.expanduser, paths):
        if os.path.lexists(path) or not glob.has_magic(path):
            matches = [path]  # a name may hold brackets; one that does not exist is listed as unreadable
        else:
            matches = sorted(glob.glob(path, recursive=True))
        for match in matches:
            if not os.path.isdir(match):
                found[match] = None
                continue
            for folder, folders, names in os.walk(match):
                folders[:] = sorted(n for n in folders if not n.startswith(".") and not left_by_programs(n))
                images = (name for name in sorted(names) if name.lower().endswith(EXTENSIONS) and name[0] != ".")
                found.update(dict.fromkeys(os.path.join(folder, name) for name in images))
    return list(found)


@torch.no_grad()
def classify(
    loaded: Loaded, paths: list[str], *, batch_size: int = 32, workers: int | None = None
) -> Iterator[tuple[str, Tensor | str]]:
    """Compute the outputs for image files.

    Yields:
        Each file in order, with its outputs [C] on the CPU, or, if it cannot be read, with the reason.
    """
    if workers is None:
        workers = min(cores_here(), len(paths) // batch_size)
    loader = DataLoader(_Files(loaded, paths), batch_size=batch_size, num_workers=workers, collate_fn=list)
    done = 0
    for results in tqdm(loader, leave=False, disable=None):
        images = [image for image in results if isinstance(image, Tensor)]
        rows = iter(())
        if images:
            batch = torch.stack(images).to(loaded.transform.device)  # [B, 3, S, S]
            try:
                rows = iter(loaded.model(loaded.transform.normalize(batch)).float().cpu())
            except (RuntimeError, ValueError) as error:
                if done or isinstance(error, torch.OutOfMemoryError):
                    raise
                given = f"a batch of images {list(batch.shape)}: {first_sentence(error)}"
                raise UsageError(f"the model does not take {given}. Call trainer.load(...).model yourself.") from error
        for result in results:
            yield paths[done], result if isinstance(result, str) else next(rows)
            done += 1


class _Files(Dataset):
    """For each file its image, uint8 [3, S, S], or the reason why it cannot be read."""

    def __init__(self, loaded: Loaded, paths: list[str]):
        # No tensor on a GPU: workers get a copy.
        self.paths, self.resize, self.decode = paths, loaded.transform.resize, loaded.transform.decode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.resize(self.decode(self.paths[index]))
        except DataError as error:
            return str(error)


def _csv(rows: list[tuple[str, dict[str, Any]]]) -> bytes:
    """A table of paths and their values by name."""
    names = dict.fromkeys(name for _, values in rows for name in values)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["path", *names], *([path, *map(values.get, names)] for path, values in rows)])
    return text.getvalue().encode()


def _check_writable(path: Path) -> None:
    """Raise the OSError that writing a file would raise, if that can be known before."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that was given
