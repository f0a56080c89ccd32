"""Rules: which parameters a pattern names, and ordered lists of such rules in files. Imports no torch.

    layer4                        a module with all in it, or one parameter
    features.[67]*                wildcards: * and ? take dots too, [67] one of these
    re:layer[34]\\..*\\.bn\\d        a regular expression that takes the whole name of a module or parameter
    features[3:8]                 the children 3 to 7 of a module, counted as in a Python slice; [:6] are the model's
    head, all                     the last layer; everything

Such a pattern lets what it names train; `freeze:` before it freezes it. The first rule that names a parameter decides
about it, and what none names is frozen: `freeze:re:.*\\.bn\\d layer4 head`. The same in a file (YAML or JSON):

    rules:
      - freeze: re:.*\\.bn\\d
      - train: [layer4, head]

A file that holds nothing but a list names what is frozen; the rest trains.
"""

import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UsageError

FREEZE = "freeze:"
_SLICE = re.compile(r"\[(-?\d*):(-?\d*)\]")


def named(
    pattern: str, names: Iterable[str], *, children: Mapping[str, Sequence[str]], head: Iterable[str] = ()
) -> list[str]:
    """Those of `names` that a pattern (see above) means, in their order.

    Args:
        names: of parameters, or of all tensors.
        children: for each module of the model, "" is itself, the names of its children in their order.
        head: names of the head's modules.

    Raises:
        UsageError: a regular expression that is none.
    """
    patterns = {"head": list(head), "all": ["*"]}.get(pattern) or _without_slices(pattern, children)
    tests = [_test(part) for part in patterns]
    return [name for name in names if any(test(name) for test in tests)]


def _test(pattern: str) -> Callable[[str], bool]:
    """Whether a name, or that of a module around it, is meant."""
    if not pattern.startswith("re:") and not set(pattern) & set("*?["):
        return lambda name: name == pattern or name.startswith(f"{pattern}.")
    try:
        whole = re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}.") from None
    return lambda name: any(whole.fullmatch(name, 0, end.start()) for end in re.finditer(r"\.|$", name))


def _without_slices(pattern: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """`features[3:5].0` as `features.3.0` and `features.4.0`."""
    found = None if pattern.startswith("re:") else _SLICE.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    wanted = slice(*(int(bound) if bound.strip("-") else None for bound in found.groups()))
    parents = [name for name in children if fnmatch.fnmatchcase(name, before)]
    parts = [f"{name}.{child}".lstrip(".") + after for name in parents for child in children[name][wanted]]
    return [simple for part in parts for simple in _without_slices(part, children)]


def read(path: Path) -> tuple[str, ...]:
    """The rules in a file, as they would be said on the command line.

    Raises:
        UsageError: unreadable, or something else than rules; says where.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the freeze plan {path}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"the freeze plan {path} is not plain YAML or JSON: {error}") from None
    if not content or (isinstance(content, dict) and not any(content.values())):
        raise UsageError(f"the freeze plan {path} is empty; expected rules: with a list, or names to freeze.")
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        content = {"rules": [{"freeze": content}, {"train": "all"}]}
    if not isinstance(content, dict) or content.keys() != {"rules"} or not isinstance(content["rules"], list):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UsageError(f"the freeze plan {path} holds {found}; expected rules: with a list, or names to freeze.")
    rules: list[str] = []
    for place, rule in enumerate(content["rules"], start=1):
        kind, patterns = next(iter(rule.items())) if isinstance(rule, dict) and len(rule) == 1 else (None, None)
        patterns = [patterns] if isinstance(patterns, str) else patterns
        # No name begins with a dash, but a flag does, and on the command line these would be some.
        fits = isinstance(patterns, list) and all(isinstance(p, str) and not p.startswith("-") for p in patterns)
        if kind not in ("train", "freeze") or not fits:
            raise UsageError(f"rule {place} of {path} is {rule!r}; expected train: or freeze: with names or patterns.")
        rules += [FREEZE * (kind == "freeze") + pattern for pattern in patterns]
    return tuple(rules)


def write(path: Path, rules: Iterable[str]) -> None:
    """Write rules to a file: JSON if it is called .json, otherwise YAML.

    Raises:
        OSError: it cannot be written; there is then no half of it.
    """
    kinds = [("freeze" if rule.startswith(FREEZE) else "train", rule.removeprefix(FREEZE)) for rule in rules]
    listed: list[dict[str, Any]] = []
    for kind, pattern in kinds:
        if not listed or kind not in listed[-1]:
            listed.append({kind: []})
        listed[-1][kind].append(pattern)
    content = {"rules": listed}
    text = json.dumps(content, indent=1) if path.suffix == ".json" else yaml.safe_dump(content, sort_keys=False)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
