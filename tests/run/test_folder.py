"""The folder of a run: which one a new run takes, and what it changes there when it begins."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from states import made_state

from trainer.errors import UsageError
from trainer.logs import append_metrics, rewind_metrics
from trainer.model import patterns
from trainer.model.freezing import FreezePlan
from trainer.run.folder import Run, check_writable, choose, holds_run, numbered
from trainer.storage import checkpoint

BEST = {"loss": 0.5, "accuracy": 0.75}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def begin(run: Run, **changes: Any) -> dict[str, float]:
    return run.begin({"optim": {"lr": 0.1}}, **{"reports": {}, "best": {}} | changes)


def begun(run: Run) -> Run:
    begin(run)
    (run.path / "metrics.jsonl").write_text("{}\n")
    (run.path / "notes.txt").write_text("mine")
    return run


@pytest.fixture
def trained() -> Run:
    """A run with checkpoints after 10 and 20 steps, the first of them the best."""
    run = begun(choose("out", "x"))
    for step, val in ((10, BEST), (20, {"loss": 0.6, "accuracy": 0.5})):
        state = made_state(step=step, metrics={"val": val, "best": {**BEST, "epoch": 1}})
        checkpoint.write(checkpoint.path_of(run.checkpoints, step), state)
    shutil.copy(checkpoint.path_of(run.checkpoints, 10), run.checkpoints / "best.pt")
    return run


def test_runs_without_a_name_are_numbered():
    names = [begun(choose(None, "photos-resnet18")).path.as_posix() for _ in range(3)]
    assert names == ["runs/photos-resnet18", "runs/photos-resnet18-2", "runs/photos-resnet18-3"]
    for other in ("photos-resnet18-10", "photos-resnet180", "photos-resnet18-x"):
        Path("runs", other).mkdir()
    Path("runs/photos-resnet18-11").touch()
    found = [path.name for path in numbered("photos-resnet18")]
    assert found == ["photos-resnet18", "photos-resnet18-2", "photos-resnet18-3", "photos-resnet18-10"]
    assert choose(None, "photos-resnet18").path.name == "photos-resnet18-4", "-10 is no run"
    assert numbered("else") == []
    newest = choose(None, "photos-resnet18", overwrite=True)
    assert (newest.path.name, [path.name for path in newest.stale]) == ("photos-resnet18-3", ["metrics.jsonl"])


def test_a_folder_that_holds_a_run_is_refused_with_three_ways_on():
    begun(choose("out", "x"))
    with pytest.raises(UsageError, match=r"out holds a run.*--resume auto.*--overwrite.*--output"):
        choose("out", "x")
    Path("notes").mkdir()
    Path("notes/mine.txt").touch()
    assert not holds_run(Path("notes"))
    assert choose("notes", "x").path == Path("notes")


def test_overwriting_deletes_what_a_run_wrote_but_only_when_the_new_one_begins(caplog):
    old = begun(choose("out", "x"))
    (old.checkpoints / "step-00000001.pt").write_bytes(b"weights")
    (old.checkpoints / "best.pt").write_bytes(b"weights")
    (old.checkpoints / "step-00000002.pt.damaged").touch()
    for name in ("features", "tensorboard", "export"):
        (old.path / name).mkdir()
        (old.path / name / "file").touch()
    for name in ("status.json", "error.json"):
        (old.path / name).write_text("{}")
    new = choose("out", "x", overwrite=True)
    assert (old.checkpoints / "step-00000001.pt").exists(), "the run may still fail to start"
    begin(new)
    assert sorted(os.listdir("out")) == ["checkpoints", "config.yaml", "export", "lock", "notes.txt"]
    assert os.listdir("out/export") == ["file"]
    assert "out/export belongs to the overwritten run: export again, or remove it" in caplog.text
    assert list(old.checkpoints.iterdir()) == []


def test_a_run_writes_its_settings_and_its_reports(tmp_path):
    plan = FreezePlan(("fc",), trainable=("fc.bias",), frozen=("conv.weight",), counts=(1, 2))
    reports = {"freeze_plan.json": plan.content(), "weights_report.json": {"coverage": 0.5}}
    choose("out", "x").begin({"data": {"data": "Füße"}}, reports=reports, best={})
    text = (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8")
    assert "Füße" in text
    assert yaml.safe_load(text) == {"data": {"data": "Füße"}}
    assert json.loads((tmp_path / "out" / "weights_report.json").read_text()) == {"coverage": 0.5}
    assert patterns.read(tmp_path / "out" / "freeze_plan.json") == ("freeze:conv.weight", "all")
    begin(choose("out", "x", overwrite=True), reports=reports | {"weights_report.json": None})
    assert not (tmp_path / "out" / "weights_report.json").exists(), "this run loaded no file"
    assert (tmp_path / "out" / "freeze_plan.json").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="--output out is a file; expected a folder"):
        choose("out", "x")


def test_continuing_deletes_the_checkpoints_of_another_future(trained):
    newer = checkpoint.path_of(trained.checkpoints, 20)
    source = checkpoint.path_of(trained.checkpoints, 10)
    run = Run(Path("out"), source, checkpoint.read(source), stale=[newer])
    assert newer.exists()
    assert begin(run, best={**BEST, "epoch": 1}) == {**BEST, "epoch": 1}
    assert sorted(os.listdir(run.checkpoints)) == ["best.pt", "step-00000010.pt"]
    assert (run.path / "metrics.jsonl").exists()


def test_the_best_checkpoint_goes_with_a_run_into_another_folder(trained):
    source = checkpoint.path_of(trained.checkpoints, 20)
    run = Run(Path("branch"), source, checkpoint.read(source))
    assert begin(run, best={**BEST, "epoch": 1}) == {**BEST, "epoch": 1}
    assert (run.checkpoints / "best.pt").read_bytes() == (trained.checkpoints / "best.pt").read_bytes()
    assert os.listdir(run.checkpoints) == ["best.pt"]


@pytest.mark.parametrize("problem", ["of another epoch", "damaged", "missing"])
def test_a_best_checkpoint_that_is_not_the_best_is_none(trained, caplog, problem):
    source, best = checkpoint.path_of(trained.checkpoints, 20), trained.checkpoints / "best.pt"
    if problem == "of another epoch":
        shutil.copy(source, best)
    elif problem == "damaged":
        best.write_bytes(best.read_bytes()[:-1])
    else:
        best.unlink()
    run = Run(Path("out"), source, checkpoint.read(source))
    assert begin(run, best={**BEST, "epoch": 1}) == {}
    assert not best.exists()
    assert ("The best checkpoint so far is not available" in caplog.text) == (problem != "of another epoch")


def test_damaged_checkpoints_are_renamed_when_the_run_begins(trained):
    newest = checkpoint.path_of(trained.checkpoints, 20)
    source = checkpoint.path_of(trained.checkpoints, 10)
    run = Run(Path("out"), source, checkpoint.read(source), damaged=[newest])
    assert newest.exists(), "the run may still fail to start"
    (run.path / "error.json").touch()
    begin(run, best={**BEST, "epoch": 1})
    assert sorted(os.listdir(run.checkpoints)) == ["best.pt", "step-00000010.pt", "step-00000020.pt.damaged"]
    assert not (run.path / "error.json").exists(), "it is not about this try"


def test_the_images_of_the_continued_run_are_known():
    assert Run(Path("out")).data is None
    state = made_state(data={"skipped": [["a.jpg"], []]})
    assert Run(Path("out"), Path("x.pt"), state).data == {"skipped": [["a.jpg"], []]}


def test_metrics_after_the_resumed_epoch_are_dropped(tmp_path):
    for epoch in (1, 2, 3):
        append_metrics(tmp_path, {"epoch": epoch, "step": 10 * epoch})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\nno json\n{"epoch": 2, "torn')
    rewind_metrics(tmp_path, epoch=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 1, "step": 10}, {"epoch": 2, "step": 20}]
    append_metrics(tmp_path, {"epoch": 3})
    assert (tmp_path / "metrics.jsonl").read_text().endswith('"step": 20}\n{"epoch": 3}\n')
    rewind_metrics(tmp_path / "nowhere", epoch=2)
    assert not (tmp_path / "nowhere").exists()


HOLD = "import sys; from pathlib import Path; from trainer.run.folder import Run; "
HOLD += "Run(Path('out')).begin({}, reports={}, best={}); print(flush=True); sys.stdin.read()"


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead():
    waiting = Run(Path("out"))  # chose the folder before the other one began
    other = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    try:
        for attempt in (lambda: waiting.lock(create=False), lambda: begin(waiting)):
            with pytest.raises(UsageError, match=rf"another run works in out: host .*, pid {other.pid}, since 20"):
                attempt()
    finally:
        other.kill()
        other.communicate()
    begin(Run(Path("out")))  # a dead process holds no lock, whatever the file says
    assert f"pid {os.getpid()}, since" in (waiting.path / "lock").read_text()


def test_a_run_that_came_and_went_meanwhile_is_noticed(trained):
    again = Run(Path("out"))
    checkpoint.write(checkpoint.path_of(trained.checkpoints, 30), made_state(step=30))
    with pytest.raises(UsageError, match="another run has worked in out meanwhile; start again"):
        begin(again)


def test_looking_at_a_folder_writes_nothing():
    begun(choose("out", "x"))
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    choose("out", "x", overwrite=True)
    choose(None, "x").lock(create=False)
    choose("new", "x").lock(create=False)
    check_writable(Path("new/deeper"))
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert os.listdir() == ["out"]


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "out"):  # permissions mean nothing to root: see test_faults.py, too
        monkeypatch.setattr(os, "access", lambda asked, mode, path=path: Path(asked) != path)
        with pytest.raises(OSError, match="cannot be written, so neither can the run's folder: 'out'"):
            check_writable(Path("out"))
        (tmp_path / "out").mkdir(exist_ok=True)
    monkeypatch.undo()
    check_writable(tmp_path / "out" / "new")
