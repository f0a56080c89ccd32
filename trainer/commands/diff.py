"""Compare two checkpoints, runs or files of weights by parameter: `python -m trainer inspect --diff A B`."""

import re
from typing import Any

from trainer.commands import loaded as loading
from trainer.commands.tensors import open_file
from trainer.commands.text import shape, table


def difference(a: str, b: str, pattern: re.Pattern[str]) -> dict[str, Any]:
    """Compare two files.

    Args:
        a, b: runs, checkpoints, exports or files of weights.
        pattern: found in the names of the tensors to compare.

    Returns:
        {"a", "b": paths, "tensors": [{"name", "shapes", "norm": 2-norm of a, "change": 2-norm of b - a}, ...],
        "frozen_differ": names, "settings": {name: [in a, in b]}}; tensors of two shapes, or in one file alone, have no
        norms.

    Raises:
        UsageError, CheckpointError, DataError: a file does not exist, or cannot be read.
    """
    paths = [loading.find(target) for target in (a, b)]
    (left, first), (right, second) = (open_file(path) for path in paths)
    report: dict[str, Any] = {"a": str(paths[0]), "b": str(paths[1]), "tensors": []}
    for name in (name for name in left | right if pattern.search(name)):
        row = {"name": name, "shapes": [list(side[name].shape) if name in side else None for side in (left, right)]}
        if row["shapes"][0] == row["shapes"][1]:
            here, there = left[name].double(), right[name].double()
            row |= {"norm": here.norm().item(), "change": (there - here).norm().item()}
        report["tensors"].append(row)
    frozen = [(state or {}).get("fingerprint", {}) for state in (first, second)]
    report["frozen_differ"] = sorted(n for n in frozen[0].keys() & frozen[1].keys() if frozen[0][n] != frozen[1][n])
    settings = [_settings(state or {}) for state in (first, second)]
    names = sorted(settings[0].keys() | settings[1].keys())
    pairs = {name: [values.get(name) for values in settings] for name in names}
    report["settings"] = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return report


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    found = {f"{group}.{name}": v for group, some in state.get("config", {}).items() for name, v in some.items()}
    return found | {name: state[name] for name in ("epoch", "step", "classes") if name in state}


def difference_text(report: dict[str, Any]) -> str:
    """The result of `difference` as text."""
    rows = [("|b - a|", "|a|", "share", " parameter")]
    for row in report["tensors"]:
        if "change" in row:
            share = f"{row['change'] / row['norm']:.2%}" if row["norm"] else ""
            rows.append((f"{row['change']:.4g}", f"{row['norm']:.4g}", share, f" {row['name']}"))
        else:
            shapes = ["none" if sizes is None else shape(sizes) for sizes in row["shapes"]]
            rows.append(("", "", " → ".join(shapes), f" {row['name']}"))
    changed = sum(row.get("change") != 0 for row in report["tensors"])
    lines = [f"a  {report['a']}", f"b  {report['b']}", "", *table(rows, ">>><"), ""]
    lines.append(f"{changed} of {len(report['tensors'])} tensors differ")
    if names := report["frozen_differ"]:
        lines.append(f"{len(names)} frozen tensors differ, such as {names[0]}")
    return "\n".join([*lines, *(f"{name}: {a} → {b}" for name, (a, b) in report["settings"].items())])
