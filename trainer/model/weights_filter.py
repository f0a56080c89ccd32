"""Which tensors of a weights file are taken, and what they are called in the model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from trainer.errors import UsageError
from trainer.model import expressions
from trainer.model import patterns as patterns
from trainer.model.freezing import children

_SHORT = {"by": "weights_match", "but": "weights_except"} | {
    name: f"weights_{name}" for name in ("rename", "first", "only", "coverage")
}


@dataclass(frozen=True)
class WeightsFilter:
    """Which tensors of a file are taken, and where they go. By default the file is the whole model.

    weights_match: "exact": every chosen tensor has a place of its shape in the model, and every place outside the head
        has its tensor in the file, or it is an error. "shape": tensors that have a place of their shape are taken.
    weights_rename: OLD, NEW, OLD, NEW, ...: beginnings of names, in whole parts ("encoder.body"; "" is the empty one),
        or `re:EXPRESSION` and its replacement in `re.sub`. The first OLD that fits a name is used.
    weights_first: choose among the first so many entries of the file.
    weights_only, weights_except: choose the names that one of the first patterns means (see `patterns`), and none of
        the second.
    weights_coverage: least share of the parameters outside the head that must come from the file, 0 to 1.

    Raises UsageError for impossible values.
    """

    weights_match: str = "exact"
    weights_rename: tuple[str, ...] = ()
    weights_first: int | None = None
    weights_only: tuple[str, ...] = ()
    weights_except: tuple[str, ...] = ()
    weights_coverage: float = 0.9

    def __post_init__(self) -> None:
        if self.weights_match not in ("exact", "shape"):
            raise UsageError(f"--weights-match is {self.weights_match!r}; expected exact or shape.")
        if len(self.weights_rename) % 2:
            raise UsageError(
                f"--weights-rename has {len(self.weights_rename)} names; expected pairs: OLD NEW, OLD NEW, ..."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, in plain types; `from_dict` takes it back."""
        values = {name: value for name, value in asdict(self).items() if value != getattr(WeightsFilter, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "WeightsFilter":
        """The inverse of `to_dict`; also takes the shorter names in older checkpoints."""
        named = {_SHORT.get(name, name): value for name, value in values.items()}
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in named.items()}
        return cls(**fields)

    @classmethod
    def of(cls, settings: Any) -> "WeightsFilter":
        """The same fields of any object that has them, such as a group of settings."""
        return cls(**{f.name: _frozen(getattr(settings, f.name)) for f in fields(cls)})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def renamed(names: list[str], pairs: tuple[str, ...], file: Path) -> list[str]:
    """The names after `WeightsFilter.weights_rename`.

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
    """The names with `new` for `old`; None for those that have no `old`."""
    if old.startswith("re:"):
        try:
            return expressions.substituted(old[3:], new, names)
        except UsageError as error:
            raise UsageError(f"--weights-rename {old!r} {new!r}: {error}") from None
    old, new = old.rstrip("."), new.rstrip(".")
    fits = [not old or f"{name}.".startswith(f"{old}.") for name in names]
    tails = [name[len(old) :].lstrip(".") for name in names]
    return [".".join(filter(None, (new, tail))) if fit else None for fit, tail in zip(fits, tails, strict=True)]


def chosen(names: list[str], match: WeightsFilter, model: nn.Module, head: str, file: Path) -> list[str]:
    """Those of the file's names that a filter chooses. Raises UsageError for a pattern that fits none."""

    def meant(wanted: tuple[str, ...], flag: str) -> set[str]:
        found = set()
        for pattern in wanted:
            some = patterns.named(pattern, names, children=below, head=filter(None, [head]))
            if not some:
                raise UsageError(f"{flag} {pattern!r} fits no name in {file}; there are {_tops(names)}.")
            found.update(some)
        return found

    below = children(model)
    only, omitted = meant(match.weights_only, "--weights-only"), meant(match.weights_except, "--weights-except")
    some = [name for name in names[: match.weights_first] if name not in omitted]
    return [name for name in some if name in only or not match.weights_only]


def _tops(names: list[str]) -> str:
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return ", ".join(tops[:12]) + (", ..." if len(tops) > 12 else "")
