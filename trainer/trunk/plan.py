"""What is computed once, what in each epoch, and where features are kept: decided before anything is computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.text import short


@dataclass(frozen=True)
class Part:
    """The features of one data set.

    Attributes:
        name: such as "val".
        images: in the data set.
        views: kept views of each image; None: a new view in each epoch.
        place: "memory", "file", or "" if they are computed whenever they are needed.
        found: whether an earlier run has left them in the cache folder.
        seconds: to decode an image and run the trunk on it, on one process; measured on a few.
    """

    name: str
    images: int
    views: int | None
    place: str
    found: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class FeaturePlan:
    """The plan of a run's features; as text, one line for the console and perhaps a hint.

    Attributes:
        shapes: of the tensors that pass from trunk to tail, for one image, without the batch.
        size: bytes of features of one image.
        parts: the data sets.
        epochs: still to train.
        processes: that share the work.
        folder: of files of features.
        trunk: how the trunk runs; "" if there is none.
        gain_of_bf16: how many times faster the trunk would be in bf16; 1 if unknown.
    """

    shapes: Sequence[torch.Size]
    size: int
    parts: Sequence[Part]
    epochs: int
    processes: int
    folder: Path
    trunk: str
    gain_of_bf16: float = 1.0

    @property
    def images(self) -> int:
        """Images that go through the trunk from here to the end of the run."""
        return sum(self._images(part) for part in self.parts)

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of trunk and decoding: once at the start, and in each epoch."""
        once = sum(self._images(part) * part.seconds for part in self.parts if part.place)
        each = sum(part.images * part.seconds for part in self.parts if not part.place)
        return once / self.processes, each / self.processes

    def _images(self, part: Part) -> int:
        return 0 if part.found else part.images * ((part.views or 1) if part.place else self.epochs)

    def __str__(self) -> str:
        if not self.trunk:
            return "plan    nothing is frozen before the first layer that trains: every image goes through the model"
        shapes = " + ".join("×".join(map(str, shape)) for shape in self.shapes)
        lines = [f"features of {shapes}, {short(self.size, 'B')} an image", *map(self._line, self.parts)]
        once, each = self.seconds
        times = [f"about {time_text(once)} once"] * (once > 0) + [f"about {time_text(each)} an epoch"] * (each > 0)
        text = f"plan    {'; '.join(lines)}: {' and '.join(times) or 'nothing to compute'} (trunk {self.trunk})"
        return "\n".join([text, *self._hints()])

    def _line(self, part: Part) -> str:
        if not part.place:
            return f"{part.name} computed in each epoch"
        where = "in memory" if part.place == "memory" else f"in {self.folder}"
        views = part.views or 1
        line = (
            f"{part.name} {'found' if part.found else 'kept'} {where} ({short(part.images * views * self.size, 'B')})"
        )
        if views > 1:
            return f"{line}, {views} views: epoch {views + 1} sees the images of epoch 1 again"
        if part.name == "train" and part.seconds > 0 and not part.found:
            each = time_text(part.images * part.seconds / self.processes)
            return f"{line}, without augmentation (--augment crop: about {each} in each epoch)"
        return line

    def _hints(self) -> list[str]:
        fresh, (once, each) = [part.name for part in self.parts if part.views is None], self.seconds
        if fresh and self.epochs > 2:
            ratio, few = self.images / sum(part.images for part in self.parts), min(4, self.epochs - 1)
            once_for_all = f"--augment none would compute the features of {fresh[0]} once: {ratio:.1f}× less work"
            return [f"hint    {once_for_all}; --views {few}: once for each of {few} augmented views, used in turn"]
        if once + self.epochs * each > 30 and self.gain_of_bf16 > 1.5:
            gain = f"{self.gain_of_bf16:.1f}× faster in bf16"
            return [f"hint    the trunk is {gain}: accelerate launch --mixed_precision bf16"]
        return []


def bytes_per_image(rows: Sequence[tuple[torch.Size, torch.dtype]]) -> int:
    """Bytes of the features of one image, from the shape and type of each tensor."""
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in rows)


def time_text(seconds: float) -> str:
    """Seconds, minutes or hours, rounded: 4 s, 12 min, 1.5 h."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
