"""Print the sizes that this project keeps small, and fail where one has grown over its limit.

    python .ci/budgets.py

Lines of code do not count docstrings, comments and blank lines. The limits are ratchets: lower one when its size falls;
raise one only with a reason in the message of the commit.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "train.py, all lines": 105,
    "README.md, all lines": 200,
    "trainer/ without commands/, lines of code": 8_500,
    "trainer/commands/, lines of code": 1_850,
    "flags of train.py": 53,
    "public names": 40,
}
FILE_LIMIT = 270  # lines of code of one file
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(path: Path) -> int:
    """Lines of a Python file that are neither docstring nor comment nor blank."""
    text, words, lines = path.read_text(encoding="utf-8"), set(), set()
    for node in ast.walk(ast.parse(text)):
        # A string that is a statement: a docstring of a module, a class, a function or a field.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            words |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - words)


def sizes() -> Iterator[tuple[str, int, int]]:
    """What is measured, its size, its limit; of the files, the largest one and all that are too large."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from trainer.cli import flags  # after the line that finds it, where the package is not installed

    files = {path.relative_to(ROOT).as_posix(): lines_of_code(path) for path in (ROOT / "trainer").rglob("*.py")}
    commands = sum(size for path, size in files.items() if path.startswith("trainer/commands/"))
    stub = ast.parse((ROOT / "trainer" / "__init__.pyi").read_text(encoding="utf-8"))
    found = {
        "train.py, all lines": len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()),
        "README.md, all lines": len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()),
        "trainer/ without commands/, lines of code": sum(files.values()) - commands,
        "trainer/commands/, lines of code": commands,
        "flags of train.py": len(flags()),
        "public names": sum(len(node.names) for node in stub.body if isinstance(node, ast.ImportFrom)),
    }
    for name, limit in LIMITS.items():
        yield name, found[name], limit
    largest = sorted(files, key=files.__getitem__, reverse=True)
    for path in [path for path in largest if files[path] > FILE_LIMIT] or largest[:1]:
        yield f"{path}, lines of code", files[path], FILE_LIMIT


if __name__ == "__main__":
    over = 0
    for name, size, limit in sizes():
        over += size > limit
        print(f"{size:6,} of {limit:6,}  {name}{'  TOO LARGE' * (size > limit)}")
    raise SystemExit(1 if over else 0)
