"""Every choice of a run: dataclasses with a docstring and a unit per field; YAML and command line.

Imports neither torch nor accelerate: `train.py --help` answers at once. The hardware is not configured here; it comes
from `accelerate launch` and `accelerate_configs/`.

Each layer is turned into command-line arguments and put before those of the user, so that one parser checks all of
them and the last one wins: defaults < demo settings < the resumed run's config < `--config FILE` < the command line.
"""

import dataclasses
import difflib
import io
import os
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
import yaml

from trainer import rules, run
from trainer.errors import UsageError


@dataclass
class DataConfig:
    """Images."""

    data: str = "digits"
    """A folder (class folders in it, or under train/ and val/), a torchvision dataset such as CIFAR10, or digits, the
    built-in demo."""
    data_root: str = "data"
    """Folder that torchvision datasets are downloaded to."""
    val_fraction: float = 0.2
    """Share of each class held out for validation, 0 to 1, where the data has no validation part of its own."""
    augment: Literal["none", "flip", "crop"] = "crop"
    """none: resize and centre crop; flip: with a random mirror image; crop: random resized crop and mirror image. The
    demo uses none."""
    views: int | None = None
    """Augmented views of each training image, drawn once, used in turn epoch by epoch; None: a new one each epoch."""
    image_size: int | None = None
    """Side of the square the model sees, in pixels; None: the one its weights were trained with. The demo uses 64."""
    workers: int | None = None
    """Processes that decode images, per training process; None: one per core available. The demo uses 0."""
    check_data: bool = False
    """Decode every image once before the first step, also after a resume, and list those that cannot be read."""
    fast_decode: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size where that is enough: faster, nearly the same image."""
    bad_images: Literal["stop", "skip"] = "stop"
    """Images that cannot be read end the run, or (skip) are found before the first step of a new run and left out."""


@dataclass
class ModelConfig:
    """Backbone, and which of its parameters train."""

    name: Annotated[str, tyro.conf.arg(name="model")] = "resnet18"
    """A torchvision classification model, by its torchvision name."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the frozen trunk (torch.compile); auto: if it saves more time than it takes, by a measurement."""
    compile_tail: bool = False
    """Compile what trains, too: takes minutes, for a long fine-tuning of more than the head."""
    weights: str = "default"
    """default (torchvision's best), none (random), the name of a torchvision weights entry such as IMAGENET1K_V2, a
    file or a checkpoint of a run, or a URL. The demo uses none."""
    weights_match: Literal["exact", "shape"] = "exact"
    """exact: the file is the model, tensor by tensor; shape: take the tensors whose name and shape are the model's."""
    weights_rename: tuple[str, ...] = ()
    """OLD NEW ...: put NEW in the place of the beginning OLD of the file's names ('' is the empty one), or, for
    re:OLD, of what the regular expression finds."""
    weights_first: int | None = None
    """Take the first so many entries of the file; None: all."""
    weights_only: tuple[str, ...] = ()
    """Take the tensors that these patterns name; the patterns are those of --train. Without any: all."""
    weights_except: tuple[str, ...] = ()
    """Take all but the tensors that these patterns name."""
    weights_coverage: float = 0.9
    """Least share of the parameters outside the head that the file must give, 0 to 1."""
    train: tuple[str, ...] = ("head",)
    """What trains: head, all, or modules and parameters by name, such as: head layer4; wildcards, features[3:8] for
    children by number, re:EXPRESSION; with freeze: before it, what does not. The first that fits decides."""
    freeze_plan: str | None = None
    """YAML or JSON file with such rules, instead of --train; the freeze_plan.json of a run is one."""

    def matching(self) -> dict[str, Any]:
        """What of the file is taken, as `weights.Match` has it."""
        names = {"match": "by", "except": "but"}
        parts = ("match", "rename", "first", "only", "except", "coverage")
        return {names.get(part, part): getattr(self, f"weights_{part}") for part in parts}


@dataclass
class OptimConfig:
    """Training. Batch sizes count images; schedules count the whole run as 1."""

    epochs: int = 10
    """Times that every training image is used. The demo uses 40."""
    patience: int | None = None
    """Epochs without a better validation accuracy after which training stops; None: it never stops early."""
    batch_size: int = 64
    """Images per optimizer step, over all processes."""
    micro_batch: int | None = None
    """Images per forward on one process; accumulation follows. None: batch size / processes."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    lr: float = 1e-3
    """Peak learning rate. The demo uses 0.1."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: to zero along a cosine or a line, or constant."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises from zero, 0 to 1."""
    weight_decay: float = 0.01
    """Of weights; biases and norms have none."""
    momentum: float = 0.9
    """Of SGD."""
    clip_norm: float | None = None
    """Largest 2-norm of a step's gradient; None: no clipping."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes, 0 to 1. The demo uses 0.1."""


@dataclass
class RunConfig:
    """Where the run lives and how it starts."""

    seed: int = 0
    """Of everything random: new weights, order, augmentation, dropout, splits."""
    exact: bool = False
    """End in the same bits on any number of processes: gradients are summed in one order, on one CPU thread, or with
    deterministic GPU algorithms. Slower."""
    save_every: int | None = None
    """Optimizer steps between checkpoints in mid-epoch; None: at the end of each epoch alone."""
    save_minutes: float | None = None
    """Minutes between checkpoints in mid-epoch; None: no such limit."""
    time_limit: float | None = None
    """Minutes after which the run saves, stops and exits with 75, to be resumed: a little before, not after."""
    timeout: float = 30.0
    """Minutes to wait for another process or a data worker that gives no sign of life, before the run ends."""
    check_replicas: int | None = None
    """Optimizer steps between bitwise comparisons of the processes' weights; None: never."""
    check_frozen: int | None = None
    """Optimizer steps between proofs that no frozen weight has changed; None: at the end of the run alone."""
    keep: int = 2
    """Newest checkpoints to keep, at least 2; the best one is kept besides."""
    cache_memory: float = 2.0
    """GiB of memory per process for features of the frozen trunk; what does not fit goes to a file; 0 keeps none."""
    cache_dir: str | None = None
    """Folder where features are kept for other runs; None: the run's own, and they are deleted at its end."""
    output: str | None = None
    """Folder of the run; None: runs/DATA-MODEL, numbered if that is taken."""
    resume: str | None = None
    """auto: continue the newest checkpoint of the output folder, or start; or the path of a checkpoint or run."""
    overwrite: bool = False
    """Delete the run that the output folder holds, all but its export."""
    override: bool = False
    """Resume even with another batch size, seed, augmentation or image size than the run had."""
    config: str | None = None
    """YAML file of settings, such as the config.yaml of a run; flags override it."""


@dataclass
class Config:
    """All of it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


# What suits 1,797 tiny scans and a backbone with random weights, where nothing else is said.
_DEMO = ["--augment=none", "--image-size=64", "--workers=0", "--weights=none"]
_DEMO += ["--epochs=40", "--lr=0.1", "--label-smoothing=0.1"]
# Where ~ is the home: a shell leaves it in --output=~/runs, and so does YAML.
_PATHS = {"data", "data_root", "weights", "freeze_plan", "cache_dir", "output", "resume", "config"}
_PLAIN = (str, int, float)
# How a run was started, not what it is: left out of its config.yaml, so that the file repeats the run elsewhere.
_NOT_STORED = ("output", "resume", "overwrite", "override", "config")
# What a resumed run must share with the run it continues.
_OVERRIDABLE = ("augment", "views", "image_size", "batch_size", "seed")  # the checkpoint would refuse the others
_FIXED = (*_OVERRIDABLE, "val_fraction", "bad_images", "name", "train", "optimizer")


def parse(description: str = "", arguments: list[str] | None = None) -> Config:
    """The configuration of this process's command line; prints help or one message and exits (2) if it cannot be.

    Args:
        description: shown by `--help`.
        arguments: of the command line; None takes `sys.argv`.
    """
    try:
        with no_broken_pipe():
            return _layers(_own(arguments), description=description)
    except UsageError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def resumed(config: Config, arguments: list[str] | None = None) -> Config:
    """The configuration once the settings of the run that it resumes are known; `config` itself if it resumes none.

    Called on one process, whose result is everybody's: a run is looked up on one machine alone. Prints what changes.

    Args:
        config: as `parse` gave it for the same `arguments`.

    Raises:
        UsageError: there is no such run, or it cannot be continued with these settings.
        CheckpointError: the checkpoint it names cannot be read.
    """
    arguments, name = _own(arguments), default_name(config)
    if folder := run.under_way(config.run.output, config.run.resume, name):
        arguments = [*arguments, "--resume=auto", "--no-overwrite", f"--output={folder}"]  # whatever they said
        config = _layers(arguments)
    if config.run.resume is None:
        return config
    stored = run.stored_config(config.run.resume, config.run.output, name, whole=to_dict(config))
    config = _layers(arguments, stored=stored)
    if foreign := [name for name in _NOT_STORED if name in stored.get("run", {})]:
        raise UsageError(f"--resume {config.run.resume}: its settings say {foreign[0]}, which no run stores.")
    _check_resume(stored, config)
    return config


def _own(arguments: list[str] | None) -> list[str]:
    return sys.argv[1:] if arguments is None else arguments


def _layers(own: list[str], *, stored: dict[str, Any] | None = None, description: str = "") -> Config:
    """Defaults, demo, stored, file, command line: parsed as one."""
    config = _parse(own, description)
    file, run_settings = config.run.config, f"the settings of --resume {config.run.resume}"
    settings = [] if file is None else _arguments(_load_yaml(Path(file)), f"--config {file}")
    above = _arguments(stored or {}, run_settings) + _with_plan(settings) + _with_plan(own)
    config = _parse(above, description)
    if config.data.data.lower() == "digits":
        config = _parse(_DEMO + above, description)
    _check(config)
    return config


def _with_plan(arguments: list[str]) -> list[str]:
    """`--freeze-plan FILE` as the `--train` it stands for: the run must not depend on the file any more."""
    nobody = ("\0",)  # can be said by no one
    model = _parse(["--train", *nobody, *arguments], "").model
    if model.freeze_plan is None:
        return arguments
    if model.train != nobody:
        raise UsageError("--train and --freeze-plan both say what trains; give one of them.")
    return [*arguments, "--freeze-plan=None", "--train", *rules.read(Path(model.freeze_plan))]


def default_name(config: Config) -> str:
    """The name of a run that was given none: DATA-MODEL."""
    return f"{Path(config.data.data).resolve().name}-{config.model.name}".lower()


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The stored form: plain types, by group, without what says only how the run was started."""
    values = dataclasses.asdict(config)
    if config.data.data.lower() != "digits" and Path(config.data.data).is_dir():
        values["data"]["data"] = os.path.abspath(config.data.data)  # works from anywhere
    if Path(config.model.weights).is_file():
        values["model"]["weights"] = os.path.abspath(config.model.weights)
    del values["model"]["freeze_plan"]  # its rules are in `train`
    for settings in values.values():
        settings |= {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}
    values["run"] = {name: value for name, value in values["run"].items() if name not in _NOT_STORED}
    return values


def flags() -> set[str]:
    """Every flag of train.py."""
    return {_flag(f.name) for group in dataclasses.fields(Config) for f in dataclasses.fields(group.default_factory)}


def _flag(name: str) -> str:
    return "--model" if name == "name" else "--" + name.replace("_", "-")


@contextmanager
def no_broken_pipe() -> Iterator[None]:
    """What is printed has a reader that may have seen enough, as in `--help | head`: then the program is done."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def speaks() -> bool:
    """Whether this process talks to the user: the first of those on a machine, which share a command line."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _parse(arguments: list[str], description: str) -> Config:
    quiet = nullcontext() if speaks() else redirect_stderr(io.StringIO())
    with quiet:
        lines = "\n\n".join(filter(None, description.splitlines()))  # else they are joined to one
        config = tyro.cli(Config, args=arguments, description=lines, config=(tyro.conf.OmitArgPrefixes,))
    for settings in (config.data, config.model, config.run):
        for name in _PATHS & vars(settings).keys():
            setattr(settings, name, getattr(settings, name) and os.path.expanduser(getattr(settings, name)))
    return config


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --config {path}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: no such date, too many digits
        raise UsageError(f"--config {path} is not plain YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} holds {type(values).__name__}; expected groups of settings such as optim:.")
    return values


def _arguments(values: dict[str, Any], source: str) -> list[str]:
    """A nested dict of settings as command-line arguments; `source` says in errors where they are from."""
    found: list[tuple[str, list[str], Any, Any]] = []
    groups = {group.name: dataclasses.fields(group.default_factory) for group in dataclasses.fields(Config)}
    for group, settings in values.items():
        fields = {f.name: f for f in groups.get(group, ())}
        if group not in groups:
            raise UsageError(f"{source}: unknown group {_unknown(group, groups)}")
        if not isinstance(settings, dict):
            held = reprlib.repr(settings)
            raise UsageError(f"{source}: {group} holds {held}; expected settings such as {', '.join(fields)}.")
        for name, value in settings.items():
            if name not in fields:
                raise UsageError(f"{source}: unknown setting in {group}: {_unknown(name, fields)}")
            key, flag, kind = f"{source}: {group}.{name}", _flag(name), fields[name].type
            if isinstance(value, list) and any(isinstance(item, str) and item.startswith("--") for item in value):
                raise UsageError(f"{key} holds {value}, which the command line would take for flags.")
            if isinstance(value, bool) and kind is bool:
                arguments = [flag if value else flag.replace("--", "--no-", 1)]
            elif isinstance(value, list) and get_origin(kind) is tuple and all(type(v) in _PLAIN for v in value):
                arguments = [flag, *map(str, value)]
            elif type(value) in _PLAIN or (value is None and type(None) in get_args(kind)):
                arguments = [f"{flag}={value}"]
            else:
                raise UsageError(_misfit(key, value, kind))
            found.append((key, arguments, value, kind))
    every = [argument for _, arguments, *_ in found for argument in arguments]
    if every and not _fits(every):  # nothing always fits, and parsing it takes as long as the command line
        raise UsageError(next(_misfit(key, *rest) for key, arguments, *rest in found if not _fits(arguments)))
    return every


def _fits(arguments: list[str]) -> bool:
    try:
        with redirect_stderr(io.StringIO()):
            _parse(arguments, "")
    except SystemExit:
        return False
    return True


def _misfit(key: str, value: Any, kind: Any) -> str:
    expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return f"{key} is {reprlib.repr(value)}; expected {expected}."


def _unknown(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}."
    return f"{name!r}; {hint}"


def _check_resume(stored: dict[str, Any], config: Config) -> None:
    """Refuse to continue a run as another one."""
    now = to_dict(config)
    for group, settings in stored.items():
        for name, value in settings.items():
            new = now.get(group, {}).get(name)
            if new == value:
                continue
            if name in _FIXED and not (name in _OVERRIDABLE and config.run.override):
                other = "insist with --override" if name in _OVERRIDABLE else "let that begin with its --weights"
                raise UsageError(
                    f"--resume: the run has {name} {value!r}, the command line {new!r}. Leave {_flag(name)} away to "
                    f"continue it as it is, leave --resume away to start a new run, or {other}."
                )
            with suppress(OSError):  # nobody listens: no reason to stop
                print(f"resume: {name}: {value} → {new}")


def _check(config: Config) -> None:
    """Ranges that types do not express."""
    d, m, o, r = config.data, config.model, config.optim, config.run
    for name, value, good, expected in (
        ("weights-rename", m.weights_rename, len(m.weights_rename) % 2 == 0, "pairs of names: OLD NEW"),
        ("weights-first", m.weights_first, m.weights_first is None or m.weights_first >= 1, "at least 1 entry"),
        ("weights-coverage", m.weights_coverage, 0 <= m.weights_coverage <= 1, "a share, 0 to 1"),
        ("val-fraction", d.val_fraction, 0 < d.val_fraction < 1, "between 0 and 1"),
        ("views", d.views, d.views is None or d.views >= 1, "at least 1"),
        ("image-size", d.image_size, d.image_size is None or d.image_size > 0, "at least 1 pixel"),
        ("workers", d.workers, d.workers is None or d.workers >= 0, "0 or more processes"),
        ("epochs", o.epochs, o.epochs >= 1, "at least 1"),
        ("patience", o.patience, o.patience is None or o.patience >= 1, "at least 1 epoch"),
        ("batch-size", o.batch_size, o.batch_size >= 1, "at least 1 image"),
        ("micro-batch", o.micro_batch, o.micro_batch is None or o.micro_batch >= 1, "at least 1 image"),
        ("lr", o.lr, 0 < o.lr < float("inf"), "a number above 0"),
        ("warmup", o.warmup, 0 <= o.warmup <= 1, "a share of the run, 0 to 1"),
        ("weight-decay", o.weight_decay, o.weight_decay >= 0, "0 or more"),
        ("momentum", o.momentum, 0 <= o.momentum < 1, "0 or more, below 1"),
        ("clip-norm", o.clip_norm, o.clip_norm is None or o.clip_norm > 0, "above 0"),
        ("label-smoothing", o.label_smoothing, 0 <= o.label_smoothing < 1, "0 or more, below 1"),
        ("save-every", r.save_every, r.save_every is None or r.save_every >= 1, "at least 1 step"),
        ("save-minutes", r.save_minutes, r.save_minutes is None or r.save_minutes > 0, "more than 0 minutes"),
        ("time-limit", r.time_limit, r.time_limit is None or r.time_limit > 0, "more than 0 minutes"),
        ("timeout", r.timeout, 0 < r.timeout < float("inf"), "more than 0 minutes"),
        ("check-replicas", r.check_replicas, r.check_replicas is None or r.check_replicas >= 1, "at least 1 step"),
        ("check-frozen", r.check_frozen, r.check_frozen is None or r.check_frozen >= 1, "at least 1 step"),
        ("keep", r.keep, r.keep >= 2, "at least 2: while one is written, the other must exist"),
        ("cache-memory", r.cache_memory, r.cache_memory >= 0, "0 GiB or more"),
    ):
        if not good:
            raise UsageError(f"--{name} is {value}; expected {expected}.")
