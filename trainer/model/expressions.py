"""Regular expressions from a user, matched within a time limit. Imports only the standard library.

`re` has no time limit, and a short expression can take years (`(a+)+!` for a name of 40 letters). Therefore another
process does the matching, and is killed when its time is up.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from trainer.errors import UsageError
from trainer.text import counted

_SECONDS = 10.0


def matching(expression: str, names: Iterable[str]) -> list[str]:
    """The names that an expression matches as a whole, or of which it matches a parent: `a` or `a.b` of `a.b.c`.

    Raises:
        UsageError: not a regular expression, or one that takes too long.
    """
    names = list(names)
    return [name for name, found in zip(names, _run(expression, None, names), strict=True) if found]


def substituted(expression: str, replacement: str, names: Iterable[str]) -> list[str | None]:
    """The result of `re.sub` for each name; None where the expression is not found in the name.

    Raises:
        UsageError: not a regular expression or replacement, or one that takes too long.
    """
    return _run(expression, replacement, list(names))


def _run(expression: str, replacement: str | None, names: list[str]) -> list:
    """Run `_match.py`: one result for each name."""
    task = json.dumps([expression, replacement, names])
    try:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_match.py"))]
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"the regular expression {expression!r} takes more than {_SECONDS:g} s to match "
            f"{counted(len(names), 'name')}: simplify it, for example without a repetition inside of a repetition."
        ) from None
    if done.returncode:
        raise RuntimeError(f"matching {expression!r} failed with {done.returncode}: {done.stderr[-500:]}")
    result = json.loads(done.stdout)
    if isinstance(result, str):
        raise UsageError(f"{expression!r} is not a regular expression: {result}.")
    return result
