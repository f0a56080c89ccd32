"""What a report is made of: plain data of a finished run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from trainer.errors import DataError, UsageError
from trainer.text import counted

Array = Any  # np.ndarray or torch.Tensor


@dataclass(frozen=True)
class Table:
    """Rows of a table as they are shown.

    Attributes:
        columns: the headings.
        rows: of as many values each; numbers are shown with four digits.
        chosen: the row to mark, if one was chosen.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    chosen: int | None = None

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UsageError(
                    f"a row has {counted(len(row), 'value')}, and there are {counted(len(self.columns), 'column')}."
                )


@dataclass(frozen=True)
class Finding:
    """One result of an audit of the data.

    Attributes:
        what: one line, such as "3 images appear in training and in validation".
        images: names of the images concerned; the page lists the first of them.
        advice: what to do about it.
    """

    what: str
    images: Sequence[str] = ()
    advice: str = ""


@dataclass(frozen=True, eq=False)
class Facts:
    """A run, as its report shows it. All but the first four may be absent: their sections are then omitted.

    N is the number of validation images, C the number of classes: up to a few thousand, as C² counts are kept. Arrays
    may be numpy's or torch's, on any device; they are kept as numpy's.

    Attributes:
        title: of the page, such as the name of the run.
        classes: C names, in the order of the logits.
        labels: `[N]`, the true class of each validation image, 0 to C-1.
        logits: `[N, C]`, the model's answers before softmax. None, as the labels are then: they are no classes.
        names: N names of images, such as paths within the data folder.
        thumbnail: from the index of an image, the image as a PIL image or a uint8 tensor `[3, H, W]`, of any size. It
            should show the part that the model saw, so that a heat map lies where it belongs. Where it raises OSError
            or DataError, the page has an empty frame.
        heat_map: from the index of an image, `[h, w]`, how much each place spoke for the answer; see `heatmap`.
        features: `[N, D]`, what the last layer reads, for the map of the images.
        history: an entry for each epoch: "epoch" (counted from 1), "step", "train" and "val" (each a value by the name
            of a metric), "lr", "seconds". Each but "epoch" may be absent.
        timings: seconds by part of the run.
        search: what a search of the head tried.
        audit: what an audit of the data found; empty if it found nothing, None if there was none.
        settings: values by name, nested as in the configuration.
        versions: of the libraries and the hardware, by name.
        command: repeats the run.

    Raises:
        UsageError: sizes that do not fit each other.
        DataError: no image, a label outside the classes, or a logit that is not finite.
    """

    title: str
    classes: Sequence[str]
    labels: Array
    logits: Array
    names: Sequence[str] = ()
    thumbnail: Callable[[int], Image.Image | Tensor] | None = None
    heat_map: Callable[[int], Array] | None = None
    features: Array | None = None
    history: Sequence[Mapping[str, Any]] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    search: Table | None = None
    audit: Sequence[Finding] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self):
        for name in ("labels", "logits", "features"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_numpy(getattr(self, name)))
        if self.logits is None:
            return
        images = len(self.labels)
        if self.labels.ndim != 1 or self.logits.shape != (images, len(self.classes)):
            raise UsageError(
                f"labels of shape {self.labels.shape} and logits of shape {self.logits.shape} for {len(self.classes)} "
                "classes: expected labels [N] and logits [N, C]."
            )
        if self.names and len(self.names) != images:
            raise UsageError(
                f"{counted(len(self.names), 'name')} for {counted(images, 'image')}: expected one for each, or none."
            )
        if self.features is not None and (self.features.ndim != 2 or len(self.features) != images):
            raise UsageError(
                f"features of shape {self.features.shape} for {counted(images, 'image')}: expected [N, D]."
            )
        if not images:
            raise DataError("there are no validation images: a report needs one at least.")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(wrong):
            label = self.labels[wrong[0]]
            raise DataError(f"{self.name(wrong[0])} has label {label}: expected 0 to {len(self.classes) - 1}.")
        wrong = np.flatnonzero(~np.isfinite(self.logits).all(1))
        if len(wrong):
            raise DataError(
                f"the logits of {len(wrong)} of {images} images are not finite, the first being {self.name(wrong[0])}: "
                "there is nothing to report. See whether the loss was finite."
            )

    def name(self, image: int) -> str:
        """What to call an image: its name, or its number counted from 0."""
        return str(self.names[image]) if self.names else f"image {image}"


def as_numpy(values: Array) -> np.ndarray:
    """An array of numpy, from one of torch on any device or of numpy; 16-bit floats become 32-bit ones."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    values = np.asarray(values)
    return values.astype(np.float32) if values.dtype == np.float16 else values
