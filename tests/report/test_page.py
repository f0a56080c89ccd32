"""The page of a run and the page that compares runs, as text."""

import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.errors import DataError, UsageError
from trainer.measures import answers
from trainer.report import Facts, Table, compare, render
from trainer.report.comparison import paired
from trainer.report.facts import as_numpy
from trainer.report.pictures import typical
from trainer.report.shell import duration, number, percent, table, text

ALL = ["Result", "Curves", "Classes", "Confusion", "Images", "Calibration", "Map of the images", "Time"]
ALL += ["Search of the head", "Audit of the data", "Settings", "Repeat it"]
VOID = {"meta", "link", "img", "input", "br", "path", "rect", "circle", "line", "polyline"}


class Outline(HTMLParser):
    """The tags, the sources and the headings of a page; fails where a tag is not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.names: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names += [name for name, _ in attributes]
        self.sources += [value for name, value in attributes if name in ("src", "href", "data-src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


@pytest.mark.parametrize("what", ["run", "comparison"])
def test_names_stay_text(facts, changed, what):
    page = render(facts) if what == "run" else compare([facts, changed(settings={}, logits=-facts.logits)])
    outline = Outline(page)
    assert outline.tags.count("script") == 1
    assert not [name for name in outline.names if name.startswith("on")]
    assert [source for source in outline.sources if not source.startswith(("data:", "#"))] == []
    assert "\u202e" not in page
    assert "naïve 猫 \ufffd \ufffd" in page
    page.encode()  # also where a file name is no UTF-8


def test_all_sections_and_their_numbers(facts):
    page = render(facts)
    assert Outline(page).headings == ALL
    for words in [
        "9 of 12",
        "75.0%",
        "95% interval: 46.8% to 91.1%",
        "1 min 02 s in all",
        "and 8 more",
        "3 of 3: true class",
    ]:
        assert words in page
    assert "http:" not in page
    assert "https:" not in page


def test_sections_without_facts_are_omitted(bare, changed):
    page = render(bare)
    assert Outline(page).headings == ["Result", "Classes", "Confusion", "Images", "Calibration"]
    assert "<img" not in page
    assert "image 0" in page
    assert "Nothing was found." in render(changed(audit=[]))


@pytest.mark.parametrize(("images", "classes"), [(1, 1), (1, 2), (2, 7), (3, 50)])
def test_the_smallest_runs(images, classes):
    rng = np.random.default_rng(0)
    labels = np.arange(images) % classes
    run = Facts("tiny", [str(k) for k in range(classes)], labels, rng.normal(size=(images, classes)))
    Outline(render(run))
    Outline(compare([run, run]))
    features = Facts("tiny", run.classes, labels, run.logits, features=np.zeros((images, 1)))
    assert "nan" not in re.sub("<(style|script)>.*?</", "", render(features), flags=re.DOTALL)


def test_images_that_are_damaged_or_gone_have_an_empty_frame(changed, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "damaged.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    names = ["whole", "damaged", "gone"] * 4

    def heat(image: int) -> np.ndarray:
        raise OSError("it is gone")

    page = render(changed(thumbnail=lambda i: Image.open(tmp_path / f"{names[i]}.jpg"), heat_map=heat, features=None))
    cards = page.count('class="card"')
    assert cards == 3 + 9 + 3
    assert page.count("data:image/jpeg") == page.count('<img src="data:') == 1 + 3 + 1
    assert page.count('<span class="photo"></span>') == cards - 5
    assert "data:image/png" not in page


def test_no_mistakes_and_no_hits(changed, facts):
    right = changed(logits=np.eye(3)[facts.labels])
    wrong = changed(logits=-np.eye(3)[facts.labels])
    assert "There are no mistakes." in render(right)
    assert "Least confident hits" not in render(wrong)
    Outline(render(wrong))


@pytest.mark.parametrize("classes", [10, 200, 1000])
def test_size_and_time(classes):
    rng = np.random.default_rng(0)
    images = 5 * classes
    noise = torch.from_numpy(rng.integers(0, 256, (3, 200, 200), dtype=np.uint8))  # the worst of JPEGs
    labels = np.arange(images) % classes
    run = Facts(
        "large",
        [f"Ünïcode class of a long name, & such as biologists use, {index}" for index in range(classes)],
        labels,
        rng.normal(size=(images, classes)) + 3 * np.eye(classes)[labels],
        names=[f"val/a folder of quite a long name/and another/IMG_2026_{index:06d}.jpg" for index in range(images)],
        thumbnail=lambda image: noise,
        heat_map=lambda image: noise[0, :14, :14],
        features=rng.normal(size=(images, 512)).astype(np.float32),
        history=[{"epoch": epoch, "val": {"loss": 1 / epoch}, "lr": 0.1} for epoch in range(1, 1001)],
        settings={f"setting {index}": index for index in range(100)},
    )
    start = time.perf_counter()
    page = render(run)
    assert time.perf_counter() - start < 60
    assert len(page.encode()) < 5_000_000
    assert Outline(page).tags.count("details") == {10: 1, 200: 3, 1000: 3}[classes]


def test_compare(facts, changed):
    logits = facts.logits.copy()
    logits[0] = [9, 0, 0]  # right now
    logits[4] = [9, 0, 0]  # wrong now
    order = np.arange(12)[::-1]
    names, labels = [facts.names[i] for i in order], facts.labels[order]
    other = changed(title="other", names=names, labels=labels, logits=logits[order], settings={"seed": 1})
    page = compare([facts, other])
    assert "Of 12 images in common, both classify 8 correctly and neither 2." in page
    assert "1 became right and 1 became wrong" in page
    assert "p = 1)" in page
    assert ">seed</td>" in page
    assert ">model.train</td>" in page
    first, second = paired(facts, other)
    assert first.tolist() == (11 - second).tolist() == list(range(12))


def test_compare_pairs_only_the_same_images(facts, bare, changed):
    assert "no validation image in common" in compare([facts, changed(names=[f"new {i}" for i in range(12)])])
    relabelled = changed(labels=(facts.labels + (np.arange(12) == 3)) % 3)
    assert 3 not in paired(facts, relabelled)[0]
    assert len(paired(facts, relabelled)[0]) == 11
    assert len(paired(bare, bare)[0]) == 12
    shorter = Facts("short", bare.classes, bare.labels[:6], bare.logits[:6])
    assert len(paired(bare, shorter)[0]) == 0
    with pytest.raises(UsageError, match="1 run to compare: expected two or more"):
        compare([facts])


def test_typical_images():
    labels = np.array([0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 2, 0, 0, 3])
    own = np.array([0.6, 0.7, 0.3, 0.1, 0.2, 0.9])
    assert typical(None, own, labels, predicted) == [1, 4, 5]
    features = np.array([[0.0], [9], [1], [1], [2], [5]])
    assert typical(features, own, labels, predicted)[0] == 0  # image 2 is nearer to the mean, but was not classified so


@pytest.mark.parametrize(
    ("facts", "error", "words"),
    [
        (
            {"labels": [0, 1], "logits": [[0.0, 1.0]]},
            UsageError,
            r"labels of shape \(2,\) and logits of shape \(1, 2\)",
        ),
        ({"labels": [0], "logits": [[0.0]]}, UsageError, "for 2 classes"),
        ({"labels": [0], "logits": [[0.0, 1.0]], "names": ["a", "b"]}, UsageError, "2 names for 1 image:"),
        ({"labels": [0], "logits": [[0.0, 1.0]], "features": np.zeros(1)}, UsageError, "features of shape"),
        ({"labels": [2], "logits": [[0.0, 1.0]], "names": ["a.jpg"]}, DataError, "a.jpg has label 2: expected 0 to 1"),
        (
            {"labels": [0], "logits": [[0.0, np.nan]]},
            DataError,
            "1 of 1 images are not finite, the first being image 0",
        ),
        ({"labels": np.zeros(0, int), "logits": np.zeros((0, 2))}, DataError, "there are no validation images"),
    ],
)
def test_facts_that_do_not_fit(facts, error, words):
    with pytest.raises(error, match=words):
        Facts("a run", ["a", "b"], **facts)


def test_a_row_that_does_not_fit_its_table():
    with pytest.raises(UsageError, match="a row has 1 value, and there are 2 columns"):
        Table(["a", "b"], [[1]])


def test_arrays_become_those_of_numpy():
    assert as_numpy(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).dtype == np.float32
    assert as_numpy(np.ones(2, np.float16)).dtype == np.float32
    assert as_numpy(torch.ones(2, dtype=torch.double)).dtype == np.float64
    assert as_numpy([1, 2]).tolist() == [1, 2]


def test_text_is_escaped_and_cut():
    assert text("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
    assert text("a" * 10 + "b" * 10, limit=6) == "aaa…bbb"
    assert text("a\nb\x00c") == "a\nb\ufffdc"


def test_numbers_as_text():
    assert [number(value) for value in (1234567, 0.123456, True, None, "x", float("nan"))] == [
        "1,234,567",
        "0.1235",
        "True",
        "",
        "x",
        "–",
    ]
    assert [percent(share) for share in (0, 1e-9, 0.1234, 0.9999, 1, float("nan"))] == [
        "0.0%",
        "<0.1%",
        "12.3%",
        ">99.9%",
        "100.0%",
        "–",
    ]
    assert [duration(seconds) for seconds in (0.314, 12.34, 200, 7500)] == [
        "0.31 s",
        "12.3 s",
        "3 min 20 s",
        "2 h 05 min",
    ]


def test_tables_are_capped_and_sorted_by_their_values():
    shown = table(["name", "share"], [["a", 0.5], ["b", float("nan")], ["c", 1]], cap=2)
    assert shown.count("<tr") == 3
    assert "Rows that are not shown: 1." in shown
    assert 'data-v="0.5">0.5<' in shown
    assert 'data-v="-1">–<' in shown


def test_the_page_of_a_run_is_always_the_same(facts, changed):
    fixed = changed(heat_map=lambda image: np.eye(3))
    assert render(fixed) == render(fixed)
    assert answers(facts.logits, facts.labels).hits.sum() == 9
