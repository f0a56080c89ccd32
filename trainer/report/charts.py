"""Charts as inline SVG: of the page's own colours, so that they follow dark mode and print."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from trainer.measures import Bins
from trainer.report.shell import duration, number, percent, text

HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#888888")  # Okabe and Ito 2008
_POINTS = 400  # of a curve: more than a chart has pixels
_TSNE_AT_MOST = 1000  # images, which take scikit-learn a few seconds

Series = Mapping[str, Sequence[tuple[float, float]]]


def svg(width: float, height: float, title: str, body: str, *, rest: str = "") -> str:
    """A drawing that scales to the width of its place, with a text for those who cannot see it."""
    label = text(title, limit=1000)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}" {rest}>\n{body}\n</svg>'


def lines(title: str, series: Series, *, x_label: str = "epoch", from_zero: bool = False) -> str:
    """A chart of at most two curves by name, each of points (x, y); points that are not finite are gaps."""
    finite = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    xs, ys = ([point[axis] for points in finite.values() for point in points] for axis in (0, 1))
    if not xs:
        return ""
    (left, right), (low, high) = _padded(min(xs), max(xs), 0.02), _padded(min(ys), max(ys), 0.06)
    low = min(0.0, min(ys)) if from_zero else low
    parts, across, up = _axes(340, 200, (left, right), (low, high), x_label=x_label, whole=True)
    ends = []
    for at, (name, points) in enumerate(series.items()):
        run: list[str] = []
        kept = sorted({*range(0, len(points), max(1, len(points) // _POINTS)), len(points) - 1})
        for x, y in [*(points[k] for k in kept), (0, math.nan)]:
            if math.isfinite(x) and math.isfinite(y):
                run.append(f"{across(x):.1f},{up(y):.1f}")
            elif run:
                parts.append(f'<polyline class="s{at}" points="{" ".join(run)}"/>')
                run = []
        if len(points) <= 50:
            parts += [
                f'<circle class="f{at}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6" '
                f'data-tip="{text(f"{name}, {x_label} {x:g}: {y:.4g}")}"/>'
                for x, y in finite[name]
            ]
        if len(series) > 1:
            start = 48 + 90 * at
            parts.append(f'<line class="s{at}" x1="{start}" x2="{start + 20}" y1="9" y2="9" stroke-width="2"/>')
            parts.append(f'<text x="{start + 25}" y="13">{text(name, limit=12)}</text>')
        if finite[name]:
            ends.append(f"{name} from {finite[name][0][1]:.4g} to {finite[name][-1][1]:.4g}")
    return svg(340, 200, f"{title} by {x_label}: {'; '.join(ends)}.", "\n".join(parts))


def reliability(bins: Bins) -> str:
    """Accuracy by confidence (a reliability diagram), with the number of images below."""
    parts, across, up = _axes(340, 240, (0, 1), (0, 1), x_label="confidence", y_label="accuracy")
    (left, bottom), (right, top) = (across(0), up(0)), (across(1), up(1))
    parts.append(f'<line class="even" x1="{left}" y1="{bottom}" x2="{right}" y2="{top}"/>')
    count, most = len(bins.images), bins.images.max()
    for at in np.flatnonzero(bins.images):
        share, sure, images = bins.accuracy[at], bins.confidence[at], int(bins.images[at])
        column = f'x="{across(at / count) + 1:.1f}" width="{(right - left) / count - 2:.1f}"'
        solid = 0.35 + 0.65 * math.sqrt(images / most)
        tip = text(f"confidence {percent(sure)}, accuracy {percent(share)}, images: {images:,}")
        parts += [
            f'<g data-tip="{tip}"><rect class="none" {column} y="{top}" height="{bottom - top}"/>',
            f'<rect class="f0" opacity="{solid:.2f}" {column} y="{up(share):.1f}" height="{bottom - up(share):.1f}"/>',
            f'<rect class="fe" {column} y="{up(max(share, sure)):.1f}" height="{abs(up(share) - up(sure)):.1f}"/></g>',
        ]
    title = f"Accuracy by confidence in {count} bins; the expected calibration error is {percent(bins.ece)}."
    return svg(340, 240, title, "\n".join(parts))


def bars(title: str, values: Mapping[str, float]) -> str:
    """Horizontal bars of seconds by name, the longest first."""
    longest, total = max(values.values(), default=0) or 1, sum(values.values()) or 1
    parts, ordered = [], sorted(values.items(), key=lambda item: -item[1])
    for at, (name, value) in enumerate(ordered):
        y, width = 22 * at, 130 * value / longest
        parts.append(f'<text class="end" x="108" y="{y + 15}">{text(name, limit=18)}</text>')
        parts.append(f'<rect class="f0" x="114" y="{y + 4}" width="{max(width, 1):.1f}" height="14" rx="2"/>')
        parts.append(f'<text x="{119 + width:.1f}" y="{y + 15}">{duration(value)}, {percent(value / total)}</text>')
    spoken = "; ".join(f"{name} {duration(value)}" for name, value in ordered)
    return svg(360, 22 * len(values) + 4, f"{title}: {spoken}.", "\n".join(parts))


def place(features: np.ndarray) -> tuple[np.ndarray, str]:
    """Places of images on a map, from features `[N, D]`.

    Where scikit-learn is installed, and for 10 to 1,000 images, by t-SNE (van der Maaten and Hinton 2008) of the
    first 50 principal components; otherwise the first two principal components.

    Returns:
        `[N, 2]` between 0 and 1, and how they were found.
    """
    features = features.reshape(len(features), -1).astype(np.float64)
    features = features - features.mean(0)
    _, sizes, axes = np.linalg.svd(features, full_matrices=False)
    found = features @ axes[:50].T  # [N, up to 50]
    share = (sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-300)
    method = f"the first two principal components, {percent(share)} of the variance"
    if 10 <= len(found) <= _TSNE_AT_MOST and sizes[0] > 0:
        try:
            from sklearn.manifold import TSNE  # pyright: ignore[reportMissingImports]  # optional
        except ImportError:
            pass
        else:
            found = TSNE(perplexity=min(30, len(found) / 4), init="pca", random_state=0).fit_transform(found)
            method = "t-SNE of the first 50 principal components: neighbours are alike, distances mean little"
    found = np.pad(found, ((0, 0), (0, max(0, 2 - found.shape[1]))))[:, :2]
    low, high = found.min(0), found.max(0)
    return (found - low) / np.where(high > low, high - low, 1), method


def scatter(
    title: str, points: np.ndarray, *, groups: np.ndarray, marked: np.ndarray, tips: Sequence[tuple[str, str]]
) -> str:
    """A map of points `[N, 2]` between 0 and 1.

    Args:
        title: for those who cannot see it.
        groups: `[N]`, the index of each point's colour in `HUES`.
        marked: `[N]`, which points have a ring.
        tips: for each point, what appears under the pointer: plain text, and the source of a picture or "".
    """
    parts = []
    for at in np.argsort(marked, kind="stable"):  # those with a ring lie above
        words, source = tips[at]
        picture = f' data-src="{source}"' if source else ""
        ring = ' class="miss"' if marked[at] else ""
        parts.append(
            f'<circle{ring} cx="{10 + 620 * points[at, 0]:.1f}" cy="{10 + 420 * points[at, 1]:.1f}" r="5" '
            f'fill="{HUES[groups[at]]}" fill-opacity=".85" data-tip="{text(words)}"{picture}/>'
        )
    return svg(640, 440, title, "\n".join(parts))


def _axes(width, height, xs, ys, *, x_label, y_label="", whole=False):
    """Grid lines and numbers of a chart, and the functions from values to places."""
    left, right, top, bottom = 44, width - 12, 20, height - 32

    def across(x: float) -> float:
        return left + (right - left) * (x - xs[0]) / (xs[1] - xs[0])

    def up(y: float) -> float:
        return bottom - (bottom - top) * (y - ys[0]) / (ys[1] - ys[0])

    parts = []
    for y in _ticks(*ys):
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text class="soft-text end" x="{left - 6}" y="{up(y) + 4:.1f}">{number(float(y))}</text>')
    for x in _ticks(*xs, whole=whole):
        parts.append(f'<text class="soft-text middle" x="{across(x):.1f}" y="{bottom + 15}">{number(float(x))}</text>')
    parts.append(f'<text class="soft-text end" x="{right}" y="{height - 4}">{x_label}</text>')
    if y_label:
        parts.append(f'<text class="soft-text" x="{left - 38}" y="12">{y_label}</text>')
    return parts, across, up


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers from low to high."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(step * unit for step in (1, 2, 5, 10) if step * unit >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    room = (high - low) * share or max(abs(high) * 0.1, 1e-6)
    return low - room, high + room
