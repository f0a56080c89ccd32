"""Choose and rename the tensors of a weights file, as the settings `--weights-*` say (`config.WeightsConfig`)."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from trainer.config import WeightsConfig
from trainer.errors import UsageError
from trainer.model import expressions, patterns
from trainer.model.freezing import children
from trainer.text import counted

# The names in checkpoints of version 0.1.
_FORMER = {"by": "weights_match", "but": "weights_except"} | {
    name: f"weights_{name}" for name in ("rename", "first", "only", "coverage")
}


def to_stored(config: WeightsConfig) -> dict[str, Any]:
    """The settings that differ from their defaults, without the place of the weights: "match" of `Classifier.base`."""
    default = WeightsConfig(config.weights)
    values = {name: value for name, value in asdict(config).items() if value != getattr(default, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_stored(values: Mapping[str, Any], *, weights: str) -> WeightsConfig:
    """The inverse of `to_stored`, for weights at another place; also takes the names of version 0.1."""
    settings: dict[str, Any] = {
        _FORMER.get(name, name): tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    settings["weights"] = weights
    return WeightsConfig(**settings)


def check_choice(config: WeightsConfig, file: Path) -> None:
    """Check the settings that choose tensors of a file.

    Raises:
        UsageError: names the setting, its value and what was expected.
    """
    if config.weights_match not in ("exact", "shape"):
        raise UsageError(f"--weights-match is {config.weights_match!r}; expected exact or shape.")
    if count := len(config.weights_rename) % 2 * len(config.weights_rename):
        raise UsageError(f"--weights-rename has {counted(count, 'name')}; expected pairs: OLD NEW, OLD NEW, ...")
    if config.weights_first is not None and file.suffix == ".safetensors":
        raise UsageError(f"--weights-first: {file} keeps its tensors by name, in no order; use --weights-only instead.")


def renamed(names: list[str], pairs: tuple[str, ...], file: Path) -> list[str]:
    """The names in a file after `--weights-rename`: the first OLD that fits a name is replaced by its NEW.

    Args:
        names: names in the file.
        pairs: OLD, NEW, OLD, NEW, ...: a beginning of names in whole parts ("encoder.body"; "" fits all names), or
            `re:EXPRESSION` and its replacement as in `re.sub`.
        file: for errors.

    Raises:
        UsageError: an OLD fits no name.
    """
    todo = list(zip(pairs[::2], pairs[1::2], strict=True))
    results = {old: _substituted(names, old, new) for old, new in reversed(todo)}
    used, result = set(), []
    for place, name in enumerate(names):
        old = next((old for old, _ in todo if results[old][place] is not None), None)
        used.add(old)
        result.append(name if old is None else results[old][place])
    for old, _ in todo:
        if old not in used:
            raise UsageError(f"--weights-rename {old!r} fits no name in {file}; there are {_tops(names)}.")
    return result


def _substituted(names: list[str], old: str, new: str) -> list[str | None]:
    """The names with `old` replaced by `new`; None for each name that does not have it."""
    if old.startswith("re:"):
        try:
            return expressions.substituted(old[3:], new, names)
        except UsageError as error:
            raise UsageError(f"--weights-rename {old!r} {new!r}: {error}") from None
    old, new = old.rstrip("."), new.rstrip(".")
    fits = [not old or f"{name}.".startswith(f"{old}.") for name in names]
    tails = [name[len(old) :].lstrip(".") for name in names]
    return [".".join(filter(None, (new, tail))) if fit else None for fit, tail in zip(fits, tails, strict=True)]


def chosen(names: list[str], config: WeightsConfig, model: nn.Module, head: str, file: Path) -> list[str]:
    """The names in a file that `--weights-first`, `--weights-only` and `--weights-except` choose.

    Args:
        names: names in the file, after `renamed`.
        config: the settings.
        model: counts the children for slices in patterns.
        head: name of the module that the pattern "head" stands for; "": none.
        file: for errors.

    Raises:
        UsageError: a pattern fits no name.
    """

    def matching(wanted: tuple[str, ...], flag: str) -> set[str]:
        found = set()
        for pattern in wanted:
            some = patterns.named(pattern, names, children=below, head=[head] if head else [])
            if not some:
                raise UsageError(f"{flag} {pattern!r} fits no name in {file}; there are {_tops(names)}.")
            found.update(some)
        return found

    below = children(model)
    only = matching(config.weights_only, "--weights-only") if config.weights_only else set(names)
    only -= matching(config.weights_except, "--weights-except")
    return [name for name in names[: config.weights_first] if name in only]


def _tops(names: list[str]) -> str:
    """The first parts of names, for errors."""
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return ", ".join(tops[:12]) + (", ..." if len(tops) > 12 else "")
