"""Match names with a regular expression, in a process of its own: the script that `expressions` runs.

Reads JSON from stdin: [expression, replacement or null, [name, ...]]. Writes JSON to stdout, one result for each name:
without a replacement, whether the expression matches the name or a parent of it (`a` or `a.b` of `a.b.c`); with one,
the name after the substitution, or null if the expression is not found in it. A wrong expression: the error, as text.
"""

import json
import re
import sys


def main() -> None:
    expression, replacement, names = json.load(sys.stdin)
    try:
        compiled = re.compile(expression)
        if replacement is None:
            result = [any(compiled.fullmatch(n, 0, end.start()) for end in re.finditer(r"\.|$", n)) for n in names]
        else:
            pairs = (compiled.subn(replacement, name) for name in names)
            result = [changed if count else None for changed, count in pairs]
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        result = str(error)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
