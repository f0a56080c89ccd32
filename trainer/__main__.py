"""Commands for a finished run (inspect, verify, evaluate, predict, export, report), data (audit), a machine (doctor).

python -m trainer inspect resnet50 --train head layer4       # what would train, and where the model would be cut
python -m trainer predict --run runs/photos-resnet50 new/    # classify the images of a folder
accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m trainer evaluate --run runs/photos-resnet50
"""

import io
import signal
from contextlib import nullcontext, redirect_stderr
from importlib import import_module
from typing import Annotated, Any, Union

import tyro
from tyro.conf import subcommand

import trainer
from trainer.cli import no_broken_pipe, speaks
from trainer.commands.arguments import Audit, Doctor, Evaluate, Export, Inspect, Predict, Report, Verify
from trainer.processes.console import accept_any_text
from trainer.processes.launcher import forget_leftovers

_ABOUT = (
    "Commands for a finished run: inspect, verify, evaluate, predict, export, report; "
    "audit checks data, doctor checks the machine."
)
_COMMANDS = (Inspect, Verify, Evaluate, Predict, Export, Report, Audit, Doctor)


def parse(
    arguments: list[str] | None = None,
) -> Inspect | Verify | Evaluate | Predict | Export | Report | Audit | Doctor:
    """The command of a command line; prints help or one message, and exits, if there is none."""
    commands: Any = [Annotated[kind, subcommand(kind.__name__.lower(), prefix_name=False)] for kind in _COMMANDS]
    union: Any = Union[*commands]
    with nullcontext() if speaks() else redirect_stderr(io.StringIO()), no_broken_pipe():
        return tyro.cli(union, prog="python -m trainer", description=_ABOUT, args=arguments)


def main() -> None:
    """Run the command of the command line: the function of its name, in the module of its name."""
    accept_any_text()
    forget_leftovers()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback through seconds of imports
    command = parse()
    name = type(command).__name__.lower()

    def run() -> None:  # imported inside, so that a missing package is a message like any other
        function = getattr(import_module(f"trainer.commands.{name}"), name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with no_broken_pipe():
            function(command)

    trainer.run_and_exit(run)


if __name__ == "__main__":
    main()
