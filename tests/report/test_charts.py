"""Charts and the confusion matrix as SVG."""

import math
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from trainer.measures import calibration
from trainer.report import charts
from trainer.report.matrix import matrices, order, overview, worst_pairs


def drawing(text: str) -> ElementTree.Element:
    """The drawing as XML; fails if it is not well-formed or has no text for those who cannot see it."""
    (found,) = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    root = ElementTree.fromstring(found)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root.get("viewBox").startswith("0 0 ")
    return root


def test_lines_are_broken_where_a_value_is_not_finite():
    series = {"val": [(1, 2.0), (2, math.nan), (3, 1.0), (4, 0.5)], "train": [(1, 3.0), (4, 2.0)]}
    root = drawing(charts.lines("loss <b>", series))
    curves = [(line.get("class"), len(line.get("points").split())) for line in root.iter("polyline")]
    assert curves == [("s0", 1), ("s0", 2), ("s1", 2)]
    assert root.get("aria-label") == "loss <b> by epoch: val from 2 to 0.5; train from 3 to 2."
    assert {dot.get("data-tip") for dot in root.iter("circle")} >= {"val, epoch 1: 2", "train, epoch 4: 2"}


@pytest.mark.parametrize("points", [[(1, 0.0)], [(1, 5.0), (2, 5.0)], [(1, 1e-12), (2, 1e12)]])
def test_lines_of_one_value_or_of_a_wide_range(points):
    for from_zero in (False, True):
        root = drawing(charts.lines("loss", {"val": points}, from_zero=from_zero))
        assert "nan" not in ElementTree.tostring(root, encoding="unicode")
        assert len(list(root.iter("circle"))) == len(points)


def test_lines_of_nothing_and_of_many_epochs():
    assert charts.lines("loss", {}) == charts.lines("loss", {"val": [(1, math.inf)]}) == ""
    root = drawing(charts.lines("loss", {"val": [(epoch, epoch % 7) for epoch in range(1, 100_001)]}))
    (curve,) = root.iter("polyline")
    assert len(curve.get("points").split()) < 1000


def test_reliability_shows_the_bins_that_have_images():
    bins = calibration(np.array([0.95, 0.97, 0.4]), np.array([True, False, True]))
    root = drawing(charts.reliability(bins))
    assert [group.get("data-tip") for group in root.iter("g")] == [
        "confidence 40.0%, accuracy 100.0%, images: 1",
        "confidence 96.0%, accuracy 50.0%, images: 2",
    ]


def test_bars_name_the_longest_first():
    root = drawing(charts.bars("Time", {"a & b": 1.0, "c": 3.0}))
    assert [word.text for word in root.iter("text")] == ["c", "3.0 s, 75.0%", "a & b", "1.0 s, 25.0%"]


def test_places_by_principal_components_keep_what_lies_apart_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)  # as if it were not installed
    features = np.zeros((40, 300), dtype=np.float32)
    features[20:, 7] = 3
    points, method = charts.place(features)
    assert method == "the first two principal components, 100.0% of the variance"
    assert sorted({round(float(x), 6) for x in points[:, 0]}) == [0, 1]
    assert len({round(float(x), 6) for x in points[:20, 0]}) == 1


def test_places_by_tsne_where_scikit_learn_is_installed():
    pytest.importorskip("sklearn.manifold")
    features = np.random.default_rng(0).normal(size=(40, 8))
    features[20:] += 20
    points, method = charts.place(features)
    assert method.startswith("t-SNE")
    assert points.shape == (40, 2)
    centres = points[:20].mean(0), points[20:].mean(0)
    nearer = np.linalg.norm(points - centres[0], axis=1) < np.linalg.norm(points - centres[1], axis=1)
    assert nearer.tolist() == [True] * 20 + [False] * 20


@pytest.mark.parametrize("features", [np.zeros((12, 4)), np.ones((3, 1)), np.eye(5)])
def test_places_of_features_that_say_little(features):
    points, _ = charts.place(features)
    assert points.shape == (len(features), 2)
    assert ((points >= 0) & (points <= 1)).all()


def test_order_recovers_a_chain_of_confused_classes():
    rng = np.random.default_rng(0)
    hidden = rng.permutation(200)  # the order in which classes are alike
    confusion = np.zeros((200, 200), dtype=int)
    confusion[np.arange(200), np.arange(200)] = 10
    confusion[hidden[:-1], hidden[1:]] = rng.integers(1, 5, 199)
    found = order(confusion).tolist()
    assert found in (hidden.tolist(), hidden[::-1].tolist())


def test_order_keeps_all_classes_and_those_never_confused_at_the_end():
    confusion = np.diag([5, 5, 5, 5, 0])
    assert order(confusion).tolist() == [0, 1, 2, 3, 4]
    confusion[3, 1] = 2
    assert order(confusion).tolist() == [1, 3, 0, 2, 4]
    noise = np.random.default_rng(0).integers(0, 9, (30, 30))
    assert sorted(order(noise)) == list(range(30))


def test_worst_pairs():
    confusion = np.array([[9, 2, 0], [0, 9, 5], [1, 0, 9]])
    assert worst_pairs(confusion, most=10) == [(1, 2, 5), (0, 1, 2), (2, 0, 1)]
    assert worst_pairs(confusion, most=1) == [(1, 2, 5)]


def test_matrix_of_few_classes_has_names_and_numbers():
    ((drawn, _),) = matrices(np.array([[3, 1], [0, 4]]), ["<a>", "b"])
    root = drawing(drawn)
    assert [word.text for word in root.iter("text")] == ["<a>", "<a>", "3", "1", "b", "b", "4"]
    tips = [cell.get("data-tip") for cell in root.iter("rect")]
    assert tips == ["<a> → <a>: 3 of 4", "<a> → b: 1 of 4", None, "b → b: 4 of 4"]


def test_matrix_of_many_classes_shows_all_and_names_the_worst():
    confusion = np.diag(np.full(200, 10))
    confusion[150, 60] = 7
    classes = [f"class {index}" for index in range(200)]
    (every, _), (part, caption) = matrices(confusion, classes)
    assert drawing(every).get("data-names").startswith('["class ')
    assert caption == "The 30 classes of the commonest mistakes."
    assert "class 150 → class 60: 7 of 17" in {cell.get("data-tip") for cell in drawing(part).iter("rect")}


def test_overview_is_small_even_where_every_cell_is_full():
    confusion = np.ones((400, 400), dtype=int)
    assert len(overview(confusion, ["x"] * 400, np.arange(400))) < 1_000_000
