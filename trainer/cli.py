"""The command line of train.py: flags, YAML files and the demo's defaults become one `Config`.

Layers, the last one wins: defaults < defaults of the demo < `--config FILE` < flags. A resumed run puts its stored
settings below the file and the flags (see `run.resume`). Imports no torch.
"""

import dataclasses
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import tyro
import yaml

from trainer import config as settings
from trainer.config import GROUP_OF, PATHS, Config
from trainer.errors import UsageError
from trainer.model import patterns
from trainer.processes.preemption import cleaning_up as cleaning_up
from trainer.processes.preemption import end_at_once as end_at_once

_LARGEST_FILE = 1_000_000  # bytes of YAML: settings are a few hundred, and parsing many takes minutes
# Suits 1,797 tiny scans and a backbone with random weights.
_DEMO = {"image_size": 64, "workers": 0, "weights": "none", "label_smoothing": 0.1}
_MEANT = {"learning_rate": "lr", "batch": "batch_size", "arch": "model", "backbone": "model", "wd": "weight_decay"}


def parse(description: str | None = None, arguments: list[str] | None = None) -> Config:
    """The settings of a command line; prints help or one message, and exits (2 for a mistake), if there are none.

    Args:
        description: shown by `--help`.
        arguments: of the command line; None: `sys.argv`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with no_broken_pipe():
            return _layers(arguments, description or "")
    except UsageError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def flags() -> set[str]:
    """Every flag of train.py."""
    return {settings.flag(name) for name in GROUP_OF}


@contextmanager
def no_broken_pipe() -> Iterator[None]:
    """The reader of the output may have seen enough, as in `--help | head`: then the program is done."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def speaks() -> bool:
    """Whether this process prints messages: the first process of each machine does, as all share a command line."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _layers(arguments: list[str], description: str) -> Config:
    config = _parse(arguments, Config(), description)
    file = {} if config.run.config is None else _load_yaml(Path(config.run.config))
    demo = config.data.data.lower() == "digits"
    if demo or file:
        base = settings.update(Config(), file, f"--config {config.run.config}")
        config = _parse(arguments, base, description)
        if config.data.data.lower() == "digits":
            base = settings.update(settings.replace(Config(), **_DEMO), file, f"--config {config.run.config}")
            config = _parse(arguments, base, description)
    config = dataclasses.replace(config, given=frozenset(_names(arguments) | file.keys()))
    config = settings.replace(config, train=_with_files(config.model.train))
    paths = {name: settings.get(config, name) for name in PATHS}
    # The shell leaves ~ alone in --output=~/runs, and so does YAML.
    config = settings.replace(config, **{n: os.path.expanduser(path) for n, path in paths.items() if path})
    # Flags of a resumed run may need its other settings to make sense; see `run.resume`.
    (settings.check if config.run.resume is None else settings.check_bounds)(config)
    return config


def _parse(arguments: list[str], default: Config, description: str) -> Config:
    for name, meant in _MEANT.items():
        if any(word.partition("=")[0] in (settings.flag(name), f"--{name}") for word in arguments):
            raise UsageError(f"there is no {settings.flag(name)}; did you mean {settings.flag(meant)}?")
    quiet = nullcontext() if speaks() else redirect_stderr(io.StringIO())
    with quiet:
        lines = "\n\n".join(filter(None, description.splitlines()))  # single line breaks would be joined
        return tyro.cli(Config, args=arguments, default=default, description=lines, config=(tyro.conf.OmitArgPrefixes,))


def _names(arguments: list[str]) -> set[str]:
    """The settings whose flags are among the words of a command line."""
    words = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    return {name for name in GROUP_OF if name in words or f"no_{name}" in words}


def _with_files(train: tuple[str, ...]) -> tuple[str, ...]:
    """The rules of `--train` with those of each @FILE in its place: the run must not depend on the file any more."""
    rules: list[str] = []
    for rule in train:
        rules += patterns.read(Path(os.path.expanduser(rule[1:]))) if rule.startswith("@") else [rule]
    return tuple(rules)


def _load_yaml(path: Path) -> dict[str, Any]:
    path = path.expanduser()
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"--config {path} is larger than 1 MB; expected settings such as optim: {{lr: 0.1}}.")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --config {path}: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config {path} is not plain YAML: {error}") from None
    except ValueError as error:  # not a date, or a number with too many digits
        raise (
            error if isinstance(error, UsageError) else UsageError(f"--config {path} is not plain YAML: {error}")
        ) from None
    return settings.read_groups(values, f"--config {path}")
