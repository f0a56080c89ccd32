"""All that is found in the data: rows of a table, and a few lines for people, the most important first."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.audit.classes import alike, same_names, too_few
from trainer.audit.duplicates import duplicates, first_of
from trainer.audit.labels import LeftOut, held_out_hits
from trainer.audit.neighbours import Neighbours
from trainer.audit.outliers import outliers
from trainer.audit.prints import Print
from trainer.audit.shapes import cut_away
from trainer.errors import DataError
from trainer.report import Finding
from trainer.text import counted

# Each finding, the most important first: what it says of so many, and what to do.
_WORDS = {
    "leak": (
        "of validation in training as well, or nearly",
        "Compare and exclude them: what was learned by heart says nothing about new images.",
    ),
    "unreadable": ("cannot be read", "Repair or remove them, or train with --bad-images skip."),
    "class names": ("pairs of class names differ only in case or spacing", "Rename the folders if they mean the same."),
    "label": ("likely under a wrong label", "Look at each: exclude it, or move it to the right folder yourself."),
    "duplicate": ("twice in one part, or nearly", "Compare and exclude them, above all where labels differ."),
    "outlier": ("unlike all others", "Look whether they belong here."),
    "classes alike": (
        "pairs of classes that the features cannot tell apart",
        "Merge them, or train more than the head.",
    ),
    "few images": ("classes with fewer than 10 training images", "Add images: such classes are learned badly."),
    "crop": ("of which the crop cuts away more than half", "Cut them yourself to the part that matters."),
}
_WORST = 5  # of a kind, in the summary


@dataclass
class Row:
    """One finding.

    Attributes:
        path: of the image, below the data folder; "" of a finding about classes.
        finding: its kind.
        score: how much: of a leak or duplicate the similarity, 1 if exact; of a label its margin; of an outlier its
            z-score; of classes alike the share that is confused; of few images their number; of a crop the share seen.
        given: the label, or the class.
        suggested: the label that it should have; the other class.
        other: the image that it is a copy of; why it cannot be read.
        exclude: anything but spaces excludes the image: for people.
    """

    path: str
    finding: str
    score: float
    given: str = ""
    suggested: str = ""
    other: str = ""
    exclude: str = ""


class Effect(NamedTuple):
    """Accuracy of a ridge head of the training images: on all validation images, and on those not in training; and
    on all images, each when it is left out. NaN of no image."""

    all: float
    without_leaks: float
    left_out: float


def examine(
    features: Tensor,
    labels: Tensor,
    prints: Sequence[Print],
    names: Sequence[str],
    *,
    train: int,
    classes: Sequence[str],
    transform: Callable[[Tensor], Tensor],
    like: Tensor,
    most: float = 255.0,
) -> tuple[list[Row], Effect]:
    """Everything that can be found in N images that can be read, those of training first.

    Args:
        features: `[N, D]`, of a frozen trunk.
        labels: int64 `[N]`. names: of the images.
        prints: of the images.
        train: how many of them are of training.
        classes: names of the labels.
        transform: of evaluation. like: an image as decoded. most: the value of a pixel that counts as 1.

    Raises:
        DataError: there are fewer than three images, or a feature is not finite.
    """
    if len(names) < 3 or train < 2:
        raise DataError(f"{train} training and {len(names) - train} validation images: an audit needs some more.")
    first = first_of(prints)
    kept = [image for image, of in enumerate(first) if image == of]
    if len(kept) < 2:
        raise DataError("all images are the same, pixel for pixel.")
    unique = features[torch.tensor(kept, device=features.device)]
    near = Neighbours.of(unique)
    given: list[str] = [classes[int(label)] for label in labels]
    rows, leaks = list[Row](), torch.zeros(len(names), dtype=torch.bool)
    for image, of, exact, similarity in duplicates(prints, near, kept, train=train):
        leaks[image] = leak = of < train <= image
        other = "" if given[image] == given[of] else given[of]
        # The third decimal: of exact ones alone it is 1.
        score = 1.0 if exact else min(similarity, 0.999)
        rows.append(Row(names[image], "leak" if leak else "duplicate", score, given[image], other, names[of]))
    rows.sort(key=lambda row: (not row.suggested, -row.score))
    rows += [Row("", "class names", 1.0, *pair) for pair in same_names(classes)]
    left_out = LeftOut.of(features, labels, classes=len(classes))
    at = {image: row for row, image in enumerate(kept)}
    around = torch.tensor(kept)[near.index[[at[of] for of in first]]]  # [N, K]
    for image in left_out.suspects(around):
        suggested = classes[int(left_out.suggested[image])]
        rows.append(Row(names[image], "label", float(left_out.margin[image]), given[image], suggested))
    rows += [Row(names[kept[row]], "outlier", score, given[kept[row]]) for row, score in outliers(unique)]
    pairs = alike(left_out.confusion(len(classes)), classes)
    rows += [Row("", "classes alike", share, one, other) for one, other, share in pairs]
    rows += [Row("", "few images", count, name) for name, count in too_few(labels[:train].tolist(), classes)]
    shapes = cut_away(transform, [one.shape for one in prints], like=like, most=most)
    rows += [Row(names[image], "crop", share, given[image]) for image, share in shapes]
    effect = Effect(math.nan, math.nan, left_out.accuracy)
    if train < len(names):
        parts = (features[:train], labels[:train]), (features[train:], labels[train:])
        hits = held_out_hits(*parts, classes=len(classes)).double()
        effect = Effect(float(hits.mean()), float(hits[~leaks[train:]].mean()), left_out.accuracy)  # NaN of none
    return ordered(rows), effect


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Rows by the importance of their kind; within it as they are."""
    return sorted(rows, key=lambda row: [*_WORDS, row.finding].index(row.finding))


def with_ticks(rows: Sequence[Row], old: Sequence[Mapping[str, str]]) -> tuple[list[Row], int]:
    """Rows with the ticks that a person has set in an earlier table, and how many images have one.

    Args:
        rows: of now.
        old: rows of the earlier table by the names of its columns; those with a tick stay, though no longer found.
    """
    ticks = {row["path"]: row["exclude"] for row in old if row["path"] and row["exclude"].strip()}
    here = {row.path for row in rows}
    kept = [replace(row, exclude=ticks.get(row.path, row.exclude)) for row in rows]
    names = ("path", "given", "suggested", "other", "exclude")
    gone = [Row(finding="earlier", score=0.0, **{n: row.get(n, "") for n in names}) for row in old]
    return kept + [row for row in gone if row.path in ticks.keys() - here and row.exclude.strip()], len(ticks)


def overview(rows: Sequence[Row], effect: Effect | None = None) -> list[Finding]:
    """What was found of each kind: how many, the worst by name, and what to do."""
    found = []
    for kind, (words, advice) in _WORDS.items():
        some = [row for row in rows if row.finding == kind]
        if not some:
            continue
        what = f"{counted(len(some), 'image')} {words}" if some[0].path else f"{len(some):,} {words}"
        if kind in ("leak", "duplicate"):
            others = sum(bool(row.suggested) for row in some)
            what += f" ({sum(row.score == 1 for row in some):,} pixel for pixel, {others:,} under another label)"
        if effect and kind == "leak":
            rest = (
                f"{effect.without_leaks:.1%} of the others" if effect.without_leaks >= 0 else "and there are no others"
            )
            what += f"; a ridge head gets {effect.all:.1%} of validation right, {rest}"
        if effect and kind == "label":
            what += f"; the features get {effect.left_out:.1%} of all images right"
        found.append(Finding(what, [_shown(row) for row in some[:_WORST]], advice))
    return found


def _shown(row: Row) -> str:
    labels = f"{row.given} → {row.suggested}" if row.suggested else row.given
    image = f"{row.path} = {row.other}" if row.other and row.finding != "unreadable" else row.path or labels
    return f"{image}  ({f'{labels}, ' * bool(row.path and row.suggested)}{row.score:.3g})"
