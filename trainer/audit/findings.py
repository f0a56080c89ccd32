"""All that is found in the data: rows of a table, and a few lines for people, the most important first."""

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
from trainer.data.images import Images
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


class Accuracy(NamedTuple):
    """Shares that ridge heads on the features get right; None of no image.

    Attributes:
        validation: by a head of the training images. validation_without_leaks: of those not in training as well.
        left_out: of all images, each by a head of the others.
    """

    validation: float | None
    validation_without_leaks: float | None
    left_out: float


def examine(
    features: Tensor,
    parts: Sequence[Images],
    prints: Sequence[Sequence[Print]],
    *,
    name: Callable[[Images, int], str],
    transform: Callable[[Tensor], Tensor],
    most: float = 255.0,
) -> tuple[list[Row], Accuracy]:
    """Everything that can be found in N images, the most important first.

    Args:
        features: `[N, D]`, of a frozen trunk; see `features_of`.
        parts: the training and the validation images, which can all be read, with classes as labels.
        prints: of each part; see `take_prints`.
        name: of an image, for the table.
        transform: of evaluation.
        most: the value of a pixel that counts as 1.

    Raises:
        DataError: there are fewer than three images, or they are all equal, or a feature is not finite.
    """
    train, every = len(parts[0]), [one for some in prints for one in some]
    first = first_of(every)
    kept = [image for image, of in enumerate(first) if image == of]
    if train < 2 or len(kept) < 3:
        raise DataError(
            f"{train} training images, {len(kept):,} different ones in all: an audit needs 2 and 3 at least."
        )
    classes, labels = parts[0].classes, torch.tensor([label for images in parts for label in images.labels])
    given: list[str] = [classes[int(label)] for label in labels]
    names = [name(images, index) for images in parts for index in range(len(images))]
    unique = features[torch.tensor(kept, device=features.device)]
    near = Neighbours.of(unique)
    rows, leaks = list[Row](), torch.zeros(len(names), dtype=torch.bool)
    for image, of, exact, similarity in duplicates(every, near, kept, train=train):
        leaks[image] = leak = of < train <= image
        other = "" if given[image] == given[of] else given[of]
        score = 1.0 if exact else min(similarity, 0.999)  # 1 of exact ones alone
        rows.append(Row(names[image], "leak" if leak else "duplicate", score, given[image], other, names[of]))
    rows.sort(key=lambda row: (not row.suggested, -row.score))
    rows += [Row("", "class names", 1.0, *pair) for pair in same_names(classes)]
    left_out = LeftOut.of(features, labels.to(features.device), classes=len(classes))
    at = {image: row for row, image in enumerate(kept)}
    around = torch.tensor(kept)[near.index[[at[of] for of in first]]]  # [N, K]
    for image in left_out.suspects(around):
        suggested = classes[int(left_out.suggested[image])]
        rows.append(Row(names[image], "label", float(left_out.margin[image]), given[image], suggested))
    rows += [Row(names[kept[row]], "outlier", score, given[kept[row]]) for row, score in outliers(unique)]
    pairs = alike(left_out.confusion(len(classes)), classes)
    rows += [Row("", "classes alike", share, one, other) for one, other, share in pairs]
    rows += [Row("", "few images", count, name) for name, count in too_few(labels[:train].tolist(), classes)]
    shapes = cut_away(transform, [one.shape for one in every], like=parts[0][0], most=most)
    rows += [Row(names[image], "crop", share, given[image]) for image, share in shapes]
    validation: float | None = None
    rest: float | None = None
    if train < len(names):
        sides = [(features[some], labels[some].to(features.device)) for some in (slice(train), slice(train, None))]
        hits = held_out_hits(*sides, classes=len(classes)).double()
        others = hits[~leaks[train:]]
        validation, rest = float(hits.mean()), float(others.mean()) if len(others) else None
    rows = [replace(row, score=round(row.score, 4)) for row in rows]
    return ordered(rows), Accuracy(validation, rest, left_out.accuracy)


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


def summarise(rows: Sequence[Row], accuracy: Accuracy | None = None) -> list[Finding]:
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
        if kind == "leak" and accuracy and accuracy.validation is not None:
            rest = accuracy.validation_without_leaks
            without = "and there are no others" if rest is None else f"{rest:.1%} of the others"
            what += f"; a ridge head gets {accuracy.validation:.1%} of validation right, {without}"
        if kind == "label" and accuracy:
            what += f"; the features get {accuracy.left_out:.1%} of all right, the fewer the more false alarms"
        found.append(Finding(what, [_shown(row) for row in some[:_WORST]], advice))
    return found


def _shown(row: Row) -> str:
    labels = f"{row.given} → {row.suggested}" if row.suggested else row.given
    image = row.path or labels
    if row.other and row.finding != "unreadable":
        image += f" {'=' if row.score == 1 else '≈'} {row.other}"
    return f"{image}  ({f'{labels}, ' * bool(row.path and row.suggested)}{row.score:.3g})"
