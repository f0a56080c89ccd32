"""Classify image files with a trained model: `python -m trainer predict`."""

import glob
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from trainer.commands import output
from trainer.commands.arguments import Predict
from trainer.commands.loaded import Loaded, load
from trainer.commands.text import columns, shorten
from trainer.data.images import EXTENSIONS, left_by_programs, printable
from trainer.errors import DataError, UsageError, check_least, check_probability, first_sentence
from trainer.processes.cores import cores_here
from trainer.processes.startup import start
from trainer.processes.together import gather, main_first, on_main
from trainer.text import counted

_UNSURE = "unsure"  # in the text, and the folder of `--copy-to`


def predict(command: Predict) -> None:
    """Print what the recipe's `prediction` says of each image, in order, as soon as its batch is done (a collective).

    Raises:
        UsageError: `paths` match nothing, a number is out of range, or the recipe's predictions have no class or
            probability where an option needs one.
        OSError: a file cannot be written; before anything is classified, if that can be known then.
        DataError: after all others have been classified: some files cannot be read, each with its reason.
    """
    check_least(1, top=command.top, batch_size=command.batch_size)
    check_least(0, workers=command.workers)
    check_probability(threshold=command.threshold)
    accelerator = start()
    found = on_main(accelerator, find_images, command.paths)
    if not found:
        raise UsageError("no image to classify: expected files, folders or patterns such as 'photos/*.jpg'.")
    csv_file, lines_file = on_main(accelerator, lambda: [output.target(command.csv), output.target(command.jsonl)])
    loaded = main_first(
        accelerator,
        load,
        command.run,
        weights=command.weights,
        device=command.device or accelerator.device,
        recipe=command.recipe,
    )
    options = {"batch_size": command.batch_size, "workers": command.workers, "accelerator": accelerator}
    results = classify(loaded, found, **options)
    if not accelerator.is_main_process:
        for _ in results:
            pass
        return
    rows, problems, copies, done = [], [], Counter(), 0
    note = output.replaced(lines_file) if lines_file else ""
    console = sys.stderr if command.jsonl == "-" else sys.stdout
    with ExitStack() as stack:
        lines = stack.enter_context(open(lines_file, "w", encoding="utf-8")) if lines_file else None
        lines = sys.stdout if command.jsonl == "-" else lines
        for path, result in results:
            row: dict[str, Any] = {"path": printable(path)}
            if isinstance(result, str):
                problems.append(result)
                row |= {"error": result}
            else:
                text, values = loaded.recipe.prediction(result, loaded.classes, top=command.top)
                row |= values
                if command.threshold is not None:
                    row["sure"] = bool(_value(row, "probability", "--threshold") >= command.threshold)
                    text = text if row["sure"] else f"{_UNSURE}  {text}"
                if lines is not sys.stdout:
                    width = max(columns() - len(text) - 2, 20)
                    tqdm.write(f"{shorten(row['path'], width)}  {text}", file=console)
                    console.flush()
                if csv_file:
                    rows.append(row)
                if command.copy_to:
                    name = str(_value(row, "class", "--copy-to")) if row.get("sure", True) else _UNSURE
                    copies[_copy(path, Path(os.path.expanduser(command.copy_to)), name)] += 1
                done += 1
            if lines:
                tqdm.write(json.dumps(row), file=lines)
                lines.flush()
    if csv_file:
        print(f"{command.csv}: {counted(len(rows), 'row')}{output.write(csv_file, output.as_csv(rows))}", file=console)
    if lines_file:
        print(f"{command.jsonl}: {counted(len(found), 'line')}{note}", file=console)
    if command.copy_to:
        new = f", {copies[True]:,} of them under a new name" * (copies[True] > 0)
        print(f"{command.copy_to}: {counted(copies.total(), 'image')} copied{new}", file=console)
    if problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems):,} of {counted(len(found), 'file')} could not be read:\n  {listed}")


def _value(row: dict[str, Any], name: str, option: str) -> Any:
    """The value that an option needs of a prediction."""
    if name not in row:
        raise UsageError(f'{option} needs a "{name}", which prediction() of the recipe does not return.')
    return row[name]


def _copy(path: str, folder: Path, name: str) -> bool:
    """Copy an image into the folder of its class; returns whether it got a new name, as its own was taken."""
    name = name.replace(os.sep, "_")
    name = f"_{name}" if name.startswith(".") else name  # not hidden, and not the folder above
    with open(path, "rb") as source, output.create(folder / name, os.path.basename(path)) as copy:
        try:
            shutil.copyfileobj(source, copy)
        except OSError:  # such as a full disk
            os.unlink(copy.name)
            raise
    shutil.copystat(path, copy.name)
    return os.path.basename(copy.name) != os.path.basename(path)


def find_images(paths: tuple[str, ...]) -> list[str]:
    """Files by name, image files below folders, matches of patterns, and for `-` the lines of the standard input.

    Returns:
        Each once, in the order of `paths`.
    """
    found: dict[str, None] = {}
    for path in map(os.path.expanduser, paths):
        if path == "-":
            lines = sys.stdin.buffer.read().split(b"\n")
            matches = [os.fsdecode(line) for line in (line.rstrip(b"\r") for line in lines) if line]
        elif os.path.lexists(path) or not glob.has_magic(path):
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
    loaded: Loaded,
    paths: list[str],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[tuple[str, Tensor | str]]:
    """Compute the outputs for image files.

    Args:
        accelerator: its processes take turns, a batch each (a collective); None: this process does all.

    Yields:
        On every process each file in order, with its outputs [C] on the CPU, or, if it cannot be read, with the reason.
    """
    ranks, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    if workers is None:
        workers = min(cores_here() // ranks, len(paths) // (batch_size * ranks))
    batches = [range(first, min(first + batch_size, len(paths))) for first in range(0, len(paths), batch_size)]
    mine: Any = batches[rank::ranks]
    images = iter(DataLoader(_Files(loaded, paths), batch_sampler=mine, num_workers=workers, collate_fn=list))
    done = 0
    with tqdm(total=len(paths), leave=False, disable=None if rank == 0 else True) as bar:
        for first in range(0, len(batches), ranks):
            results = _outputs(loaded, next(images), first=first == 0) if first + rank < len(batches) else []
            for part in gather(accelerator, results) if accelerator else [results]:
                for result in part:
                    yield paths[done], result
                    done += 1
            bar.update(done - bar.n)


def _outputs(loaded: Loaded, given: list[Tensor | str], *, first: bool) -> list[Tensor | str]:
    """The outputs [C] for each image, uint8 [3, S, S]; what is no image stays as it is."""
    images = [image for image in given if isinstance(image, Tensor)]
    rows = iter(())
    if images:
        batch = torch.stack(images).to(loaded.transform.device)  # [B, 3, S, S]
        try:
            rows = iter(loaded.model(loaded.transform.normalize(batch)).float().cpu())
        except (RuntimeError, ValueError) as error:
            if not first or isinstance(error, torch.OutOfMemoryError):
                raise
            text = f"a batch of images {list(batch.shape)}: {first_sentence(error)}"
            raise UsageError(f"the model does not take {text}. Call trainer.load(...).model yourself.") from error
    return [image if isinstance(image, str) else next(rows).clone() for image in given]  # a view would carry its batch


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
