"""The lines of docs/change-it.md, made as changes: trained, killed, resumed, used. Its table says how many they are."""

import ast
import re
import textwrap

import numpy as np
import pytest
from forks import SMALL, train, use
from launching import ROOT

PAGE = (ROOT / "docs" / "change-it.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
BLOCKS = dict(re.findall(r"^<!-- change: (\w+) -->\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
DATA = {"csv": "table.csv", "dataset": "arrays.npz", "grey": "grey", "deep": "deep"}
IMAGES = {"grey": "grey/a/0.png", "deep": "deep/a/0.png"}
OPTIONS = {"network": ["--train", "all"], "grey": ["--train", "head", "conv1"], "rotation": ["--augment", "flip"]}
LINE = re.compile(r"^( +)logs\.end_epoch\(loop, best=best\)\n", re.MULTILINE)


def lines_of(text):
    """Lines that are neither blank nor a comment nor of a docstring."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    words = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in words for number, line in lines)


def deep():
    """The grey images, with the two lines of the 16-bit ones."""
    text = BLOCKS["grey"]
    for new in BLOCKS["deep"].splitlines(keepends=True):
        (old,) = [line for line in text.splitlines(keepends=True) if line.split("(")[0] == new.split("(")[0]]
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def data(pictures):
    (pictures / "table.csv").write_text("file,class\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(24)))
    images = np.random.default_rng(0).integers(0, 256, (24, 40, 48, 3), dtype=np.uint8)
    images[1::2] //= 2
    np.savez(pictures / "arrays.npz", images=images, labels=np.arange(24) % 2)
    return pictures


@pytest.mark.parametrize("name", BLOCKS)
def test_a_change_is_made_with_the_lines_of_the_page(name, data, program, tmp_path):
    options = ["--data", data / DATA.get(name, "classes"), *SMALL, *OPTIONS.get(name, [])]
    recipe, where = [], {}
    if name == "epoch":
        text = (ROOT / "train.py").read_text()
        (line,) = LINE.finditer(text)
        where = {"target": tmp_path / "train.py"}
        block = textwrap.indent(BLOCKS[name], line[1])
        where["target"].write_text(text[: line.end()] + block + text[line.end() :])
    else:
        file = tmp_path / f"my_{name}.py"
        file.write_text(deep() if name == "deep" else BLOCKS[name])
        recipe = ["--recipe", file]
    state = train(program, tmp_path, options, recipe=recipe, **where)
    if name in ("dataset", "grey", "deep", "network", "head", "prediction"):
        row = use(program, tmp_path, recipe=recipe, image=data / IMAGES.get(name, "0.png"))
        assert ("answer" if name == "prediction" else "class") in row
    if name in ("grey", "deep"):
        done = program("evaluate", "--run", "run", "--data", data / name, *recipe, cwd=tmp_path, target="trainer")
        assert done.returncode == 0, done.stderr
    assert {"f1": "f1", "metric": "top2"}.get(name, "loss") in state.metrics["val"]
    if name == "epoch":
        rows = [line.split() for line in (tmp_path / "run" / "mine.txt").read_text().splitlines()]
        assert [int(row[0]) for row in rows] == [1, 2, 3]


def test_each_row_of_the_table_has_its_lines_and_its_place():
    sections = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-"): body for text, body in SECTIONS}
    rows = re.findall(r"^\| ([^|*]+) \| (\d+|2 commands) \| \[.+?\]\((.+?)\)(?:, \[.+\))? \|$", PAGE, re.MULTILINE)
    for change, count, place in rows:
        if place.startswith("#"):
            (name,) = re.findall(r"<!-- change: (\w+) -->", sections.pop(place[1:]))
            text = deep() if name == "deep" else BLOCKS[name]
        else:
            text = (ROOT / "docs" / place).read_text()
        assert count in ("2 commands", str(lines_of(text))), f"{change}: {lines_of(text)} lines"
    assert not sections, "without a row"


def test_links_of_the_readme_lead_to_a_heading():
    names = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text, _ in SECTIONS}
    links = set(re.findall(r"docs/change-it\.md#([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert links
    assert links <= names


def test_every_example_is_in_the_table():
    for path in (ROOT / "examples").glob("*.py"):
        assert path.stem == "photos" or f"(../examples/{path.name})" in PAGE, path
