"""What people do with a trained model: look at it, check it, evaluate it, use it, hand it on.

python -m trainer inspect resnet50 --train head layer4       # what would train, and where the model would be cut
python -m trainer predict --run runs/photos-resnet50 new/    # classify the images of a folder
accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m trainer evaluate --run runs/photos-resnet50
"""

import io
import signal
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Union

import tyro
from tyro.conf import Positional, arg, subcommand

import trainer
from trainer.config import no_broken_pipe, speaks


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


@dataclass
class Verify:
    """Check a checkpoint, all checkpoints of a run, or an export: exit code 0, or 65 if anything is wrong."""

    path: Positional[str]
    """A checkpoint, a run, or the folder of an export."""
    weights: str | None = None
    """Where the frozen weights are, if not where they were in training."""


@dataclass
class Evaluate:
    """Evaluate a run on its validation images, or on others; in all, and per class. Also under accelerate launch."""

    run: str
    """A run (its best checkpoint), a checkpoint, or an export."""
    data: str | None = None
    """Other images, as for train.py: the validation part of a folder or data set, or all where there is none."""
    weights: str | None = None
    """Where the frozen weights are, if not where they were in training."""
    workers: int | None = None
    """Processes that decode images, per process; None: one per core available."""
    json: bool = False
    """Print JSON, with all digits."""


@dataclass
class Predict:
    """Classify image files."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH ...", help_behavior_hint="")]
    """Files, folders (with all below them), or patterns in quotes."""
    run: str
    """A run (its best checkpoint), a checkpoint, or an export."""
    csv: str | None = None
    """Write a table as well: path, class, probability, and the probability of every class."""
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
    overwrite: bool = False
    """Replace the files of an export that is there; others in its folder stay."""
    weights: str | None = None
    """Where the frozen weights are, if not where they were in training."""


_ABOUT = __doc__.split("\n")[0]
_DOES = {
    Inspect: "inspection.inspect",
    Verify: "inspection.verify",
    Evaluate: "evaluation.evaluate_run",
    Predict: "predict.predict",
    Export: "export.export",
}


def parse(arguments: list[str] | None = None) -> Inspect | Verify | Evaluate | Predict | Export:
    """The command of a command line; prints help or one message and exits if it cannot be."""
    commands = [Annotated[kind, subcommand(kind.__name__.lower(), prefix_name=False)] for kind in _DOES]
    with nullcontext() if speaks() else redirect_stderr(io.StringIO()), no_broken_pipe():
        return tyro.cli(Union[*commands], prog="python -m trainer", description=_ABOUT, args=arguments)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback through seconds of imports
    command = parse()
    module, name = _DOES[type(command)].split(".")

    def run() -> None:  # imported inside, so that a missing package is a message like any other
        function = getattr(import_module(f"trainer.{module}"), name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with no_broken_pipe():
            function(**vars(command))

    trainer.run_and_exit(run)


if __name__ == "__main__":
    main()
