import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import checkpoint, rules, run
from trainer.errors import CheckpointError, UsageError
from trainer.freezing import FreezePlan
from trainer.weights import Report


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _begin(folder: run.RunFolder):
    folder.begin({"optim": {"lr": 0.1}})
    (folder.path / "metrics.jsonl").write_text("{}\n")
    (folder.path / "notes.txt").write_text("mine")
    return folder


def test_runs_without_a_name_are_numbered():
    names = [_begin(run.open_run(None, None, "photos-resnet18")).path.as_posix() for _ in range(3)]
    assert names == ["runs/photos-resnet18", "runs/photos-resnet18-2", "runs/photos-resnet18-3"]
    assert run.find(None, "photos-resnet18").as_posix() == "runs/photos-resnet18-3"
    assert run.find(None, "photos-resnet180").as_posix() == "runs/photos-resnet180"
    assert run.find("elsewhere", "photos-resnet18").as_posix() == "elsewhere"


def test_a_folder_that_holds_a_run_is_refused_with_three_ways_on():
    _begin(run.open_run("out", None, "x"))
    with pytest.raises(UsageError, match=r"out holds a run.*--resume auto.*--overwrite.*--output"):
        run.open_run("out", None, "x")


def test_overwriting_deletes_what_a_run_wrote_but_only_when_the_new_one_begins(caplog):
    old = _begin(run.open_run("out", None, "x"))
    (old.checkpoints / "step-00000001.pt").write_bytes(b"weights")
    (old.checkpoints / "step-00000002.pt.damaged").touch()
    for name in ("features", "export"):
        (old.path / name).mkdir()
    new = run.open_run("out", None, "x", overwrite=True)
    assert (old.checkpoints / "step-00000001.pt").exists(), "the run may still fail to start"
    new.begin({})
    assert sorted(os.listdir("out")) == ["checkpoints", "config.yaml", "export", "lock", "notes.txt"]
    assert "out/export is still that of the run as it was: export anew, or remove it" in caplog.text
    assert list(old.checkpoints.iterdir()) == []


def test_a_run_says_what_it_froze_and_what_became_of_its_weights(tmp_path):
    names = ["loaded", "missing", "unexpected", "shape_differs", "left_out", "set_aside"]
    report = Report("x.pth", **{name: [name] for name in names}, parameters=(1, 2))
    plan = FreezePlan(("fc",), trainable=("fc.bias",), frozen=("conv.weight",), counts=(1, 2))
    run.open_run("out", None, "x").begin({}, plan=plan, report=report)
    assert json.loads((tmp_path / "out" / "weights_report.json").read_text())["coverage"] == 0.5
    assert rules.read(tmp_path / "out" / "freeze_plan.json") == ("freeze:conv.weight", "all")
    run.open_run("out", None, "x", overwrite=True).begin({}, plan=plan)
    assert not (tmp_path / "out" / "weights_report.json").exists(), "this one is not about that file"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        run.open_run("out", None, "x")


@pytest.fixture
def trained(monkeypatch):
    """A run with checkpoints after 10 and 20 steps, the first of them the best."""
    folder = _begin(run.open_run("out", None, "x"))
    monkeypatch.setattr(checkpoint, "KEYS", {"format", "step", "config"})
    settings = {"optim": {"lr": 0.2, "epochs": 3}}
    for step in (10, 20):
        checkpoint.write(checkpoint.path_of(folder.checkpoints, step), {"step": step, "config": settings})
    shutil.copy(checkpoint.path_of(folder.checkpoints, 10), folder.checkpoints / "best.pt")
    return folder


def test_resume_auto_takes_the_newest_or_starts(trained):
    assert run.open_run("out", "auto", "x").source == trained.checkpoints / "step-00000020.pt"
    fresh = run.open_run("new", "auto", "x")
    assert (fresh.path.name, fresh.source) == ("new", None)


def test_resume_with_a_path_continues_in_its_own_run(trained, tmp_path):
    for path in ("out", "out/checkpoints", "out/checkpoints/step-00000020.pt"):
        again = run.open_run(None, path, "x")
        assert (again.path.absolute(), again.stale) == (tmp_path / "out", [])
        assert again.source.name == "step-00000020.pt"


def test_resume_from_an_older_checkpoint_must_say_what_becomes_of_the_newer(trained):
    with pytest.raises(UsageError, match=r"newer checkpoints than best.pt, such as step-00000020.pt"):
        run.open_run(None, "out/checkpoints/best.pt", "x")
    again = run.open_run(None, "out/checkpoints/best.pt", "x", overwrite=True)
    assert [path.name for path in again.stale] == ["step-00000020.pt"]
    branch = run.open_run("branch", "out/checkpoints/best.pt", "x")
    assert (branch.path.name, branch.source.name, branch.stale) == ("branch", "best.pt", [])


def test_going_on_with_a_run_and_deleting_it_exclude_each_other(trained):
    for output, resume in (("out", "auto"), (None, "out"), ("./out", "out/checkpoints")):
        with pytest.raises(UsageError, match="goes on with out, --overwrite deletes it: give one of them"):
            run.open_run(output, resume, "x", overwrite=True)
    _begin(run.open_run("other", None, "x"))
    branch = run.open_run("other", "out", "x", overwrite=True)
    assert (branch.path.name, branch.source.parent) == ("other", trained.checkpoints)


def test_resume_without_a_checkpoint(tmp_path):
    _begin(run.open_run("out", None, "x"))
    for path in ("out", "out/checkpoints"):
        with pytest.raises(UsageError, match=r"out has no checkpoint yet; start it .* --resume auto --output out"):
            run.open_run(None, path, "x")
    assert run.open_run("out", "auto", "x").source is None, "as it says"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither a checkpoint nor the folder of a run"):
        run.stored_config("empty", None, "x", whole={})


def test_stored_settings_come_from_the_run_and_what_it_lost_from_the_checkpoint(trained):
    for whole, found in (({"optim": {"lr": 0}}, {"lr": 0.1}), ({"optim": {"epochs": 0}}, {"lr": 0.1, "epochs": 3})):
        for resume, output in (("auto", "out"), ("out", None), ("out/checkpoints", None)):
            assert run.stored_config(resume, output, "x", whole=whole) == {"optim": found}
        best = run.stored_config("out/checkpoints/best.pt", None, "x", whole=whole)
        assert best == {"optim": {"lr": 0.2, "epochs": 3}}
        assert run.stored_config("auto", "new", "x", whole=whole) == {}


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    for step in (1, 2, 3):
        run.append_metrics(tmp_path, {"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "torn')
    run.rewind_metrics(tmp_path, step=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    run.rewind_metrics(tmp_path / "nowhere", step=2)


HOLD = "import sys; from pathlib import Path; from trainer.run import RunFolder; "
HOLD += "RunFolder(Path('out')).begin({}); print(flush=True); sys.stdin.read()"


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead():
    waiting = run.open_run("out", None, "x")  # chose the folder before the other one began
    other = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    try:
        for begin in (lambda: run.open_run("out", "auto", "x"), lambda: waiting.begin({})):
            with pytest.raises(UsageError, match=rf"another run works in out: host .*, pid {other.pid}, since 20"):
                begin()
    finally:
        other.kill()
        other.communicate()
    run.open_run("out", "auto", "x").begin({})  # a dead process holds no lock, whatever the file says
    assert f"pid {os.getpid()}, since" in (waiting.path / "lock").read_text()


def test_a_run_that_came_and_went_meanwhile_is_noticed(trained):
    again = run.open_run("out", "auto", "x")
    checkpoint.write(checkpoint.path_of(trained.checkpoints, 30), {"step": 30, "config": {}})
    with pytest.raises(UsageError, match="another run has worked in out meanwhile; start again"):
        again.begin({})


def test_looking_for_a_run_writes_nothing(trained):
    before = {path: path.stat().st_mtime_ns for path in [trained.path, *trained.path.rglob("*")]}
    for resume in ("auto", "out", "out/checkpoints/step-00000020.pt"):
        run.open_run("out", resume, "x")
    run.open_run("new", None, "x")
    assert {path: path.stat().st_mtime_ns for path in [trained.path, *trained.path.rglob("*")]} == before
    assert os.listdir() == ["out"]


@pytest.mark.parametrize("resume", ["auto", "out"])
def test_damaged_checkpoints_are_set_aside_when_the_run_begins(trained, caplog, resume):
    newest = trained.checkpoints / "step-00000020.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = run.open_run("out", resume, "x")
    assert again.source.name == "step-00000010.pt"
    assert "step-00000020.pt is truncated" in caplog.text
    assert newest.exists(), "the run may still fail to start"
    again.begin({})
    assert sorted(os.listdir(again.checkpoints)) == ["best.pt", "step-00000010.pt", "step-00000020.pt.damaged"]


def test_a_damaged_checkpoint_that_is_named_is_not_replaced_by_another(trained):
    newest = trained.checkpoints / "step-00000020.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000020\.pt is truncated"):
        run.open_run(None, str(newest), "x")


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "out"):  # permissions mean nothing to root: see test_faults.py, too
        monkeypatch.setattr(os, "access", lambda asked, mode, path=path: Path(asked) != path)
        with pytest.raises(OSError, match="cannot be written, so neither can the run's folder: 'out'"):
            run.open_run("out", None, "x")
        (tmp_path / "out").mkdir(exist_ok=True)


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    run.RunFolder(tmp_path / "gone").status("failed", reason="the disk")
    assert "cannot write status.json, which would say failed" in caplog.text
