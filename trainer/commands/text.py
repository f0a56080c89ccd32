"""Numbers, shapes and tables as text."""

import shutil
from collections.abc import Iterable, Sequence


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters, without its middle if it is longer."""
    half = max(width - 1, 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half]}…{text[-half:] if half else ''}"


def columns() -> int:
    """Width of the terminal in characters; 80 without one."""
    return shutil.get_terminal_size().columns


def number(value: object) -> str:
    """Integers in full, other numbers with four decimals, anything else as it is."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def shape(sizes: Iterable[int]) -> str:
    """A shape such as 64×3×7×7."""
    return "×".join(map(str, sizes))


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Rows of cells as lines.

    Args:
        rows: the first usually has the titles.
        align: for each column < (left) or > (right).
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)] for row in rows)
    return [" ".join(row).rstrip() for row in cells]
