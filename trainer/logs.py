"""What a run shows: progress bar, console lines, trackers such as TensorBoard, metrics.jsonl.

Only the main process shows anything. Logs look at a run; one that fails is reported once and changes nothing in it.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid
from tqdm import auto
from tqdm.asyncio import tqdm_asyncio

from trainer.data.loader import KeyedDataset
from trainer.data.transforms import visible
from trainer.metrics import means
from trainer.processes.preemption import waiting
from trainer.storage import files
from trainer.trackers import add_picture, start
from trainer.trainer import Trainer
from trainer.trunk.features import Source

log = logging.getLogger(__name__)

_IN_NOTEBOOK = auto.tqdm is not tqdm_asyncio  # with ipywidgets
Describe = Callable[..., tuple[str, dict[str, Any]]]  # see `recipe.prediction`


class Logs:
    """The displays of one run.

    Args:
        loop: its position decides which entries of an interrupted run are dropped: the resumed run writes them again.
        folder: of the run.
        track: names of trackers, as in `accelerate.tracking`, or "none".
        every: optimizer steps between two points of a curve.
    """

    def __init__(self, loop: Trainer, folder: Path, *, track: Sequence[str] = ("tensorboard",), every: int = 20):
        self.accelerator, self.folder, self.every = loop.accelerator, folder, every
        self._bar: Any = None
        self._broken: set[str] = set()  # kinds of errors that were reported
        if self.accelerator.is_main_process:
            self._quietly(rewind_metrics, folder, epoch=loop.epoch)
            self.accelerator.trackers = []
            if not loop.step:
                (folder / "trackers.json").unlink(missing_ok=True)  # of an overwritten run
            for name in dict.fromkeys(track):
                if name != "none":
                    self._quietly(lambda name: self.accelerator.trackers.append(start(name, folder, loop)), name)

    def start_epoch(self, trainer: Trainer) -> None:
        """Begin the progress bar of the trainer's next epoch; where there is no terminal and no notebook, no bar."""
        quiet = not self.accelerator.is_main_process or not (_IN_NOTEBOOK or sys.stderr.isatty())
        title = f"epoch {trainer.epoch + 1}/{trainer.epochs}"
        done = (trainer.samples - trainer.epoch * trainer.plan.samples) // trainer.plan.batch_size
        self._steps = steps = trainer.plan.steps_per_epoch
        self._bar = auto.tqdm(desc=title, initial=done, total=steps, leave=False, disable=quiet)
        self._began = self._trained = self._shown = time.perf_counter()
        self._first, self._mark = trainer.samples, trainer.totals.sums()

    def after_step(self, trainer: Trainer) -> None:
        """Show progress, twice a second (without a bar: a line a minute), and a point of the curves every few steps."""
        if not self.accelerator.is_main_process:
            return
        self._quietly(self._bar.update)
        self._trained = now = time.perf_counter()
        if now - self._shown > (60 if self._bar.disable else 0.5):  # sums are a copy from the device: not every step
            shown = {name: f"{value:.4f}" for name, value in means(trainer.totals.sums()).items()}
            shown["images/s"] = f"{(trainer.samples - self._first) / (now - self._began):,.0f}"
            self._bar.set_postfix(shown, refresh=False)
            if self._bar.disable:
                done = f"epoch {trainer.epoch + 1}/{trainer.epochs}  step {trainer.step - trainer.epoch * self._steps}"
                values = "  ".join(f"{name} {value}" for name, value in shown.items())
                self._quietly(print, f"{done} of {self._steps}  {values}", flush=True)
            self._shown = now
        # A point is of its step alone: it does not depend on where the run was interrupted.
        if (trainer.step + 1) % self.every == 0:
            self._mark = trainer.totals.sums()
        if trainer.step % self.every == 0:
            values = means(trainer.totals.sums(), since=self._mark)
            self._track(trainer, {f"step/{name}": value for name, value in values.items()} | {"step/lr": trainer.rate})

    def end_epoch(self, trainer: Trainer, *, best: bool) -> None:
        """One line on the console and in metrics.jsonl, one point per curve, from `trainer.metrics`.

        Args:
            best: whether this is the best epoch so far.
        """
        if not self.accelerator.is_main_process:
            return
        self._quietly(self._bar.close)
        train, val = trainer.metrics["train"], trainer.metrics["val"]
        seconds = time.perf_counter() - self._began
        # Of training, without the evaluation; 0 where a resumed run had only that left to do.
        rate = (trainer.samples - self._first) / max(self._trained - self._began, 1e-9)
        parts = [f"epoch {trainer.epoch:>{len(str(trainer.epochs))}}/{trainer.epochs}"]
        for title, values in (("train", train), ("val", val)):
            parts.append(" ".join([title, *(f"{name} {value:.4f}" for name, value in values.items())]))
        parts += [f"lr {trainer.rate:.2e}", f"{rate:,.0f} images/s", f"{seconds:.1f} s", *(["best"] if best else [])]
        self._quietly(print, "  ".join(parts), flush=True)
        curves = {f"{part}/{name}": value for part in ("train", "val") for name, value in trainer.metrics[part].items()}
        self._track(trainer, curves | {"lr": trainer.rate, "images_per_second": rate})
        line = {"epoch": trainer.epoch, "step": trainer.step, "train": train, "val": val, "lr": trainer.rate}
        self._quietly(append_metrics, self.folder, line | {"images_per_second": rate})

    def show_predictions(
        self, loop: Trainer, source: Source, images: KeyedDataset, classes: Sequence[str], describe: Describe
    ) -> None:
        """A picture of some validation images and their predictions, in each tracker that takes pictures.

        Args:
            source: features of the validation set.
            images: the same samples as images.
            classes: names of the classes; empty if labels are no classes.
            describe: `prediction` of the recipe: the output of one image → (text, values by name).
        """
        if self.accelerator.is_main_process:
            with waiting():
                self._quietly(self._add_predictions, loop, source, images, classes, describe)

    def _add_predictions(
        self, loop: Trainer, source: Source, images: KeyedDataset, classes: Sequence[str], describe: Describe
    ) -> None:
        count = min(32, len(source))
        some = [place * len(source) // count for place in range(count)]
        pixels = torch.stack([visible(torch.as_tensor(images[0, index]["image"])) for index in some])
        captions = []
        for index, output in zip(some, loop.outputs(source, some).cpu(), strict=True):
            label, (text, _) = images.labels[index], describe(output, classes, top=1)
            if isinstance(label, int) and output.shape == (len(classes),):
                captions.append((text, output.argmax().item() == label, classes[label]))
            else:
                captions.append((text, True, ""))
        picture = prediction_grid(pixels, captions)
        for tracker in self.accelerator.trackers:
            self._quietly(add_picture, tracker, picture, step=loop.step)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is buffered. Not by `end_training`: it ends the process group, and a last save may need it."""
        for tracker in self.accelerator.trackers:
            self._quietly(tracker.finish)

    def _track(self, trainer: Trainer, values: dict[str, float]) -> None:
        for tracker in self.accelerator.trackers:
            self._quietly(tracker.log, values, step=trainer.step)

    def _quietly(self, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:  # a full disk, a folder or terminal that is gone, whatever a tracker raises
            if (kind := type(error).__name__) not in self._broken:
                log.warning("cannot write logs to %s, training goes on: %s: %s", self.folder, kind, error)
            self._broken.add(kind)


def prediction_grid(images: Tensor, captions: Sequence[tuple[str, bool, str]]) -> Tensor:
    """Images in a grid, each with its prediction below it; wrong ones framed red, with the truth.

    Args:
        images: uint8 `[N, 3, S, S]`, or `[N, V, 3, S, S]`, of which the first view is shown.
        captions: for each image, the prediction, whether it is right, and the truth.

    Returns:
        uint8 `[3, H, W]`, eight images a row.
    """
    side, space = 128, 36  # pixels
    font = ImageFont.load_default(size=12)
    tiles = []
    for image, (text, right, truth) in zip(images, captions, strict=True):
        colour = "#1a7f37" if right else "#cf222e"
        tile = Image.new("RGB", (side, side + space), "white")
        tile.paste(F.to_pil_image(F.resize(image[0] if image.ndim == 4 else image, [side - 6, side - 6])), (3, 3))
        draw = ImageDraw.Draw(tile)
        draw.rectangle((0, 0, side - 1, side - 1), outline=colour, width=3)
        draw.text((3, side + 2), _short(text, 20), colour, font)
        draw.text((3, side + 18), "" if right else f"is {_short(truth)}", "black", font)
        tiles.append(F.pil_to_tensor(tile))
    return make_grid(torch.stack(tiles), nrow=8, padding=4, pad_value=255)


def append_metrics(folder: Path, values: dict[str, Any]) -> None:
    """Add one line to `metrics.jsonl`, unless the folder is another run's now, which the next save reports."""
    if files.lost_lock(folder / "lock") and folder.is_dir():
        return
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def rewind_metrics(folder: Path, *, epoch: int) -> None:
    """Drop the lines of epochs after `epoch`, which a resumed run writes again, and lines that are damaged."""
    path = folder / "metrics.jsonl"
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        files.replace(path, b"".join(line for line in lines if _epoch(line) <= epoch))


def _epoch(line: bytes) -> float:
    try:
        return float(json.loads(line)["epoch"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _short(name: str, length: int = 16) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
