"""Match an expression with names: the script that `expressions` runs. Reads JSON from stdin, writes JSON to stdout.

In: [expression, replacement or null, [name, ...]]. Out: for each name whether it matches, or its substitute or null; a
text if the expression is wrong.
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
