"""The benchmark suite: its tables, its gate and its parts. The peers themselves are only read here, not run."""

import argparse
import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, search_path

from trainer.cli import flags

PARTS = ROOT / "benchmarks" / "parts.py"
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("benchmarks_run", ROOT / "benchmarks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def rows_of(suite, *, accuracy: float = 0.9, samples: int = 1000) -> list:
    """A template row of three times, its reference, a peer, and a peer that is not installed."""

    def row(name: str, seconds: list[float], accuracy: float, **more):
        found = [{"seconds": value, "accuracy": accuracy, "samples": samples} for value in seconds]
        return suite.Row(name, [], found=found, **more)

    return [
        row("template", [2.0, 4.0, 3.0], accuracy, ours=True, baseline=True),
        row("uncached", [30.0], 0.9, ours=True, reference=True),
        row("plain", [60.0, 66.0, 63.0], 0.8),
        row("fastai", [], 0.0, problem="not installed"),
    ]


def cells_of(text: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_table_shows_medians_ratios_and_what_did_other_work(suite):
    cells = cells_of(suite.table(rows_of(suite)))
    assert cells["template"]["median, s"] == "**3.0**"
    assert cells["template"]["min to max"] == "2.0 to 4.0 (3)"
    assert cells["plain"]["÷ template"] == "21.00"
    assert cells["plain"]["points away"] == "-10.00"
    assert [cells[name]["same"] for name in cells] == ["yes", "reference", "**NO**", "not installed"]


def test_only_the_template_has_to_pass_the_gate(suite):
    assert suite.failures(rows_of(suite)) == []
    assert suite.failures(rows_of(suite, accuracy=0.898)) == []
    assert suite.failures(rows_of(suite, accuracy=0.897)) == ["template: not the same accuracy"]
    assert suite.failures(rows_of(suite, accuracy=0.89, samples=100)) == []  # one image


def test_rows_are_compared_within_their_group(suite):
    rows = rows_of(suite)
    other = rows_of(suite, accuracy=0.5)
    for row in other:
        row.group = "large"
    assert suite.failures(rows + other) == ["large template: not the same accuracy"]
    other[1].found[0]["accuracy"] = 0.5  # its own reference: as good
    assert suite.failures(rows + other) == []


def test_epochs_that_were_not_run_are_counted_like_those_that_were(suite):
    code = "import time; time.sleep(0.4); print('ready', flush=True); time.sleep(0.1); "
    report = code + "print('result', '{\"accuracy\": 0.5}')"
    row = suite.Row("a", [[sys.executable, "-c", report]], share=0.1)
    suite.measure([row], 1)
    assert row.found[0]["seconds"] > 0.4 + 10 * 0.1
    assert row.found[0]["seconds"] == pytest.approx(row.found[0]["ready"] + 10 * 0.1, abs=0.9)
    assert "accuracy" not in row.found[0]


def test_measures_interleaved_and_reads_what_a_process_reports(suite):
    order = []
    report = 'print(\'ready\'); print(\'result\', \'{"accuracy": 0.5, "seconds": 2.0, "extra": {"kB": 3}}\')'
    rows = [
        suite.Row("a", [[sys.executable, "-c", report]], factor=8, prepare=lambda: order.append("a")),
        suite.Row("b", [[sys.executable, "-c", ""]] * 2, prepare=lambda: order.append("b")),
        suite.Row("c", [[sys.executable, "-c", "raise SystemExit('broken')"]], prepare=lambda: order.append("c")),
        suite.Row("d", [[sys.executable, "-c", ""]], once=True, prepare=lambda: order.append("d")),
    ]
    suite.measure(rows, 2)
    assert "".join(order) == "abcdba"
    assert rows[0].median("seconds") == 16.0
    assert rows[0].median("accuracy") == 0.5
    assert 0 < rows[0].median("ready") < rows[1].median("seconds") * 2
    assert rows[2].problem == "exit code 1: broken"
    assert [len(row.found) for row in rows] == [2, 2, 0, 1]


def test_starts_train_py_with_flags_that_it_has(suite, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "gpu_name", lambda: "")
    job = {"data": tmp_path, "weights": tmp_path / "w.pth", "model": "resnet18", "augment": "none", "lr": 0.1}
    args = argparse.Namespace(**suite.USUAL, **job, work=tmp_path, template_flags="")
    (command,) = suite.Bench(args).template("template", "--cache-memory=0").commands
    given = command[command.index(str(ROOT / "train.py")) + 1 :]
    assert {flag.partition("=")[0] for flag in given if flag.startswith("--")} <= flags()


def test_a_table_names_no_folder_of_the_machine(suite, monkeypatch, tmp_path):
    weights, photos = tmp_path / "w.pth", tmp_path / "my photos"
    flags = ["--work", str(tmp_path), f"--out={tmp_path}", f"--weights={weights}", "--data", str(photos), "--lr", "0.1"]
    monkeypatch.setattr(sys, "argv", ["run.py", "steps", *flags])
    bench = suite.Bench(argparse.Namespace())
    bench.notes.append(f"JPEGs from {photos}; {weights}")
    rows = rows_of(suite)
    rows[3].problem = f"exit code 1: no file '{weights}'"
    text = suite.report("steps", bench, rows, load=0.5)
    assert str(tmp_path.parent) not in text
    assert "\n    python benchmarks/run.py steps --weights=w.pth --data 'my photos' --lr 0.1\n" in text
    assert "- JPEGs from my photos; w.pth\n" in text
    assert "| exit code 1: no file 'w.pth' |" in text


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.md")), ids=lambda path: path.stem)
def test_kept_tables_name_no_folder_of_a_machine(suite, path):
    text = path.read_text(encoding="utf-8")
    assert suite.without_folders(text) == text
    assert "--work" not in text


def part(*arguments: object, cwd: Path) -> dict:
    """What a part of the suite reports."""
    env = {**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(PARTS), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    return json.loads(lines[-1].removeprefix("result ")) if lines else {}


def test_steps_are_measured(tmp_path):
    found = part("steps", "template", "--images", 640, "--epochs", 3, cwd=tmp_path)
    assert found["accuracy"] > 0.9
    assert found["extra"]["whole step µs"] > found["seconds"] * 1e6


@pytest.mark.slow
def test_other_parts_are_measured(tmp_path):
    photos = tmp_path / "photos"
    inputs = ["--images", 24, "--val", 8, "--classes", 2, "--width", 96, "--height", 80]
    part("photos", *inputs, "--output", photos, cwd=tmp_path)
    part("weights", "--data", photos, "--size", 32, "--output", tmp_path / "weights.pth", cwd=tmp_path)
    assert part("decode", "template", "--data", photos, "--size", 32, "--epochs", 1, cwd=tmp_path)["same"]
    assert part("checkpoint", "template", "--epochs", 1, "--output", tmp_path / "saved", cwd=tmp_path)["same"]
    job = ["--data", photos, "--weights", tmp_path / "weights.pth", "--size", 32]
    assert part("extract", "single", *job, cwd=tmp_path)["accuracy"] > 0.5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_parse(script: Path):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    doc = " ".join(ast.get_docstring(tree).split())
    if script.stem.startswith("peer_"):
        assert "Follows https://" in doc
        assert "Unequal: " in doc


def test_every_peer_has_its_script(suite):
    assert {f"peer_{name}" for name in suite.PEERS} == {path.stem for path in SCRIPTS if path.stem.startswith("peer_")}
