"""Thumbnails within a page, as cards: small JPEGs, of limited size in all."""

import base64
import io
import math
from collections.abc import Iterable

import numpy as np
from PIL import Image
from torch import Tensor

from trainer.errors import DataError
from trainer.measures import Answers
from trainer.report.facts import Facts
from trainer.report.heatmap import layer
from trainer.report.shell import folded, percent, text

_BUDGET = 2_000_000  # bytes of HTML for thumbnails: with all else, the page stays below 5 MB
_MISTAKES, _HITS, _TYPICAL = 24, 12, 1000  # to show at most
_FEW = 60  # classes with large thumbnails


class Pictures:
    """Thumbnails of the images of a run, until their budget is spent: from then on there are none.

    Args:
        facts: where they come from.
        size: their longer side, in pixels.
        budget: bytes of HTML that they may take together.
    """

    def __init__(self, facts: Facts, *, size: int, budget: int):
        self.facts, self.size, self.left = facts, size, budget

    def photo(self, image: int) -> tuple[str, tuple[int, int]]:
        """The source of a thumbnail, as a data URL, and its (width, height); "" where there is none."""
        if not self.facts.thumbnail or self.left <= 0:
            return "", (1, 1)
        try:
            given = self.facts.thumbnail(image)
            if isinstance(given, Tensor):  # [3, H, W]
                given = Image.fromarray(np.ascontiguousarray(given.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()))
            with given:  # a file that was only opened is read here, and found damaged
                small = given.convert("RGB")
        except (OSError, DataError):  # changed since; the report is not the place to fail for it
            return "", (1, 1)
        small.thumbnail((self.size, self.size))
        return self._url(small, "JPEG", quality=80, optimize=True), small.size

    def heat(self, image: int) -> str:
        """The source of a heat map, to lie over the thumbnail; "" where there is none."""
        if not self.facts.heat_map or self.left <= 0:
            return ""
        try:
            return self._url(layer(self.facts.heat_map(image)), "PNG")
        except (OSError, DataError):
            return ""

    def cards(self, captions: Iterable[tuple[int, str]], *, small: bool = False) -> str:
        """A grid of images by index, each with its caption (HTML); the name is added."""
        parts = []
        for image, caption in captions:
            source, (width, height) = self.photo(image)
            name = text(self.facts.name(image), limit=60)
            frame = ""
            if source:
                longer = max(width, height)
                shape = f"width:{100 * width / longer:.0f}%;height:{100 * height / longer:.0f}%"
                heat = self.heat(image)
                over = f'<img class="heat" src="{heat}" alt="">' if heat else ""
                frame = f'<span style="{shape}"><img src="{source}" alt="{name}">{over}</span>'
            frame = f'<span class="photo">{frame}</span>' if self.facts.thumbnail else ""
            parts.append(f'<figure class="card">{frame}{caption}<br><span class="soft">{name}</span></figure>')
        return f'<div class="cards{" small" if small else ""}">' + "\n".join(parts) + "</div>"

    def _url(self, image: Image.Image, kind: str, **options: object) -> str:
        data = io.BytesIO()
        image.save(data, kind, **options)
        url = f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
        self.left -= len(url)
        return url


def gallery(facts: Facts, given: Answers) -> str:
    """The most confident mistakes, the least confident hits, and a typical image of each class."""
    many = len(facts.classes) > _FEW
    pictures = Pictures(facts, size=80 if many else 160, budget=_BUDGET)
    sure, labels, predicted = given.confidence, given.labels.tolist(), given.predicted.tolist()
    wrong, right = np.flatnonzero(~given.hits), np.flatnonzero(given.hits)
    wrong, right = wrong[np.argsort(-sure[wrong], kind="stable")], right[np.argsort(sure[right], kind="stable")]

    def named(index: int) -> str:
        return text(facts.classes[index], limit=40)

    blocks = []
    if facts.heat_map and facts.thumbnail:
        words = "Heat maps on every image: bright places spoke for the answer (or point at an image)."
        blocks.append(f'<p><label><input type="checkbox" id="heat"> {words}</label></p>')
    blocks.append("<h3>Most confident mistakes</h3>" if len(wrong) else "<p>There are no mistakes.</p>")
    if len(wrong):
        cards = [
            (i, f'{named(labels[i])} → <b class="wrong">{named(predicted[i])}</b> {percent(float(sure[i]))}')
            for i in wrong[:_MISTAKES].tolist()
        ]
        note = f"{len(cards)} of {len(wrong):,}: true class → answer, confidence."
        blocks.append(f'<p class="soft">{note}</p>{pictures.cards(cards)}')
    if len(right):
        cards = [(i, f"{named(labels[i])} {percent(float(sure[i]))}") for i in right[:_HITS].tolist()]
        note = f"{len(cards)} of {len(right):,}: class, confidence."
        blocks.append(f'<h3>Least confident hits</h3><p class="soft">{note}</p>{pictures.cards(cards)}')
    chosen = typical(facts.features, given.own, given.labels, given.predicted)[:_TYPICAL]
    cards = pictures.cards([(i, f"<b>{named(labels[i])}</b>") for i in chosen], small=many)
    choice = "nearest to the mean of its class by features" if facts.features is not None else "of the surest hit"
    cards = f'<p class="soft">The one {choice}.</p>{cards}'
    heading = "<h3>A typical image of each class</h3>"
    blocks.append(heading + folded(f"{len(chosen):,} classes", cards, fold=many))
    return "\n".join(blocks)


def typical(features: np.ndarray | None, own: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> list[int]:
    """An image of each class that has images, by index: one that was classified correctly, if any was.

    Args:
        features: `[N, D]`: the image is the nearest to the mean of its class; None: that of the highest probability.
        own: `[N]`, the probability of the true class.
    """
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        best = own[members]
        if features is not None:
            values = features[members].reshape(len(members), -1).astype(np.float64)
            best = -np.square(values - values.mean(0)).sum(1)
        right = predicted[members] == label
        found.append(int(members[np.argmax(np.where(right | ~right.any(), best, -math.inf))]))
    return found
