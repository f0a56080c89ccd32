"""The report of one run, as one HTML file that fetches nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainer.measures import Answers, Scores, answers, scores, wilson
from trainer.report import charts
from trainer.report.facts import Facts
from trainer.report.matrix import matrices, worst_pairs
from trainer.report.pictures import Pictures, gallery
from trainer.report.shell import document, duration, folded, number, percent, sections, table, text
from trainer.text import counted

_PAIRS, _NAMES = 15, 12  # to show at most
_ROWS = 30  # of a table, beyond which it is folded
_ON_MAP, _MAP_BUDGET = 1000, 800_000  # images, and bytes of HTML for their thumbnails


def render(facts: Facts) -> str:
    """The report of a run.

    Args:
        facts: what happened; sections whose facts are absent are omitted.

    Returns:
        the text of a self-contained HTML file (UTF-8), below 5 MB for up to 1,000 classes.
    """
    parts = [("Curves", _curves(facts))]
    if facts.logits is not None:
        given = answers(facts.logits, facts.labels)
        found = scores(given)
        parts = [
            ("Result", _result(found)),
            *parts,
            ("Classes", _classes(facts, found)),
            ("Confusion", _confusion(facts, found)),
            ("Images", gallery(facts, given)),
            ("Calibration", _calibration(found)),
            ("Map of the images", _map(facts, given)),
        ]
    parts += [
        ("Time", _time(facts)),
        ("Search of the head", _search(facts)),
        ("Audit of the data", _audit(facts)),
        ("Settings", _settings(facts)),
        ("Repeat it", _repeat(facts)),
    ]
    return document(facts.title, [f"<h1>{text(facts.title)}</h1>", *sections(parts)])


def headline(found: Scores) -> str:
    """The accuracy in large letters, with its interval."""
    low, high = wilson(found.hits, found.images)
    return (
        f'<div class="result"><strong>{percent(found.hits / found.images)}</strong><span>of the validation images are '
        f"classified correctly: {found.hits:,} of {found.images:,}.<br>"
        f'<span class="soft">95% interval: {percent(low)} to {percent(high)} (Wilson).</span></span></div>'
    )


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _result(found: Scores) -> str:
    commonest = percent(found.per_class.images.max() / found.images)
    tiles = [
        ("Balanced accuracy", percent(found.balanced), "mean recall of the classes"),
        ("Macro F1", percent(found.macro.f1), "every class counts the same"),
        ("NLL", number(found.nll), "nats per image; 0 is perfect"),
        ("ECE", percent(found.bins.ece), "gap of confidence and accuracy"),
        ("Brier score", number(found.brier), "0 is perfect, 2 the worst"),
        ("Commonest class", commonest, "accuracy of always answering it"),
    ]
    if found.hits_in_5 is not None:
        tiles.insert(0, ("Top-5 accuracy", percent(found.hits_in_5 / found.images), "true class among five highest"))
    boxes = "".join(
        f'<div><dt>{name}</dt><dd>{value}</dd><dd class="soft">{hint}</dd></div>' for name, value, hint in tiles
    )
    averages = (("macro", found.macro), ("weighted by images", found.weighted))
    rows = [(name, mean.precision, mean.recall, mean.f1) for name, mean in averages]
    shown = [(name, *map(percent, shares)) for name, *shares in rows]
    means = table(["average", "precision", "recall", "F1"], rows, shown=shown, sortable=False)
    return f'{headline(found)}<dl class="tiles">{boxes}</dl>{means}'


def _curves(facts: Facts) -> str:
    drawn = []
    parts = [(part, entry.get(part) or {}) for entry in facts.history for part in ("val", "train")]
    for name in dict.fromkeys(name for _, values in parts for name in values):
        series = {
            part: [(entry["epoch"], entry[part][name]) for entry in facts.history if name in (entry.get(part) or {})]
            for part in ("val", "train")
        }
        drawn.append((name, charts.lines(name, {part: points for part, points in series.items() if points})))
    for key, name in (("lr", "learning rate"), ("seconds", "seconds per epoch")):
        points = [(entry["epoch"], entry[key]) for entry in facts.history if entry.get(key) is not None]
        drawn.append((name, charts.lines(name, {name: points}, from_zero=True)))
    figures = "".join(f"<figure><h3>{text(name)}</h3>{chart}</figure>" for name, chart in drawn if chart)
    return f'<div class="charts">{figures}</div>' if figures else ""


def _classes(facts: Facts, found: Scores) -> str:
    per = found.per_class
    ordered = np.lexsort((per.f1, per.images == 0))  # the worst first, then those without images
    columns = (per.images, per.precision, per.recall, per.f1, per.confidence)
    rows = [(str(facts.classes[at]), *(column[at].item() for column in columns)) for at in ordered]
    shown = [(name, number(images), *map(percent, shares)) for name, images, *shares in rows]
    heads = ["class", "images", "precision", "recall", "F1", "confidence"]
    note = '<p class="soft">The lowest F1 first; confidence is the mean over the images of the class.</p>'
    if len(rows) <= _ROWS:
        return note + table(heads, rows, shown=shown)
    worst = table(heads, rows[:10], shown=shown[:10])
    return note + worst + folded(f"All {len(rows):,} classes", table(heads, rows, shown=shown))


def _confusion(facts: Facts, found: Scores) -> str:
    classes = list(map(str, facts.classes))
    drawn = "".join(
        f"<figure>{chart}<figcaption>{caption}</figcaption></figure>"
        for chart, caption in matrices(found.confusion, classes)
    )
    pairs = worst_pairs(found.confusion, most=_PAIRS)
    images = found.per_class.images
    rows = [(classes[true], classes[guess], count, count / images[true].item()) for true, guess, count in pairs]
    shown = [(true, guess, number(count), percent(share)) for true, guess, count, share in rows]
    worst = table(["true class", "taken for", "images", "of its images"], rows, shown=shown)
    note = "Classes that are confused with each other are neighbours. The stronger the colour, the larger the share."
    listed = f"<div><h3>Commonest mistakes</h3>{worst}</div>" if rows else ""
    return f'<p class="soft">{note}</p><div class="beside">{drawn}{listed}</div>'


def _calibration(found: Scores) -> str:
    accuracy = found.hits / found.images
    mean = float(np.nansum(found.bins.confidence * found.bins.images) / found.images)
    verdict = f"{100 * abs(mean - accuracy):.1f} points {'above' if mean > accuracy else 'below'}"
    return (
        f"<p>NLL {number(found.nll)}, ECE {percent(found.bins.ece)} in {len(found.bins.images)} bins. The mean "
        f"confidence is {percent(mean)}, {verdict} the accuracy of {percent(accuracy)}.</p>"
        f'<figure class="narrow">{charts.reliability(found.bins)}<figcaption>Bars are the accuracy of the answers of a '
        "confidence; frames are the gap between the two. The fuller a bar, the more images.</figcaption></figure>"
    )


def _map(facts: Facts, given: Answers) -> str:
    if facts.features is None or len(facts.labels) < 3:
        return ""
    chosen = np.unique(np.linspace(0, len(facts.labels) - 1, _ON_MAP).round().astype(int))
    points, method = charts.place(facts.features[chosen])
    pictures = Pictures(facts, size=72, budget=_MAP_BUDGET)
    tips, few = [], len(facts.classes) <= len(charts.HUES)
    for i in chosen.tolist():
        true, guess = (str(facts.classes[int(index)])[:60] for index in (given.labels[i], given.predicted[i]))
        tips.append((true if given.hits[i] else f"{true} → {guess}", pictures.photo(i)[0]))
    groups = given.labels[chosen] if few else np.where(given.hits[chosen], 0, 5)
    keys = dict(enumerate(map(str, facts.classes))) if few else {0: "hit", 5: "mistake"}
    dot = '<svg viewBox="0 0 12 12" aria-hidden="true"><circle cx="6" cy="6" r="5" fill="{}"/></svg>'
    legend = "".join(
        f'<span class="key">{dot.format(charts.HUES[at])}{text(name, limit=40)}</span>' for at, name in keys.items()
    )
    count = f"{len(chosen):,} of {len(facts.labels):,} images"
    drawn = charts.scatter(f"Map of {count}.", points, groups=groups, marked=~given.hits[chosen], tips=tips)
    note = f"{count}, by {method}. Mistakes have a ring; point at an image to see it."
    return f'<p>{legend}</p><figure class="map">{drawn}<figcaption>{note}</figcaption></figure>'


def _time(facts: Facts) -> str:
    if not facts.timings:
        return ""
    total = duration(sum(facts.timings.values()))
    return f'<p>{total} in all.</p><figure class="narrow">{charts.bars("Time by part", facts.timings)}</figure>'


def _search(facts: Facts) -> str:
    tried = facts.search
    return table(tried.columns, tried.rows, chosen=tried.chosen, cap=200) if tried and tried.rows else ""


def _audit(facts: Facts) -> str:
    if facts.audit is None:
        return ""
    parts = []
    for finding in facts.audit:
        images = "".join(f"<li>{text(name)}</li>" for name in finding.images[:_NAMES])
        more = len(finding.images) - _NAMES
        images += f"<li>and {more:,} more</li>" if more > 0 else ""
        advice = f"<p>{text(finding.advice, limit=1000)}</p>" if finding.advice else ""
        parts.append(f"<h3>{text(finding.what, limit=1000)}</h3>{advice}" + (f"<ul>{images}</ul>" if images else ""))
    return "\n".join(parts) or "<p>Nothing was found.</p>"


def _settings(facts: Facts) -> str:
    rows = list(flat(facts.settings))
    return (
        folded(counted(len(rows), "setting"), table(["setting", "value"], rows), fold=len(rows) > _ROWS) if rows else ""
    )


def _repeat(facts: Facts) -> str:
    command = f"<pre>{text(facts.command, limit=20_000)}</pre>" if facts.command else ""
    versions = table(["with", "version"], list(facts.versions.items()), sortable=False) if facts.versions else ""
    return command + versions
