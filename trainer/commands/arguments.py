"""The commands of `python -m trainer` and their arguments. Imports no torch, so that --help answers at once.

In a notebook: `evaluate(Evaluate(run="runs/photos-resnet50"))`, with `evaluate` from `trainer.commands.evaluate`.
"""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass
class Inspect:
    """Show a model, a checkpoint or a run: modules, parameters, what trains, what it costs."""

    target: Positional[str | None] = None
    """A torchvision model by name, a checkpoint, a run, or a file of weights."""
    train: tuple[str, ...] = ()
    """What would train, as in train.py; default: head for a model, its own plan for a checkpoint."""
    names: bool = False
    """List every parameter with its shape, and whether it trains."""
    grep: str | None = None
    """Only modules and parameters whose name this regular expression finds."""
    depth: int = 2
    """Levels of the module tree to print."""
    json: bool = False
    """Print all of it as JSON."""
    diff: Annotated[tuple[str, str] | None, arg(metavar="A B")] = None
    """Compare two checkpoints (or runs, or files of weights) by parameter."""
    save_plan: str | None = None
    """Write the freeze plan to this .json or .yaml file."""
    image_size: int | None = None
    """Side of the images that shapes and multiply-adds are for, in pixels."""
    num_classes: int = 1000
    """Classes of a model that is given by name."""
    recipe: str | None = None
    """Python file of the run's recipe, if it was trained with --recipe."""


@dataclass
class Verify:
    """Check a checkpoint, all checkpoints of a run, or an export: exit code 0, or 65 if anything is wrong."""

    path: Positional[str]
    """A checkpoint, a run, or the folder of an export."""
    recipe: str | None = None
    """Python file of the run's recipe, if it was trained with --recipe."""
    weights: str | None = None
    """Where the frozen weights are, if not where they were in training."""


@dataclass
class Evaluate:
    """Evaluate a run on its validation images, or on others; in all, and per class. Also under accelerate launch."""

    run: str
    """A run (its best checkpoint), a checkpoint, or an export."""
    data: str | None = None
    """The run's own images in another place, or others: their validation part, or all where there is none."""
    weights: str | None = None
    """Where the frozen weights are, if not where they were in training."""
    workers: int | None = None
    """Processes that decode images, per process; None: one per core available."""
    compare: str | None = None
    """Another run, checkpoint or export: evaluate it on the same images, with McNemar's exact test."""
    threshold: float | None = None
    """Say how many predictions have at least this probability, and how many of these are correct."""
    json: str | None = None
    """File for all numbers, in JSON; - prints them instead of the summary."""
    csv: str | None = None
    """File for a table: path, label, prediction, and the probability of each class, for each image."""
    recipe: str | None = None
    """Python file of the run's recipe, if it was trained with --recipe."""


@dataclass
class Predict:
    """Classify image files."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH ...", help_behavior_hint="")]
    """Files, folders (with all below them), patterns in quotes, or - for a list of paths on the standard input."""
    run: str
    """A run (its best checkpoint), a checkpoint, or an export."""
    csv: str | None = None
    """Write a table as well: path, class, probability, and the probability of every class."""
    jsonl: str | None = None
    """Write the same as a line of JSON for each image, as soon as it is known; - prints these lines instead."""
    threshold: float | None = None
    """Mark predictions below this probability as unsure."""
    copy_to: str | None = None
    """Copy the images into folders of their classes here; nothing is moved or overwritten."""
    top: int = 3
    """Classes to print per image."""
    batch_size: int = 32
    """Images per forward."""
    workers: int | None = None
    """Processes that decode images; None: one per core available."""
    weights: str | None = None
    """Where the frozen weights are, if not where they were in training."""
    device: str | None = None
    """Such as cpu or cuda:1; None: the GPU if there is one."""
    recipe: str | None = None
    """Python file of the run's recipe, if it was trained with --recipe."""


@dataclass
class Export:
    """Write a trained model for others, re-open what was written, and compare it on real images."""

    run: str
    """A run (its best checkpoint), or a checkpoint."""
    formats: tuple[str, ...] = ("tail", "merged")
    """tail (what was trained), merged (a state dict for torchvision), program (torch.export), onnx, npz."""
    output: str | None = None
    """Folder to write; None: export/ in the run, or beside the checkpoint."""
    preprocessing: bool = False
    """Put resizing, cropping and normalisation into program and onnx: they then take uint8 images of any size."""
    push: Annotated[str | None, arg(metavar="USER/NAME")] = None
    """Push the export to this repository of the Hugging Face Hub; a new one is private."""
    overwrite: bool = False
    """Replace the files of an export that is there; others in its folder stay."""
    recipe: str | None = None
    """Python file of the run's recipe, if it was trained with --recipe."""
    weights: str | None = None
    """Where the frozen weights are, if not where they were in training."""


@dataclass
class Report:
    """Write a page about a run: results, confusions, mistakes with heat maps, calibration; or compare several runs."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ...", help_behavior_hint="")]
    """Runs (their best checkpoints) or checkpoints; with several, one page compares them."""
    output: str | None = None
    """File to write; None: report.html in the first run."""
    recipe: str | None = None
    """Python file of the run's recipe, if it was trained with --recipe."""
    weights: str | None = None
    """Where the frozen weights are, if not where they were in training."""


@dataclass
class Audit:
    """Look for wrong labels, duplicates, leaks from training to validation, and odd images. Also under accelerate
    launch. Nothing is deleted or moved."""

    data: str | None = None
    """Images, as for train.py; None: those of the run."""
    run: str | None = None
    """A run, or a checkpoint, for its data, model, weights and settings; None: the defaults of train.py."""
    model: str | None = None
    """Name of a torchvision model, whose features tell images apart; None: that of the run, or of train.py."""
    weights: str | None = None
    """Its weights, as for train.py; the checkpoint of a run for features that were trained on these images."""
    output: str | None = None
    """Table to write; None: audit.csv in the run, or here. Ticks of a table that is there are kept."""
    json: str | None = None
    """File for all findings, in JSON; - prints them instead of the summary."""
    workers: int | None = None
    """Processes that decode images, per process; None: one per core available."""
    recipe: str | None = None
    """Python file of a recipe; None: that of the run."""


@dataclass
class Doctor:
    """Check this machine: versions, GPUs, cores, memory, limits, the launcher's variables, two processes that talk."""
