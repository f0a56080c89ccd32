"""Find a head: what the features are worth without training, then a grid of heads on held-out folds.

Selection looks at the training set alone; the validation set stays unseen, so that its accuracy remains an honest
number. The rule: the highest held-out accuracy, averaged over neighbouring rates; of equal ones the lowest NLL. The
highest accuracy of a hundred settings is to a good part luck, and neighbours do not share luck. On nine splits of 360
photos the rule lost 1.1 points to the best of the grid, seen on the test part; the lowest NLL lost 8, since a confident
head may be wrong more loudly and still more often right.

The same call on the same machine returns the same bits: a search that was killed is simply run again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import DataError, UsageError
from trainer.heads.grid import Course, HeadSetting, Trained, fold_of, train_heads
from trainer.heads.knn import knn_accuracy
from trainer.heads.ridge import ridge
from trainer.heads.stack import Inputs, without_dropout
from trainer.text import counted

_MOST = 10_000  # samples of ridge regression and nearest neighbours: they are for orientation

Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What a search has found. Accuracies are shares of the training samples, each judged by a head without it.

    Attributes:
        setting: the chosen one.
        accuracy: of its heads. nll: theirs, in nats. error: its standard error.
        worst, median, best: accuracies over the grid; a setting that diverged counts.
        diverged: settings whose NLL is not finite.
        ridge: leave-one-out accuracy of ridge regression, on at most 10,000 of the samples. knn: that of the best k.
        samples: N. folds: K.
        table: one row a setting, in plain types: those of HeadSetting, "accuracy" and "nll" (None if not finite).
    """

    setting: HeadSetting
    accuracy: float
    nll: float
    error: float
    worst: float
    median: float
    best: float
    diverged: int
    ridge: float
    knn: float
    samples: int
    folds: int
    table: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """In plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        chosen = self.setting
        parts = [f"lr {chosen.lr:.3g}", f"weight decay {chosen.weight_decay:.3g}", counted(chosen.epochs, "epoch")]
        parts += [f"label smoothing {chosen.label_smoothing:g}"] * (chosen.label_smoothing > 0)
        return (
            f"{', '.join(parts)}: {self.accuracy:.1%} of held-out samples right ("
            f"{counted(len(self.table), 'setting')} in {self.folds} folds: {self.worst:.1%} to "
            f"{self.best:.1%}, median {self.median:.1%}; ridge {self.ridge:.1%}, nearest neighbours {self.knn:.1%})"
        )


def search_head(
    inputs: Tensor | Inputs,
    labels: Tensor,
    tail: nn.Module,
    course: Course,
    *,
    classes: int,
    settings: Sequence[HeadSetting],
    folds: int = 5,
    seed: int = 0,
    dropout: bool = True,
    memory: float = 2.0,
    rank: int = 0,
    ranks: int = 1,
    merge: Callable[[list[Row]], list[list[Row]]] = lambda rows: [rows],
) -> Choice:
    """Train a grid of heads on folds of the training set, and choose one setting.

    Args:
        inputs, labels, tail, course, memory: see `grid.train_heads`.
        classes: C.
        settings: to compare, such as `grid.default_settings` of the first input.
        folds: K, 2 at least; not more than there are samples.
        seed: of the folds.
        dropout: False: train without the tail's. On maps its random numbers cost more than the heads.
        rank, ranks: this process and their number; each trains every ranks-th setting.
        merge: the rows of all processes, by rank, from those of this one: a collective. The default is for one process.

    Raises:
        UsageError: too few folds, or no settings.
        DataError: fewer than two samples, features that are not finite, or a grid that diverged as a whole.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    if folds < 2:
        raise UsageError(f"folds is {folds}: expected at least 2.")
    if not settings:
        raise UsageError("there are no settings to compare; expected at least one.")
    tail = tail if dropout else without_dropout(tail)
    every = math.ceil(len(labels) / _MOST)
    read, own = pooled(inputs, len(labels))[::every], labels[::every]
    linear = ridge(read, own, classes=classes)
    near = knn_accuracy(read, own)
    parts = fold_of(labels, folds, seed=seed)
    mine = [*enumerate(settings)][rank::ranks]
    options = {"tail": tail, "course": course, "folds": parts, "memory": memory}
    heads = train_heads(inputs, labels, [setting for _, setting in mine], **options) if mine else []
    rows = [_row(place, trained) for (place, _), trained in zip(mine, heads, strict=True)]
    table = sorted((row for some in merge(rows) for row in some), key=lambda row: row["place"])
    chosen = choose(table)
    accuracies = [row["accuracy"] for row in table]
    return Choice(
        setting=settings[table[chosen]["place"]],
        accuracy=accuracies[chosen],
        nll=table[chosen]["nll"],
        error=math.sqrt(accuracies[chosen] * (1 - accuracies[chosen]) / len(labels)),
        worst=min(accuracies),
        median=median(accuracies),
        best=max(accuracies),
        diverged=sum(row["nll"] is None for row in table),
        ridge=float(linear.accuracy[linear.best]),
        knn=max(near.values()),
        samples=len(labels),
        folds=int(parts.max()) + 1,
        table=[{name: value for name, value in row.items() if name != "place"} for row in table],
    )


def choose(table: Sequence[Row]) -> int:
    """The place of the row to take; see the top of this file.

    Args:
        table: rows with "lr", "weight_decay", "epochs", "accuracy" and "nll".

    Raises:
        DataError: no NLL is finite.
    """
    finite = [place for place, row in enumerate(table) if row["nll"] is not None]
    if not finite:
        raise DataError(
            f"all {len(table)} heads of the search diverged. Look for extreme values in the features, or give an --lr."
        )

    def smooth(place: int) -> float:
        row = table[place]
        same = [r for r in table if (r["weight_decay"], r["epochs"]) == (row["weight_decay"], row["epochs"])]
        same.sort(key=lambda r: r["lr"])
        middle = [r["lr"] for r in same].index(row["lr"])
        around = [r["accuracy"] for r in same[max(middle - 1, 0) : middle + 2]]
        return (same[middle]["accuracy"] + sum(around)) / (1 + len(around))

    return max(finite, key=lambda place: (smooth(place), -table[place]["nll"]))


def pooled(inputs: Inputs, samples: int) -> Tensor:
    """The first view as `[N, D]`: the mean over the positions of a map, several inputs side by side."""
    rows = [tensor[:samples] for tensor in inputs]
    return torch.cat([tensor.flatten(2).mean(dim=2) if tensor.ndim > 2 else tensor for tensor in rows], dim=1)


def _row(place: int, trained: Trained) -> Row:
    nll = trained.loss if math.isfinite(trained.loss) else None
    return {"place": place, **asdict(trained.setting), "accuracy": trained.accuracy, "nll": nll}
