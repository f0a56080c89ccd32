"""The confusion matrix as a drawing, of ten classes or of a thousand."""

import json

import numpy as np

from trainer.report.charts import svg
from trainer.report.shell import text

_NAMED_AT_MOST = 40  # classes that can be read beside a row
_COUNTED_AT_MOST = 20  # classes with numbers in their cells
_PART = 30  # classes of the commonest mistakes, shown with their names where there are too many for all
_CELLS = 40_000  # to draw at most
_LEVELS = 6  # of opacity


def order(confusion: np.ndarray) -> np.ndarray:
    """An order of classes in which those confused with each other are neighbours, from counts `[C, C]`.

    Pairs are taken by the share of their images that is confused, the worst first, and joined into chains at their ends
    (the greedy path of a travelling salesman). Classes that are never confused keep their order, at the end.

    Returns:
        `[C]`, the indices of the classes.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    both = np.triu(shares + shares.T, 1)
    rows, columns = np.nonzero(both)
    chain_of = {index: [index] for index in range(len(confusion))}
    for at in np.argsort(-both[rows, columns], kind="stable"):
        a, b = int(rows[at]), int(columns[at])
        one, other = chain_of[a], chain_of[b]
        if one is other or a not in (one[0], one[-1]) or b not in (other[0], other[-1]):
            continue
        joined = (one if one[-1] == a else one[::-1]) + (other if other[0] == b else other[::-1])
        chain_of |= dict.fromkeys(joined, joined)
    chains = {id(chain): chain for chain in chain_of.values()}.values()
    return np.array([index for chain in sorted(chains, key=lambda chain: len(chain) == 1) for index in chain])


def worst_pairs(confusion: np.ndarray, *, most: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the commonest mistakes, the commonest first."""
    wrong = confusion - np.diag(confusion.diagonal())
    ordered = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(at) // len(wrong), int(at) % len(wrong), int(wrong.flat[at])) for at in ordered]
    return [pair for pair in pairs if pair[2]]


def matrices(confusion: np.ndarray, classes: list[str]) -> list[tuple[str, str]]:
    """Drawings with their captions: of all classes, and if those are many of the most confused ones, with names."""
    ordered = order(confusion)
    if len(ordered) <= _NAMED_AT_MOST:
        return [(named(confusion, classes, ordered), "Rows are true classes, columns are predicted ones.")]
    mistaken = [index for *pair, _ in worst_pairs(confusion, most=_NAMED_AT_MOST) for index in pair]
    chosen = set(list(dict.fromkeys([*mistaken, *ordered.tolist()]))[:_PART])
    part = np.array([index for index in ordered if index in chosen])
    every = f"All {len(ordered):,} classes: rows are true, columns predicted. Point at a place to see which."
    return [
        (overview(confusion, classes, ordered), every),
        (named(confusion, classes, part), f"The {len(part)} classes of the commonest mistakes."),
    ]


def named(confusion: np.ndarray, classes: list[str], chosen: np.ndarray) -> str:
    """The matrix `[C, C]` of the chosen classes, with their names; small ones with numbers."""
    count, cell = len(chosen), 32 if len(chosen) <= _COUNTED_AT_MOST else 16
    names = [classes[index] for index in chosen]
    margin = 12 + 6.2 * min(18, max(map(len, names)))
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)  # of the images of the true class
    parts = []
    for row, true in enumerate(chosen):
        middle, label = margin + cell * (row + 0.5) + 4, text(names[row], limit=18)
        parts.append(f'<text class="end" x="{margin - 6:g}" y="{middle:g}">{label}</text>')
        parts.append(f'<text transform="translate({middle:g} {margin - 6:g}) rotate(-90)">{label}</text>')
        for column, guess in enumerate(chosen):
            images, x, y = int(confusion[true, guess]), margin + cell * column, margin + cell * row
            where = f'x="{x:g}" y="{y:g}" width="{cell - 1}" height="{cell - 1}" rx="2"'
            if not images:
                parts.append(f'<rect class="cell" opacity=".05" {where}/>')
                continue
            opacity = 0.12 + 0.88 * shares[true, guess] ** 0.6
            tip = text(f"{names[row]} → {names[column]}: {images:,} of {int(confusion[true].sum()):,}")
            colour = "f0" if true == guess else "fc"
            parts.append(f'<rect class="{colour}" opacity="{opacity:.2f}" {where} data-tip="{tip}"/>')
            if count <= _COUNTED_AT_MOST:
                ink, x, y = " on" if opacity > 0.6 else "", x + (cell - 1) / 2, y + cell / 2 + 3.5
                parts.append(f'<text class="middle{ink}" x="{x:g}" y="{y:g}">{images}</text>')
    size = margin + cell * count + 4
    title = f"Confusion matrix of {count} classes. The table below lists the commonest mistakes."
    style = f'style="width: {size:.0f}px; max-width: none"'
    return f'<div class="wide">{svg(size, size, title, chr(10).join(parts), rest=style)}</div>'


def overview(confusion: np.ndarray, classes: list[str], ordered: np.ndarray) -> str:
    """The whole matrix `[C, C]` without names: a mark for each cell that is not empty."""
    count = len(ordered)
    sorted_counts = confusion[np.ix_(ordered, ordered)]
    shares = sorted_counts / np.maximum(sorted_counts.sum(1, keepdims=True), 1)
    rows, columns = np.nonzero(sorted_counts)
    largest = np.argsort(-shares[rows, columns], kind="stable")[:_CELLS]
    rows, columns = rows[largest], columns[largest]
    levels = np.clip(np.ceil(shares[rows, columns] ** 0.6 * _LEVELS), 1, _LEVELS)
    size = max(1.0, count / 160)  # a mark that can be seen at the width of a page
    parts = [f'<rect class="cell" opacity=".05" width="{count}" height="{count}"/>']
    parts.append(f'<g transform="translate(.5 .5)" stroke-width="{size:g}" stroke-linecap="square">')
    for level in range(1, _LEVELS + 1):
        for colour, diagonal in (("m0", True), ("mc", False)):
            here = (levels == level) & ((rows == columns) == diagonal)
            marks = "".join(
                f"M{column} {row}h.01"  # as good as a point, with square ends: half as long as a square
                for row, column in zip(rows[here], columns[here], strict=True)
            )
            opacity = 0.3 + 0.7 * level / _LEVELS
            parts.append(f'<path class="{colour}" opacity="{opacity:.2f}" d="{marks}"/>' if marks else "")
    names = text(json.dumps([classes[index][:40] for index in ordered], ensure_ascii=False), limit=10**9)
    title = f"Confusion matrix of {count:,} classes. The table below lists the commonest mistakes."
    return svg(count, count, title, "\n".join([*parts, "</g>"]), rest=f'data-names="{names}" style="width: 640px"')
