"""Rules: which parameters a pattern names, and ordered lists of such rules in files. Imports no torch.

    layer4                        a module with all in it, or one parameter
    features.[67]*                wildcards: * and ? match dots too, [67] matches one of these
    re:layer[34]\\..*\\.bn\\d        a regular expression for the whole name of a module or parameter
    features[3:8]                 the children 3 to 7 of a module, counted as in a Python slice; [:6] are the model's
    parameters[0:60]              the parameters 0 to 59, in the order of `model.named_parameters()`; [-2:] the last two
    head, all                     the last layer; everything

A plain pattern lets parameters train; `freeze:` before it freezes them. The first rule that names a parameter decides
about it, and a parameter that no rule names is frozen: `freeze:re:.*\\.bn\\d layer4 head`. The same in a file (YAML or
JSON):

    rules:
      - freeze: re:.*\\.bn\\d
      - train: [layer4, head]

Two other forms of files are read. In both, a parameter that the file does not name trains:

    ["conv1.weight", "layer1"]                  a list of what is frozen
    {"conv1.weight": 0, "fc.weight": 1}         0 or false: frozen; 1 or true: trains
"""

import fnmatch
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UsageError
from trainer.model import expressions
from trainer.storage import files

FREEZE = "freeze:"
_SLICE = re.compile(r"\[(-?\d*):(-?\d*)\]")
_BY_INDEX = re.compile(rf"parameters{_SLICE.pattern}")  # no module can be called `parameters`, as its method is
_MOST_BYTES = 1 << 20  # of a file of rules: the YAML parser takes minutes for some MB
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def named(
    pattern: str, names: Iterable[str], *, children: Mapping[str, Sequence[str]], head: Iterable[str] = ()
) -> list[str]:
    """Return those of `names` that a pattern (see above) means, in their order.

    Args:
        names: of parameters, or of all tensors.
        children: for each module of the model ("" is the model itself), the names of its children in their order.
        head: names of the head's modules.

    Raises:
        UsageError: a regular expression is wrong, or takes too long.
    """
    names = list(names)
    if found := _BY_INDEX.fullmatch(pattern):
        return names[_slice(found)]
    if pattern.startswith("re:"):
        meant = expressions.matching(pattern[3:], names)
        return [name for name in names if name in meant]
    patterns = {"head": list(head), "all": ["*"]}.get(pattern) or _without_slices(pattern, children)
    tests = [_test(part) for part in patterns]
    return [name for name in names if any(test(name) for test in tests)]


def _test(pattern: str) -> Callable[[str], bool]:
    """Whether a name, or that of a module around it, is meant."""
    if not set(pattern) & set("*?["):
        return lambda name: name == pattern or name.startswith(f"{pattern}.")
    whole = re.compile(fnmatch.translate(pattern))  # whose expressions take little time, whatever the pattern is
    return lambda name: any(whole.fullmatch(name, 0, end.start()) for end in re.finditer(r"\.|$", name))


def _slice(found: re.Match[str]) -> slice:
    return slice(*(int(bound) if bound.strip("-") else None for bound in found.groups()))


def _without_slices(pattern: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """`features[3:5].0` as `features.3.0` and `features.4.0`."""
    found = _SLICE.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    parents = [name for name in children if fnmatch.fnmatchcase(name, before)]
    parts = [f"{name}.{child}".lstrip(".") + after for name in parents for child in children[name][_slice(found)]]
    return [simple for part in parts for simple in _without_slices(part, children)]


def read(path: Path) -> tuple[str, ...]:
    """Read the rules in a file, in the form of the command line.

    Raises:
        UsageError: the file is unreadable, too large, or holds something else than rules; says where.
    """
    expected = "expected rules: with a list, names to freeze, or a name with 0 or 1 for each parameter"
    try:
        content = yaml.load(files.read_text(path, most=_MOST_BYTES), _LOADER)  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the freeze plan {path}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"the freeze plan {path} is not plain YAML or JSON: {error}") from None
    if isinstance(content, list) and content and all(isinstance(name, str) for name in content):
        content = {"rules": [{"freeze": content}, {"train": "all"}]}
    elif isinstance(content, dict) and content and all(value in (0, 1) for value in content.values()):
        content = _rules_of(content)
    if not content or content == {"rules": []} or content == {"rules": None}:
        raise UsageError(f"the freeze plan {path} is empty; {expected}.")
    listed = content.get("rules") if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.keys() != {"rules"} or not isinstance(listed, list):
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise UsageError(f"the freeze plan {path} holds {found}; {expected}.")
    rules: list[str] = []
    for place, rule in enumerate(listed, start=1):
        kind, patterns = next(iter(rule.items())) if isinstance(rule, dict) and len(rule) == 1 else (None, None)
        patterns = [patterns] if isinstance(patterns, str) else patterns
        # No name begins with a dash, but a flag does, and on the command line these would be some.
        fits = isinstance(patterns, list) and all(isinstance(p, str) and not p.startswith("-") for p in patterns)
        if kind not in ("train", "freeze") or not fits:
            shown = reprlib.repr(rule)[:200]  # short: YAML can name one list many times
            raise UsageError(f"rule {place} of {path} is {shown}; expected train: or freeze: with names or patterns.")
        rules += [FREEZE * (kind == "freeze") + pattern for pattern in patterns or ()]
    return tuple(rules)


def _rules_of(trains: dict[Any, int]) -> dict[str, list[dict[str, Any]]]:
    """Rules that say the same as names with 0 (frozen) or 1 (trains); each name must exist in the model."""
    frozen, others = ([name for name, value in trains.items() if value == wanted] for wanted in (0, 1))
    rules = [{"freeze": frozen}, {"train": others}, {"train": "all"}]
    return {"rules": [rule for rule in rules if [*rule.values()] != [[]]]}


def content(rules: Iterable[str]) -> dict[str, Any]:
    """Rules as they are in a file."""
    kinds = [("freeze" if rule.startswith(FREEZE) else "train", rule.removeprefix(FREEZE)) for rule in rules]
    listed: list[dict[str, Any]] = []
    for kind, pattern in kinds:
        if not listed or kind not in listed[-1]:
            listed.append({kind: []})
        listed[-1][kind].append(pattern)
    return {"rules": listed}


def write(path: Path, rules: Iterable[str]) -> None:
    """Write rules to a file: JSON if it is called .json, otherwise YAML.

    Raises:
        OSError: it cannot be written; it is then unchanged.
    """
    if path.suffix == ".json":
        files.write_json(path, content(rules))
    else:
        files.replace(path, yaml.safe_dump(content(rules), sort_keys=False).encode())
