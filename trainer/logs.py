"""What a run shows: progress bar, console lines, TensorBoard, metrics.jsonl.

Only the main process shows anything. Logs look at a run; one that fails is reported once and changes nothing in it.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid
from tqdm import tqdm

from trainer import run
from trainer.features import Source
from trainer.metrics import means
from trainer.sampling import KeyedDataset
from trainer.trainer import Trainer

log = logging.getLogger(__name__)


class Logs:
    """The displays of one run.

    Args:
        accelerator: its trackers are set up here.
        folder: of the run.
        epochs: of the run.
        step: optimizer steps done before, 0 for a new run; what was logged after it is dropped.
        every: optimizer steps between two points of a curve in TensorBoard.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, *, epochs: int, step: int, every: int = 20):
        self.accelerator, self.folder, self.epochs, self.every = accelerator, folder, epochs, every
        self._bar: tqdm | None = None
        self._broken = False
        if accelerator.is_main_process:
            self._quietly(run.rewind_metrics, folder, step=step)
            # purge_step hides what a killed run logged after its last checkpoint: no point appears twice.
            tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1 if step else None)
            accelerator.log_with = [tracker]
            self._quietly(accelerator.init_trackers, "tensorboard")

    def start_epoch(self, trainer: Trainer) -> None:
        """Begin the progress bar of the trainer's next epoch."""
        quiet = True if not self.accelerator.is_main_process else None  # None: quiet unless on a terminal
        title = f"epoch {trainer.epoch + 1}/{self.epochs}"
        done = (trainer.samples - trainer.epoch * trainer.plan.samples) // trainer.plan.batch_size
        steps = trainer.plan.steps_per_epoch
        self._bar = tqdm(desc=title, initial=done, total=steps, leave=False, disable=quiet)
        self._began = self._trained = time.perf_counter()
        self._start, self._shown, self._mark = trainer.samples, 0.0, trainer.totals.sums()

    def after_step(self, trainer: Trainer) -> None:
        """Show progress, at most twice a second, and a point of the curves every few steps."""
        if not self.accelerator.is_main_process:
            return
        self._quietly(self._bar.update)
        self._trained = now = time.perf_counter()
        if not self._bar.disable and now - self._shown > 0.5:  # sums are a copy from the device: not every step
            shown = {name: f"{value:.4f}" for name, value in means(trainer.totals.sums()).items()}
            rate = (trainer.samples - self._start) / (now - self._began)
            self._bar.set_postfix(shown | {"images/s": f"{rate:,.0f}"}, refresh=False)
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
        rate = (trainer.samples - self._start) / max(self._trained - self._began, 1e-9)
        parts = [f"epoch {trainer.epoch:>{len(str(self.epochs))}}/{self.epochs}"]
        for title, values in (("train", train), ("val", val)):
            parts.append(" ".join([title, *(f"{name} {value:.4f}" for name, value in values.items())]))
        parts += [f"lr {trainer.rate:.2e}", f"{rate:,.0f} images/s", f"{seconds:.1f} s", *(["best"] if best else [])]
        self._quietly(print, "  ".join(parts), flush=True)
        curves = {f"{part}/{name}": value for part in ("train", "val") for name, value in trainer.metrics[part].items()}
        self._track(trainer, curves | {"lr": trainer.rate, "images_per_second": rate})
        line = {"epoch": trainer.epoch, "step": trainer.step, "train": train, "val": val, "lr": trainer.rate}
        self._quietly(run.append_metrics, self.folder, line | {"images_per_second": rate})

    def show_predictions(self, trainer: Trainer, source: Source, images: KeyedDataset, classes: Sequence[str]) -> None:
        """A picture of some validation images with what the model says of them, in TensorBoard.

        Args:
            source: features of the validation set.
            images: the same samples as images.
        """
        if not self.accelerator.is_main_process:
            return
        count = min(32, len(source))
        some = [place * len(source) // count for place in range(count)]
        pixels = torch.stack([images[0, index]["image"] for index in some])
        labels = [images.labels[index] for index in some]
        picture = prediction_grid(pixels, labels, trainer.logits(source, some).cpu(), classes)
        tracker = self.accelerator.get_tracker("tensorboard")
        self._quietly(lambda: tracker.tracker.add_image("val/predictions", picture, trainer.step))

    def close(self) -> None:
        """Write out what is buffered."""
        self._quietly(self.accelerator.end_training)

    def _track(self, trainer: Trainer, values: dict[str, float]) -> None:
        self._quietly(self.accelerator.log, values, step=trainer.step)

    def _quietly(self, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:  # a full disk, a folder or terminal that is gone, whatever a tracker raises
            if not self._broken:
                log.warning(
                    "cannot write logs to %s, training goes on: %s: %s", self.folder, type(error).__name__, error
                )
            self._broken = True


def prediction_grid(images: Tensor, labels: list[int], logits: Tensor, classes: Sequence[str]) -> Tensor:
    """Images in a grid, each with the predicted class and its probability; wrong ones framed red, with the true class.

    Args:
        images: uint8 `[N, 3, S, S]`.
        labels: true class of each.
        logits: float `[N, C]`.
        classes: their names.

    Returns:
        uint8 `[3, H, W]`, eight images a row.
    """
    side, caption = 128, 36  # pixels
    font = ImageFont.load_default(size=12)
    probabilities, predicted = logits.softmax(dim=1).max(dim=1)
    tiles = []
    for image, label, guess, probability in zip(
        images, labels, predicted.tolist(), probabilities.tolist(), strict=True
    ):
        right = guess == label
        colour = "#1a7f37" if right else "#cf222e"
        tile = Image.new("RGB", (side, side + caption), "white")
        tile.paste(F.to_pil_image(F.resize(image, [side - 6, side - 6])), (3, 3))
        draw = ImageDraw.Draw(tile)
        draw.rectangle((0, 0, side - 1, side - 1), outline=colour, width=3)
        draw.text((3, side + 2), f"{_short(classes[guess])} {probability:.0%}", colour, font)
        draw.text((3, side + 18), "" if right else f"is {_short(classes[label])}", "black", font)
        tiles.append(F.pil_to_tensor(tile))
    return make_grid(torch.stack(tiles), nrow=8, padding=4, pad_value=255)


def _short(name: str, length: int = 16) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
