r"""The rules of `--train`: which parameters train and which are frozen. Imports no torch.

A rule is a pattern, which lets the parameters that it matches train, or `freeze:` and a pattern, which freezes them.
The first rule that matches a parameter decides; a parameter that no rule matches is frozen. So
`freeze:re:.*\.bn\d layer4 head` trains layer4 and the head, except for their BatchNorms. Patterns:

    layer4                        a module with everything in it, or one parameter
    features.[67]*                wildcards: * and ? also match dots, [67] matches one of these characters
    re:layer[34]\..*\.bn\d        a regular expression that matches the whole name of a module or parameter
    features[3:8]                 the children 3 to 7 of a module, as in a Python slice; [:6]: the first 6 of the model
    parameters[0:60]              the parameters 0 to 59, in the order of `model.named_parameters()`; [-2:]: the last 2
    head, all                     the last layer; everything

`--train @FILE` reads rules from a YAML or JSON file:

    rules:
      - freeze: re:.*\.bn\d
      - train: [layer4, head]

A file can also hold one of two short forms, in which a parameter that is not named trains:

    ["conv1.weight", "layer1"]                  a list of frozen modules and parameters
    {"conv1.weight": 0, "fc.weight": 1}         0 or false: frozen; 1 or true: trains
"""

import fnmatch
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UsageError
from trainer.model import expressions
from trainer.storage import files

FREEZE = "freeze:"
_SLICE = re.compile(r"\[(-?\d*):(-?\d*)\]")
_BY_INDEX = re.compile(rf"parameters{_SLICE.pattern}")  # never a module's name: every module has a method of this name
_MOST_BYTES = 1 << 20  # largest file of rules: the YAML parser takes minutes for a few MB
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def named(
    pattern: str, names: Iterable[str], *, children: Mapping[str, Sequence[str]], head: Iterable[str] = ()
) -> list[str]:
    """The names that a pattern matches, in their order.

    Args:
        pattern: see the top of this file, without `freeze:`.
        names: names of parameters, or of all tensors of a model or file.
        children: names of the children of each module, in their order, by the module's name; "" is the model itself.
        head: names of the modules that "head" stands for.

    Raises:
        UsageError: not a regular expression, or one that takes too long.
    """
    names = list(names)
    if found := _BY_INDEX.fullmatch(pattern):
        return names[_slice(found)]
    if pattern.startswith("re:"):
        return expressions.matching(pattern[3:], names)
    patterns = {"head": list(head), "all": ["*"]}.get(pattern) or _without_slices(pattern, children)
    tests = [_test(part) for part in patterns]
    return [name for name in names if any(test(name) for test in tests)]


def _test(pattern: str) -> Callable[[str], bool]:
    """A function that says whether a pattern without slices matches a name, or a module that contains it."""
    if not set(pattern) & set("*?["):
        return lambda name: name == pattern or name.startswith(f"{pattern}.")
    whole = re.compile(fnmatch.translate(pattern))  # fast for any pattern, unlike an expression from a user
    return lambda name: any(whole.fullmatch(name, 0, end.start()) for end in re.finditer(r"\.|$", name))


def _slice(found: re.Match[str]) -> slice:
    """The slice that `_SLICE` or `_BY_INDEX` has matched."""
    return slice(*(int(bound) if bound.strip("-") else None for bound in found.groups()))


def _without_slices(pattern: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """Replace slices by the names of the children: `features[3:5].0` → `features.3.0`, `features.4.0`."""
    found = _SLICE.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    parents = [name for name in children if fnmatch.fnmatchcase(name, before)]
    parts = [f"{name}.{child}".lstrip(".") + after for name in parents for child in children[name][_slice(found)]]
    return [simple for part in parts for simple in _without_slices(part, children)]


def read(path: Path) -> tuple[str, ...]:
    """Read the rules in a file, and return them as `--train` takes them.

    Raises:
        UsageError: the file cannot be read, is larger than 1 MiB, or holds something other than rules; says where.
    """
    expected = "expected rules: with a list, names to freeze, or a name with 0 or 1 for each parameter"
    try:
        found = yaml.load(files.read_text(path, most=_MOST_BYTES), _LOADER)  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the freeze plan {path}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"the freeze plan {path} is not plain YAML or JSON: {error}") from None
    entries: Any = None
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        entries = [{"freeze": found}, {"train": "all"}]
    elif isinstance(found, dict) and all(value in (0, 1) for value in found.values()):
        # Both lists are named, so that a name which the model does not have is an error.
        frozen, trained = ([name for name, value in found.items() if value == wanted] for wanted in (0, 1))
        entries = [
            *([{"freeze": frozen}] if frozen else []),
            *([{"train": trained}] if trained else []),
            {"train": "all"},
        ]
    elif isinstance(found, dict) and found.keys() == {"rules"}:
        entries = found["rules"] or []
    if not found or entries == []:
        raise UsageError(f"the freeze plan {path} is empty; {expected}.")
    if not isinstance(entries, list):
        holds = ", ".join(map(str, list(found)[:8])) if isinstance(found, dict) else type(found).__name__
        raise UsageError(f"the freeze plan {path} holds {holds}; {expected}.")
    rules: list[str] = []
    for place, entry in enumerate(entries, start=1):
        kind, patterns = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (None, None)
        patterns = [patterns] if isinstance(patterns, str) else patterns
        # No name begins with a dash, but a flag does, and these rules are put into a command line.
        fits = isinstance(patterns, list) and all(isinstance(p, str) and not p.startswith("-") for p in patterns)
        if kind not in ("train", "freeze") or not fits:
            shown = reprlib.repr(entry)[:200]  # short: YAML can name one list many times
            raise UsageError(f"rule {place} of {path} is {shown}; expected train: or freeze: with names or patterns.")
        rules += [FREEZE * (kind == "freeze") + pattern for pattern in patterns or ()]
    return tuple(rules)


def content(rules: Iterable[str]) -> dict[str, Any]:
    """The content of a file with these rules: neighbours of one kind share an entry."""

    def kind(rule: str) -> str:
        return "freeze" if rule.startswith(FREEZE) else "train"

    return {"rules": [{key: [rule.removeprefix(FREEZE) for rule in same]} for key, same in groupby(rules, key=kind)]}


def write(path: Path, rules: Iterable[str]) -> None:
    """Write rules to a file: JSON if its name ends in .json, otherwise YAML.

    Raises:
        OSError: the file cannot be written; it is then unchanged.
    """
    if path.suffix == ".json":
        files.write_json(path, content(rules))
    else:
        files.replace(path, yaml.safe_dump(content(rules), sort_keys=False).encode())
