"""The settings of a run: small groups of plain values, each with a docstring, a unit and its bounds.

    config = Config(optim=OptimConfig(epochs=3), run=RunConfig(output="runs/try"))

A group goes whole to the one function that it configures: `open_data(accelerator, config.data, ...)`. To add a setting,
add a field to a group and use it there; `cli` makes it a flag and a key of YAML files. Hardware is not configured here:
it comes from `accelerate launch`. Imports no torch, so that `train.py --help` answers at once.
"""

import dataclasses
import difflib
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typeguard
import tyro

from trainer.errors import UsageError


@dataclass(frozen=True)
class Bounds:
    """The range of a number: from `least` (or more than `above`) to `most` (or less than `below`), in some unit."""

    least: float = -float("inf")
    above: float = -float("inf")
    most: float = float("inf")
    below: float = float("inf")
    unit: str = ""

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        signs = {"least": "at least", "above": "more than", "most": "at most", "below": "less than"}
        limits = [(words, getattr(self, name)) for name, words in signs.items()]
        parts = [f"{words} {limit:g}" for words, limit in limits if abs(limit) != float("inf")]
        return f"{' and '.join(parts)} {self.unit}".rstrip()


@dataclass(frozen=True)
class DataConfig:
    """Images."""

    data: str = "digits"
    """A folder (with one folder per class, or train/ and val/ with class folders), a torchvision dataset such as
    CIFAR10, or digits, the built-in demo."""
    data_root: str = "data"
    """Folder to which torchvision datasets are downloaded."""
    val_fraction: Annotated[float, Bounds(above=0, below=1)] = 0.2
    """Share of each class held out for validation, if the data has no validation part of its own."""
    augment: Literal["auto", "none", "flip", "crop"] = "auto"
    """none: resize and centre crop; flip: also mirror half of the images; crop: random resized crop, and mirror half of
    the images; auto: none for a head on frozen features, which are then computed once, otherwise crop."""
    image_size: Annotated[int | None, Bounds(least=1, unit="pixel")] = None
    """Side of the square image that the model sees, in pixels; None: the size its weights were trained with. Default
    for the demo: 64."""
    check_data: bool = False
    """Decode every image once before the first step (also after a resume), and list those that cannot be read."""
    bad_images: Literal["stop", "skip"] = "stop"
    """stop: an image that cannot be read ends the run; skip: such images are found before the first step of a new run
    and left out."""
    exclude: str | None = None
    """Table of images to leave out: the audit.csv of `python -m trainer audit`, with ticks in its column exclude."""


@dataclass(frozen=True)
class ModelConfig:
    """The model, and what trains."""

    model: str = "resnet18"
    """Name of a torchvision classification model."""
    train: tuple[str, ...] = ("head",)
    """What trains: head, all, or names of modules and parameters, such as: head layer4. Also wildcards, slices such as
    features[3:8], re:EXPRESSION, and freeze: before a rule that freezes. The first rule that matches a parameter
    decides. @FILE inserts the rules of a YAML or JSON file, such as the freeze_plan.json of a run."""


@dataclass(frozen=True)
class WeightsConfig:
    """Pretrained weights, and which tensors of a file to take."""

    weights: str = "default"
    """default (torchvision's best), none (random), the name of torchvision weights such as IMAGENET1K_V2, a file, a
    checkpoint of a run, or a URL. Default for the demo: none."""
    weights_match: Literal["exact", "shape"] = "exact"
    """exact: the file must hold the model, tensor by tensor; shape: take the tensors with the name and shape of one of
    the model's."""
    weights_rename: tuple[str, ...] = ()
    """Pairs OLD NEW: replace OLD by NEW at the beginning of the names in the file ('' is the empty beginning); with
    re:OLD, replace all matches of a regular expression."""
    weights_first: Annotated[int | None, Bounds(least=1, unit="entry")] = None
    """Take only the first entries of the file, this many; None: all."""
    weights_only: tuple[str, ...] = ()
    """Take only tensors that match one of these patterns (the patterns of --train)."""
    weights_except: tuple[str, ...] = ()
    """Do not take tensors that match one of these patterns."""
    weights_coverage: Annotated[float, Bounds(least=0, most=1)] = 0.9
    """Smallest share of the parameters outside the head that must come from the file, 0 to 1."""


@dataclass(frozen=True)
class OptimConfig:
    """Training. Batch sizes are in images."""

    epochs: Annotated[int | Literal["auto"], Bounds(least=1)] = "auto"
    """Passes over the training images; auto: found together with --lr auto, otherwise 10."""
    patience: Annotated[int | None, Bounds(least=1, unit="epoch")] = None
    """Stop after this many epochs without a better validation result; None: never stop early."""
    batch_size: Annotated[int, Bounds(least=1, unit="image")] = 64
    """Images per optimizer step, over all processes."""
    micro_batch: Annotated[int | None, Bounds(least=1, unit="image")] = None
    """Images per forward on one process; gradient accumulation follows from it. None: batch size / processes."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    lr: Annotated[float | Literal["auto"], Bounds(above=0, below=float("inf"))] = "auto"
    """Peak learning rate; auto: for a head on kept features found by training many heads at once and comparing them on
    training images that they have not seen, otherwise 1e-3."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: down to zero along a cosine or a line, or constant."""
    warmup: Annotated[float, Bounds(least=0, most=1)] = 0.05
    """Share of the run during which the learning rate rises from zero, 0 to 1."""
    weight_decay: Annotated[float | Literal["auto"], Bounds(least=0)] = "auto"
    """Weight decay of weights; biases and norms have none; auto: found together with --lr auto, otherwise 0.01."""
    momentum: Annotated[float, Bounds(least=0, below=1)] = 0.9
    """Momentum of SGD; AdamW does not use it."""
    clip_norm: Annotated[float | None, Bounds(above=0)] = None
    """Clip the gradient of a step to this 2-norm; None: no clipping."""
    label_smoothing: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Share of each target that is spread over all classes, 0 to 1. Default for the demo: 0.1."""

    def settled(self) -> "OptimConfig":
        """A copy with the numbers that stand for "auto" where nothing is searched."""
        standard = {"epochs": 10, "lr": 1e-3, "weight_decay": 0.01}
        return dataclasses.replace(self, **{n: v for n, v in standard.items() if getattr(self, n) == "auto"})


@dataclass(frozen=True)
class SpeedConfig:
    """What makes a run faster and changes no result but the last digits."""

    workers: Annotated[int | None, Bounds(least=0)] = None
    """Processes that decode images, per training process; None: one per available core. Default for the demo: 0."""
    views: Annotated[int | None, Bounds(least=1)] = None
    """Augmented views of each training image, drawn once and used in turn, epoch by epoch; None: a new view in each
    epoch. This one does change results."""
    cache_memory: Annotated[float, Bounds(least=0, unit="GiB")] = 2.0
    """Memory per process for features of the frozen trunk, in GiB; features beyond it go to a file; 0: keep none."""
    cache_dir: str | None = None
    """Folder where features are kept for later runs; None: in the run's folder until the run ends."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the frozen trunk with torch.compile; auto: if that saves more time than it takes."""
    compile_tail: bool = False
    """Compile what trains, too. Takes minutes; for long fine-tuning of more than the head."""
    fast_decode: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size where that is enough: faster, nearly the same image."""


Tracker = Literal[
    "none", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, how it starts and how it is kept safe."""

    recipe: str | None = None
    """Python file that replaces functions of trainer/recipe.py: data, model, loss, metrics, ..."""
    seed: int = 0
    """Seed of everything random: new weights, order, augmentation, dropout, splits."""
    exact: bool = False
    """Same bits on any number of processes: gradients are summed in a fixed order, on one CPU thread, or with
    deterministic GPU algorithms. Slower."""
    save_every: Annotated[int | None, Bounds(least=1, unit="step")] = None
    """Optimizer steps between checkpoints within an epoch; None: save only at the end of each epoch."""
    save_minutes: Annotated[float | None, Bounds(above=0, unit="minutes")] = None
    """Minutes between checkpoints within an epoch; None: no such limit."""
    time_limit: Annotated[float | None, Bounds(above=0, unit="minutes")] = None
    """Minutes after which the run has saved and stopped, with exit code 75, ready to be resumed."""
    timeout: Annotated[float, Bounds(above=0, below=float("inf"), unit="minutes")] = 30.0
    """Minutes to wait for a process or a data worker that shows no sign of life, before the run ends."""
    check_replicas: Annotated[int | None, Bounds(least=1, unit="step")] = None
    """Optimizer steps between bitwise comparisons of the weights on all processes; None: never."""
    check_frozen: Annotated[int | None, Bounds(least=1, unit="step")] = None
    """Optimizer steps between checks that no frozen weight has changed; None: only at the end of the run."""
    keep: Annotated[int, Bounds(least=2)] = 2
    """Checkpoints to keep besides the best one, at least 2: while one is written, another must exist."""
    track: tuple[Tracker, ...] = ("tensorboard",)
    """Where curves, settings and pictures go, besides metrics.jsonl: any number of trackers that Accelerate knows, or
    none. Each but tensorboard needs its package, and is set up by its own environment variables."""
    output: str | None = None
    """Folder of the run; None: runs/DATA-MODEL, with a number if that is taken."""
    resume: str | None = None
    """auto: continue the newest checkpoint of the output folder, or start; or the path of a checkpoint or run."""
    overwrite: bool = False
    """Delete the run in the output folder, except for its export."""
    override: bool = False
    """Resume even with a batch size, seed, augmentation or image size that differs from the run's."""
    config: str | None = None
    """YAML file of settings, such as the config.yaml of a run; flags override it."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    run: RunConfig = field(default_factory=RunConfig)
    given: Annotated[frozenset[str] | None, tyro.conf.Suppress] = None
    """Settings that somebody gave, by flag or file: what overrides the settings of a resumed run. None: those that
    differ from the defaults."""


# How a run was started, not what it is: not stored with it, so that its config.yaml repeats the run elsewhere.
START = ("output", "resume", "overwrite", "override", "config")
_FILES = ("data", "exclude", "weights", "recipe")
PATHS = ("data", "data_root", "exclude", "weights", "recipe", "cache_dir", "output", "resume", "config")
_GROUPS: dict[str, Any] = {group.name: group.default_factory for group in fields(Config) if group.name != "given"}
GROUP_OF = {setting.name: group for group, kind in _GROUPS.items() for setting in fields(kind)}
_FORMER = {"name": "model"}  # as checkpoints of version 0.1 call it


def flag(setting: str) -> str:
    """The flag of a setting."""
    return "--" + setting.replace("_", "-")


def get(config: Config, setting: str) -> Any:
    """The value of a setting; no two groups share a name."""
    return getattr(getattr(config, GROUP_OF[setting]), setting)


def replace(config: Config, /, **settings: Any) -> Config:
    """A copy of `config` with other values of some settings."""
    groups: dict[str, Any] = {}
    for name, value in settings.items():
        group = GROUP_OF[name]
        groups[group] = dataclasses.replace(groups.get(group, getattr(config, group)), **{name: value})
    return dataclasses.replace(config, **groups)


def given(config: Config) -> set[str]:
    """The settings that override those of a resumed run; see `Config.given`."""
    if config.given is not None:
        return set(config.given)
    return {name for name in GROUP_OF if get(config, name) != get(Config(), name)}


def settle_augment(config: Config, *, head_alone: bool) -> Config:
    """A copy with the augmentation that "auto" stands for.

    Args:
        config: of the run.
        head_alone: whether the head is all that trains.
    """
    if config.data.augment != "auto":
        return config
    keeps = config.speed.cache_memory > 0 or config.speed.cache_dir is not None
    return replace(config, augment="none" if head_alone and keeps and config.speed.views is None else "crop")


def default_name(config: Config) -> str:
    """The name of a run without --output: DATA-MODEL."""
    return f"{Path(config.data.data).resolve().name}-{config.model.model}".lower()


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The stored form: plain types by group, without the settings in `START`."""
    stored: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for name, group in GROUP_OF.items():
        value = get(config, name)
        # A relative path would mean another file in another folder.
        if name in _FILES and value and value.lower() != "digits" and os.path.exists(value):
            value = os.path.abspath(value)
        if name not in START:
            stored[group][name] = list(value) if isinstance(value, tuple) else value
    return stored


def flat(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of the stored form without their groups: by name."""
    return {name: value for group in stored.values() for name, value in group.items()}


def from_dict(stored: Mapping[str, Any], source: str) -> Config:
    """The settings of a checkpoint; what it lacks has its default. Settings are found by name, whatever their group.

    Args:
        stored: as `to_dict` returns it, of this version or of an earlier one.
        source: name of the checkpoint, for errors.

    Raises:
        UsageError: a value does not fit.
    """
    for group, values in stored.items():
        if not isinstance(values, Mapping):
            raise UsageError(f"{source}: {group} holds {reprlib.repr(values)}; expected settings.")
    settings = {_FORMER.get(name, name): value for name, value in flat(stored).items()}
    if "model" not in settings:
        raise UsageError(f"{source} name no model.")
    return update(Config(), {n: v for n, v in settings.items() if n in GROUP_OF and n not in START}, source)


def read_groups(values: Any, source: str) -> dict[str, Any]:
    """The settings of a YAML file by name.

    Args:
        values: content of the file: `{group: {setting: value}}`.
        source: name of the file, for errors.

    Raises:
        UsageError: unknown group or setting; names the nearest.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{source} holds {type(values).__name__}; expected groups of settings such as optim:.")
    found: dict[str, Any] = {}
    for group, settings in values.items():
        if group not in _GROUPS:
            raise UsageError(f"{source}: unknown group {_nearest(group, _GROUPS)}")
        names = [setting.name for setting in fields(_GROUPS[group])]
        if not isinstance(settings, dict):
            held = f"{group} holds {reprlib.repr(settings)}"
            raise UsageError(f"{source}: {held}; expected settings such as {', '.join(names)}.")
        for name, value in settings.items():
            if name not in names:
                raise UsageError(f"{source}: unknown setting in {group}: {_nearest(name, names)}")
            found[name] = value
    return found


def update(config: Config, settings: Mapping[str, Any], source: str) -> Config:
    """A copy of `config` with plain values, as YAML and checkpoints have them, of some settings.

    Raises:
        UsageError: a value has another type than its setting.
    """
    converted = {}
    for name, value in settings.items():
        kind = get_type_hints(_GROUPS[GROUP_OF[name]])[name]
        if isinstance(value, list) and get_origin(kind) is tuple:
            value = tuple(value)
        if float in (kind, *get_args(kind)) and type(value) in (int, str):  # YAML reads 1e-3, without a point, as text
            value = _number(value)
        try:
            typeguard.check_type(value, kind, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
            if isinstance(value, bool) and kind is not bool:  # a bool is an int for Python, and for no user
                raise typeguard.TypeCheckError("a bool")
        except typeguard.TypeCheckError:
            key, text = f"{source}: {GROUP_OF[name]}.{name}", reprlib.repr(settings[name])
            raise UsageError(f"{key} is {text}; expected {_words(kind)}.") from None
        converted[name] = value
    return replace(config, **converted)


def check(config: Config) -> None:
    """Check bounds, settings that contradict each other, and packages of trackers.

    Raises:
        UsageError: names the flag, the value and the bound, or the two flags, or the package.
    """
    check_bounds(config)
    if "none" in (track := config.run.track) and len(track) > 1:
        raise UsageError(f"--track {' '.join(track)}: expected none alone, or trackers without none.")
    for name in track:
        if name != "none" and find_spec(name) is None:
            raise UsageError(f"--track {name} needs a package that is not installed: pip install {name}")
    if (config.speed.views or 1) > 1 and config.data.augment == "none":
        raise UsageError(
            f"--views {config.speed.views} needs views that differ, and --augment none makes all views equal. Omit "
            "--views, or give --augment flip or --augment crop."
        )
    if config.optim.momentum != OptimConfig().momentum and config.optim.optimizer != "sgd":
        raise UsageError(f"--momentum has no effect with --optimizer {config.optim.optimizer}. Omit one of them.")


def check_bounds(config: Config) -> None:
    """Check each setting by itself.

    Raises:
        UsageError: names the flag, the value and the bound.
    """
    for group, kind in _GROUPS.items():
        for name, hint in get_type_hints(kind, include_extras=True).items():
            value = getattr(getattr(config, group), name)
            for bounds in getattr(hint, "__metadata__", ()):
                if isinstance(bounds, Bounds) and value not in (None, "auto") and value not in bounds:
                    finite = "a finite number, " if isinstance(value, float) and not math.isfinite(value) else ""
                    raise UsageError(f"{flag(name)} is {value}; expected {finite}{bounds}.")
    if len(config.weights.weights_rename) % 2:
        names = config.weights.weights_rename
        raise UsageError(f"--weights-rename is {names}; expected pairs of names: OLD NEW.")


def _words(kind: Any) -> str:
    """A type as text: int; float or auto; none, flip or crop."""
    names = [_words(part) for part in get_args(kind) if part is not Ellipsis]
    if not names:
        return kind.__name__ if isinstance(kind, type) else str(kind)
    if get_origin(kind) is tuple:
        return f"a list of {names[0]}"
    return f"{', '.join(names[:-1])} or {names[-1]}".replace("NoneType", "null").removeprefix(" or ")


def _number(value: Any) -> Any:
    try:
        return float(value)
    except OverflowError:  # an int with hundreds of digits
        return math.inf
    except ValueError:
        return value


def _nearest(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}."
    return f"{name!r}; {hint}"
