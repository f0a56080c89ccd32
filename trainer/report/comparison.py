"""Several runs side by side, as one HTML file that fetches nothing."""

from collections.abc import Sequence

import numpy as np

from trainer.errors import UsageError
from trainer.measures import Answers, answers, mcnemar, scores, wilson
from trainer.report.facts import Facts
from trainer.report.page import flat
from trainer.report.pictures import Pictures
from trainer.report.shell import document, duration, number, percent, sections, table, text
from trainer.text import counted

_CARDS = 12  # images that changed sides, each way
_BUDGET = 3_000_000  # bytes of HTML for the thumbnails of all runs


def compare(runs: Sequence[Facts]) -> str:
    """A page that compares runs: their results, the settings in which they differ, the images that changed sides.

    Args:
        runs: two or more. The first is the one that the others are compared with, image by image: those with the same
            name and the same class, or, without names, all images if their labels are the same.

    Returns:
        the text of a self-contained HTML file (UTF-8).

    Raises:
        UsageError: fewer than two runs, or a run whose answers are no classes.
    """
    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run to compare: expected two or more.")
    if other := [run.title for run in runs if run.logits is None]:
        raise UsageError(f"{other[0]} is no run of a classifier, and only those can be compared.")
    titles = [f"{at}. {run.title}" for at, run in enumerate(runs, start=1)]
    given = [answers(run.logits, run.labels) for run in runs]
    parts = [("Results", _results(runs, titles, given)), ("Differences in settings", _differences(runs, titles))]
    for at in range(1, len(runs)):
        body = _sides((runs[0], runs[at]), (given[0], given[at]), budget=_BUDGET // (len(runs) - 1))
        parts.append((f"Run {at + 1} against run 1", f"<p>{text(titles[at])} against {text(titles[0])}.</p>{body}"))
    heading = f"{len(runs)} runs compared"
    return document(heading, [f"<h1>{heading}</h1>", *sections(parts)])


def paired(first: Facts, second: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images that two runs have in common, `[M]` each; their true classes have the same name."""
    if first.names and second.names:
        keys = [
            [(str(name), str(run.classes[label])) for name, label in zip(run.names, run.labels, strict=True)]
            for run in (first, second)
        ]
    else:
        keys = [[(i, str(run.classes[label])) for i, label in enumerate(run.labels)] for run in (first, second)]
        if keys[0] != keys[1]:
            return np.array([], dtype=int), np.array([], dtype=int)
    place = {key: i for i, key in enumerate(keys[1])}
    pairs = [(i, place[key]) for key, i in {key: i for i, key in enumerate(keys[0])}.items() if key in place]
    both = np.array(pairs, dtype=int).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _results(runs: Sequence[Facts], titles: Sequence[str], given: Sequence[Answers]) -> str:
    heads = ["run", "accuracy", "95% interval", "hits", "images", "balanced", "macro F1", "NLL", "ECE", "time"]
    rows, shown = [], []
    for run, title, one in zip(runs, titles, given, strict=True):
        found = scores(one)
        low, high = wilson(found.hits, found.images)
        interval = f"{percent(low)} to {percent(high)}"
        seconds = sum(run.timings.values()) if run.timings else float("nan")
        shares = (found.hits / found.images, found.balanced, found.macro.f1, found.bins.ece)
        accuracy, balanced, f1, ece = map(percent, shares)
        counts, nll = (found.hits, found.images), found.nll
        rows.append((title, shares[0], interval, *counts, *shares[1:3], nll, shares[3], seconds))
        time = duration(seconds) if run.timings else "–"
        shown.append((title, accuracy, interval, *map(number, counts), balanced, f1, number(nll), ece, time))
    return table(heads, rows, shown=shown)


def _differences(runs: Sequence[Facts], titles: Sequence[str]) -> str:
    settings = [dict(flat({**run.settings, "versions": run.versions})) for run in runs]
    names = dict.fromkeys(name for values in settings for name in values)
    rows = [(name, *(values.get(name, "–") for values in settings)) for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return table(["setting", *titles], rows) if rows else "<p>There are none.</p>"


def _sides(runs: tuple[Facts, Facts], given: tuple[Answers, Answers], *, budget: int) -> str:
    pairs = paired(*runs)
    if not len(pairs[0]):
        return "<p>The two runs have no validation image in common: they cannot be compared image by image.</p>"
    before, after = (one.hits[index] for one, index in zip(given, pairs, strict=True))
    lost, gained, chance = mcnemar(before, after)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    verdict = "chance alone hardly explains this" if chance < 0.05 else "chance alone could explain this"
    summary = (
        f"Of {counted(len(before), 'image')} in common, both classify {both:,} correctly and neither {neither:,}. Of "
        f"the rest, {gained:,} became right and {lost:,} became wrong; {verdict} (McNemar's exact test: "
        f"p = {chance:.3g})."
    )
    blocks = [f"<p>{summary}</p>"]
    pictures = Pictures(runs[1] if runs[1].thumbnail else runs[0], size=160, budget=budget)
    of_pictures = pairs[1] if runs[1].thumbnail else pairs[0]
    for heading, changed in (("Became right", ~before & after), ("Became wrong", before & ~after)):
        where = np.flatnonzero(changed)
        if not len(where):
            continue
        where = where[np.argsort(-given[1].confidence[pairs[1][where]], kind="stable")][:_CARDS]
        captions = []
        for at in where.tolist():
            words = [
                f"{text(run.classes[one.predicted[i]], limit=40)} {percent(one.confidence[i].item())}"
                for run, one, i in zip(runs, given, (int(index[at]) for index in pairs), strict=True)
            ]
            captions.append((int(of_pictures[at]), " → ".join(words)))
        note = f'<p class="soft">{len(where)} of {int(changed.sum()):,}: the answer of run 1 → of this run.</p>'
        blocks.append(f"<h3>{heading}</h3>{note}{pictures.cards(captions)}")
    return "\n".join(blocks)
