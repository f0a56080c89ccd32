"""How a run ends: its status, its last checkpoint, and why it failed."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate import Accelerator

from trainer.config import Config, to_dict
from trainer.errors import NumericalError, Preempted
from trainer.processes.identity import Identity
from trainer.run.folder import Run
from trainer.run.outcome import training, write_status

FOLDER = Path("out")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Loop:
    """As much of a trainer as is used here; its checkpoints are empty."""

    def __init__(self):
        self.accelerator = Accelerator(cpu=True)
        self.metrics = {"best": {"loss": 1.0, "epoch": 1}}
        self.step, self.epoch, self.saved, self.saves = 0, 0, True, []

    def save(self, folder: Path, *, best: bool = False, keep: int = 2, final: bool = False) -> Path:
        self.saves.append((folder, keep, final))
        self.saved = True
        return folder / f"step-{self.step:08d}.pt"


def train(loop: Loop, stop: SimpleNamespace | None = None, reports: dict | None = None):
    stop = stop or SimpleNamespace(armed=False, close=lambda: None)
    names = {"reports": reports or {}, "name_of": lambda index: f"image {index}"}
    return training(Run(FOLDER), loop, stop, config=Config(), **names)


def status() -> dict:
    return json.loads((FOLDER / "status.json").read_text())


def test_a_run_takes_its_folder_and_completes():
    loop, stop = Loop(), SimpleNamespace(armed=False, close=lambda: None)
    with train(loop, stop, {"freeze_plan.json": {"rules": []}, "weights_report.json": None}):
        assert stop.armed, "from here on there is something to save"
        assert loop.metrics["best"] == {}, "the file of that epoch is not there"
        assert (status()["status"], status()["step"]) == ("running", 0)
        assert status()["launcher"] == Identity.of(os.getppid()).to_dict()
        loop.step, loop.epoch = 12, 3
    assert (status()["status"], status()["step"], status()["epoch"]) == ("completed", 12, 3)
    assert loop.saves == []
    assert yaml.safe_load((FOLDER / "config.yaml").read_text()) == to_dict(Config())
    assert sorted(os.listdir(FOLDER)) == ["checkpoints", "config.yaml", "freeze_plan.json", "lock", "status.json"]


def test_what_could_not_be_saved_before_is_saved_at_the_end():
    loop = Loop()
    with train(loop):
        loop.saved = False
    assert loop.saves == [(FOLDER / "checkpoints", 2, True)]
    assert status()["status"] == "completed"


def test_a_run_that_is_told_to_stop_is_saved_and_says_how_to_continue():
    loop = Loop()
    loop.step = 7
    with pytest.raises(Preempted) as stopped, train(loop):
        raise Preempted("SIGTERM")
    assert str(stopped.value) == (
        "stopped by SIGTERM; saved as out/checkpoints/step-00000007.pt. "
        "Continue with --resume out/checkpoints/step-00000007.pt"
    )
    assert loop.saves == [(FOLDER / "checkpoints", 2, True)]
    found = status()
    assert (found["status"], found["reason"], found["step"]) == ("preempted", "SIGTERM", 7)
    assert found["checkpoint"] == "step-00000007.pt"
    assert not (FOLDER / "error.json").exists()


def test_a_run_that_is_told_to_stop_and_cannot_be_saved_has_failed():
    loop = Loop()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    loop.save = full
    with pytest.raises(OSError, match="No space left"), train(loop):
        raise Preempted("SIGTERM")
    assert status()["status"] == "failed"
    assert "No space left on device" in status()["reason"]


def test_a_run_that_fails_says_why_and_names_the_images_of_the_step():
    loop = Loop()
    loop.step = 4
    with pytest.raises(NumericalError, match="not finite"), train(loop):
        raise NumericalError("the loss is not finite", step=5, samples=[3, 8])
    found = status()
    assert (found["status"], found["reason"]) == ("failed", "NumericalError: the loss is not finite")
    assert (found["step"], found["rank"], found["type"]) == (4, 0, "NumericalError")
    assert found["samples"] == {"3": "image 3", "8": "image 8"}
    assert loop.saves == [], "what went wrong is not saved"
    error = json.loads((FOLDER / "error.json").read_text())
    assert (error["rank"], error["type"], error["message"]) == (0, "NumericalError", "the loss is not finite")
    assert "raise NumericalError" in error["traceback"]
    with train(loop):
        assert not (FOLDER / "error.json").exists(), "it is not about this try"


def test_a_folder_that_is_deleted_meanwhile_does_not_hide_why_the_run_failed():
    with pytest.raises(ZeroDivisionError), train(Loop()):
        _ = len(os.listdir(FOLDER.rename("elsewhere") / "checkpoints")) / 0
    assert not FOLDER.exists()


def test_a_status_counts_restarts(monkeypatch):
    FOLDER.mkdir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    write_status(FOLDER, "running", step=3)
    assert status() == {"status": "running", "step": 3, "restarts": 2, "launcher": Identity.of(os.getppid()).to_dict()}


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    write_status(tmp_path / "gone", "failed", reason="the disk")
    assert "cannot write status.json, which would say failed" in caplog.text


def test_on_a_full_disk_the_old_status_is_overwritten_in_place(monkeypatch, caplog):
    FOLDER.mkdir()
    write_status(FOLDER, "running", reason="long " * 100)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.storage.files.replace", full)
    write_status(FOLDER, "failed", reason="the disk")
    assert (status()["status"], status()["reason"]) == ("failed", "the disk")
    assert caplog.text == ""
