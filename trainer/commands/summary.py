"""What `evaluate` prints: the numbers of its result that people read first."""

import math
from typing import Any

import numpy as np
import torch

from trainer.commands.text import columns, shorten, table
from trainer.text import counted

_MEANS = (("precision", "precision"), ("recall", "recall"), ("F1", "f1"))
_COUNTS = ("samples", "predicted")
_CLASSES, _PAIRS = 30, 5  # to print at most: the classes of the lowest F1, and the commonest mistakes


def summary(result: dict[str, Any], about: dict[str, Any], *, note: str, fits: bool) -> str:
    """The result of `evaluate` as text.

    Args:
        result: see `evaluate`.
        about: the checkpoint.
        note: about the images; "" for none.
        fits: whether the precision of the training was used.
    """
    scores = result.get("scores", {})
    lines = [f"{result['checkpoint']}: epoch {result['epoch']}, step {result['step']}"]
    lines += [f"{result['data']}: {counted(result['samples'], 'image')}"]
    lines += [f"note    {note}"] * bool(note)
    if "low_95" in scores:
        lines.append(f"\naccuracy           {_share(scores['accuracy'])}  ({_interval(scores)}, 95 % Wilson interval)")
        lines += [f"top-5 accuracy     {_share(scores['top_5'])}"] if "top_5" in scores else []
        lines.append(f"balanced accuracy  {_share(scores['balanced_accuracy'])}")
        for kind in ("macro", "weighted"):
            mean = scores[kind]
            parts = ", ".join(f"{name} {mean[key]:.4f}" for name, key in _MEANS)
            lines.append(f"{kind:<18} {parts}")
        lines.append(f"NLL {scores['nll']:.4f}, ECE {scores['ece']:.4f} (15 bins), Brier {scores['brier']:.4f}")
    elif scores:
        lines += ["", ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())]
    if above := result.get("above_threshold"):
        right = f", {_share(above['accuracy'])} of them correct" if above["images"] else ""
        lines.append(f"from {above['threshold']:g} on: {above['images']:,} images, {_share(above['coverage'])}{right}")
    lines += ["", *_class_table(result)] if result["classes"] else []
    if "confusion" in result:
        confusion = np.array(result["confusion"])
        np.fill_diagonal(confusion, 0)
        pairs = [divmod(int(at), len(confusion)) for at in np.argsort(-confusion, axis=None, kind="stable")[:_PAIRS]]
        names = list(result["classes"])
        worst = [f"{names[a]} → {names[b]} {confusion[a, b]:,}" for a, b in pairs if confusion[a, b]]
        lines += ["", f"commonest mistakes: {', '.join(worst)}"] if worst else []
    if "compare" in result:
        lines += ["", *_comparison(result["compare"], result["samples"])]
    metrics = result["all"]
    lines += ["", "all     " + ", ".join(f"{name} {metrics[name]!r}" for name in sorted(metrics))]
    # In mid-epoch a checkpoint's metrics are those of the epoch before.
    trained = about["metrics"].get("val") if result["own_validation_images"] and not about["totals"] else None
    if trained == metrics:
        lines.append("        the same as in training, to the last digit")
    elif trained:
        lines.append("trained " + ", ".join(f"{name} {trained[name]!r}" for name in sorted(trained)))
        here = "cuda" if torch.cuda.is_available() else "cpu"
        why = "another precision (fp16 needs a GPU)" if not fits else f"trained on {about['compute']['device']}"
        lines.append(f"        differs: {why}, evaluated on {here}; other threads or versions change digits too")
    return "\n".join(lines)


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _interval(scores: dict[str, Any]) -> str:
    return f"{100 * scores['low_95']:.2f} to {_share(scores['high_95'])}"


def _class_table(result: dict[str, Any]) -> list[str]:
    """The classes of the lowest F1, in their order; all if they are not many."""
    classes = result["classes"]
    numbers = dict.fromkeys(name for values in classes.values() for name in values if name not in _COUNTS)
    names = set(sorted(classes, key=lambda name: classes[name].get("f1", 0.0))[:_CLASSES])
    width = max(columns() - 9 - 12 * len(numbers), 16)
    rows = [("class", "  images", *(f"{name.replace('_', ' '):>11}" for name in numbers))]
    for name in (name for name in classes if name in names):
        values = (classes[name].get(key) for key in numbers)
        cells = ("–" if value is None or math.isnan(value) else f"{value:.4f}" for value in values)
        rows.append((shorten(name, width), f"{classes[name]['samples']:,}", *cells))
    more = [f"the lowest of {len(classes):,} classes; --json has all"] * (len(classes) > len(names))
    return [*table(rows, "<" + ">" * (len(rows[0]) - 1)), *more]


def _comparison(found: dict[str, Any], samples: int) -> list[str]:
    seen = found["seen_in_training"]
    right, wrong = found["only_compared_right"], found["only_run_right"]
    accuracies = f"accuracy {_share(found['compared_accuracy'])}, against {_share(found['accuracy'])}"
    lines = [f"{found['checkpoint']}: {accuracies}"]
    p = f"McNemar's exact test: p = {found['mcnemar_p']:.3g}"
    lines.append(f"{right:,} of {samples:,} images became right, {wrong:,} wrong; {p}")
    if seen:
        lines.append(f"note    it was trained on {seen:,} of these images; the comparison favours it")
    elif seen is None:
        lines.append("note    it is not known whether it was trained on some of these images")
    return lines
