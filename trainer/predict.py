"""Classify image files with a trained model."""

import csv as csv_module
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from trainer.data import EXTENSIONS, decode, printable
from trainer.errors import DataError, UsageError, check_least
from trainer.loading import Loaded, load, shorten
from trainer.processes import cores_here


def predict(
    run: str,
    paths: tuple[str, ...],
    *,
    csv: str | None = None,
    top: int = 3,
    batch_size: int = 32,
    workers: int | None = None,
    weights: str | None = None,
    device: str | None = None,
) -> None:
    """Print the most probable classes of each image, and their probabilities.

    Args:
        run, weights, device: see `loading.load`.
        paths: image files, folders (with all below them) and glob patterns.
        csv: file to write as well: path, class, probability, and the probability of each class.
        top: classes to print.
        batch_size: images per forward.
        workers: processes that decode; None: one per core.

    Raises:
        UsageError: nothing matches `paths`, or a number is too small.
        OSError: the table cannot be written; before anything is classified, if that can be known then.
        DataError: once all others are done: the files that cannot be read, each with the reason.
    """
    check_least(1, top=top, batch_size=batch_size)
    check_least(0, workers=workers)
    files = find_images(paths)
    if not files:
        raise UsageError("no image to classify: expected files, folders or patterns such as 'photos/*.jpg'.")
    table = Path(os.path.expanduser(csv)) if csv else None
    if table:
        _write_csv(table, [])
    loaded = load(run, weights=weights, device=device)
    rows, problems = [], []
    columns = shutil.get_terminal_size().columns
    for path, result in classify(loaded, files, batch_size=batch_size, workers=workers):
        if isinstance(result, str):
            problems.append(result)
            continue
        order = result.argsort(descending=True)[:top].tolist()
        said = "  ".join(f"{loaded.classes[index]} {result[index]:.1%}" for index in order)
        tqdm.write(f"{shorten(printable(path), max(columns - len(said) - 2, 20))}  {said}")
        rows.append([printable(path), loaded.classes[order[0]], result[order[0]].item(), *result.tolist()])
    if table:
        _write_csv(table, [["path", "class", "probability", *loaded.classes], *rows])
        print(f"{csv}: {len(rows):,} rows")
    if problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems):,} of {len(files):,} files could not be read:\n  {listed}")


def find_images(paths: tuple[str, ...]) -> list[str]:
    """Files as they are named; image files below folders; what patterns match. Each once, in the order of `paths`."""
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
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                images = (name for name in sorted(names) if name.lower().endswith(EXTENSIONS) and name[0] != ".")
                found.update(dict.fromkeys(os.path.join(folder, name) for name in images))
    return list(found)


@torch.no_grad()
def classify(
    loaded: Loaded, files: list[str], *, batch_size: int = 32, workers: int | None = None
) -> Iterator[tuple[str, Tensor | str]]:
    """The probabilities [C] of each file, on the CPU, in order; for one that cannot be read, the reason instead."""
    if workers is None:
        workers = min(cores_here(), len(files) // batch_size)
    loader = DataLoader(_Files(loaded, files), batch_size=batch_size, num_workers=workers, collate_fn=list)
    done = 0
    for results in tqdm(loader, leave=False, disable=None):
        images = [image for image in results if isinstance(image, Tensor)]
        rows = iter(())
        if images:
            batch = torch.stack(images).to(loaded.transform.device)  # [B, 3, S, S]
            rows = iter(loaded.model(loaded.transform.normalize(batch)).float().softmax(dim=1).cpu())
        for result in results:
            yield files[done], result if isinstance(result, str) else next(rows)
            done += 1


class _Files(Dataset):
    """uint8 [3, S, S], or why there is none."""

    def __init__(self, loaded: Loaded, files: list[str]):
        self.files, self.resize = files, loaded.transform.resize  # no tensor on a GPU: workers get a copy

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.resize(decode(self.files[index]))
        except DataError as error:
            return str(error)


def _write_csv(path: Path, rows: list[list[object]]) -> None:
    """Replace a file by these rows; without any, only try whether it could be."""
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv_module.writer(file).writerows(rows)
        if rows:
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that was given
    finally:
        with suppress(OSError):
            temporary.unlink()
