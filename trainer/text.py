"""Counts, sizes and lists in messages."""

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images", "1,000 classes"."""
    return f"{number:,} {noun}" + ("es" if noun.endswith("s") else "s") * (number != 1)


def short(value: float, unit: str = "") -> str:
    """Three digits and a prefix of 1000: 11.2M; with a unit, 2.05 kB."""
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    return f"{value:.3g}{' ' * bool(unit)}{prefixes[0]}{unit}"


def listed(names: Iterable[object], limit: int = 20) -> str:
    """The first names of a list, and how many there are in all if that is more."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:limit]) + (f", ... ({len(texts):,} in all)" if len(texts) > limit else "")
