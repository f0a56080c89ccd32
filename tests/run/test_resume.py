"""Where a run starts, and with which settings."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from states import made_state

from trainer import cli
from trainer.config import Config, OptimConfig, RunConfig, replace, to_dict
from trainer.errors import CheckpointError, UsageError
from trainer.processes.identity import Identity
from trainer.run.folder import Run
from trainer.run.resume import find_run, open_run
from trainer.storage import checkpoint

BEST = {"loss": 0.5, "accuracy": 0.75}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


def parsed(*arguments: object) -> Config:
    return cli.parse(arguments=[str(argument) for argument in arguments])


def found(*arguments: object) -> tuple[Config, Run]:
    return find_run(parsed(*arguments))


def made_run(folder: Path, *arguments: object) -> Path:
    """A run with checkpoints after 10 and 20 steps, the first of them the best."""
    stored = to_dict(parsed(*arguments))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    for step in (10, 20):
        state = made_state(step=step, config=stored, metrics={"val": BEST})
        checkpoint.write(checkpoint.path_of(folder / "checkpoints", step), state)
    shutil.copy(folder / "checkpoints" / "step-00000010.pt", folder / "checkpoints" / "best.pt")
    return folder


@pytest.fixture
def trained() -> Path:
    return made_run(Path("out"), "--lr", "0.5", "--epochs", "40", "--augment", "none", "--batch-size", "32")


def test_resume_auto_takes_the_newest_or_starts(trained):
    config, run = found("--resume", "auto", "--output", "out")
    assert run.source == trained / "checkpoints" / "step-00000020.pt"
    assert (run.state.step, run.stale, run.damaged) == (20, [], [])
    assert config.optim.lr == 0.5
    config, run = found("--resume", "auto", "--output", "new")
    assert (run.path.name, run.source, run.state) == ("new", None, None)
    assert config.optim.lr == "auto"


def test_resume_auto_without_a_folder_takes_the_newest_of_that_name():
    assert found("--resume", "auto")[1].path == Path("runs/digits-resnet18")
    for number in ("", "-2", "-10"):
        made_run(Path(f"runs/digits-resnet18{number}"))
    _, run = found("--resume", "auto")
    assert (run.path.name, run.source.name) == ("digits-resnet18-10", "step-00000020.pt")
    assert found("--resume", "auto", "--model", "resnet34")[1].path == Path("runs/digits-resnet34")


def test_resume_with_a_path_continues_in_its_own_run(trained, tmp_path):
    for path in ("out", "out/checkpoints", "out/checkpoints/step-00000020.pt"):
        config, run = found("--resume", path)
        assert (run.path.absolute(), run.source.name, run.stale) == (tmp_path / "out", "step-00000020.pt", [])
        assert (config.optim.lr, config.run.resume) == (0.5, path)


def test_resume_from_an_older_checkpoint_must_say_what_becomes_of_the_newer(trained):
    with pytest.raises(UsageError, match=r"newer checkpoints than best.pt, such as step-00000020.pt"):
        found("--resume", "out/checkpoints/best.pt")
    _, again = found("--resume", "out/checkpoints/best.pt", "--overwrite")
    assert [path.name for path in again.stale] == ["step-00000020.pt"]
    config, branch = found("--resume", "out/checkpoints/best.pt", "--output", "branch")
    assert (branch.path.name, branch.source.name, branch.stale) == ("branch", "best.pt", [])
    assert config.optim.lr == 0.5


def test_a_checkpoint_that_lies_elsewhere_is_continued_in_a_new_folder(trained, tmp_path):
    made_run(Path("other"), "--data", tmp_path, "--model", "resnet50")
    shutil.copy("other/checkpoints/best.pt", "taken.pt")
    config, run = found("--resume", "taken.pt", "--output", "new")
    assert (run.path.name, run.source.name, config.model.model) == ("new", "taken.pt", "resnet50")
    with pytest.raises(UsageError, match="out holds a run"):
        found("--resume", "taken.pt", "--output", "out")
    _, run = found("--resume", "taken.pt")
    assert run.path == Path(f"runs/{tmp_path.name}-resnet50"), "it is named for what it trains"


def test_continuing_a_run_and_deleting_it_exclude_each_other(trained):
    for output, resume in (("out", "auto"), (None, "out"), ("./out", "out/checkpoints")):
        outputs = [] if output is None else ["--output", output]
        with pytest.raises(UsageError, match="continues out, and --overwrite deletes it: give one of them"):
            found("--resume", resume, "--overwrite", *outputs)
    made_run(Path("other"))
    _, branch = found("--resume", "out", "--output", "other", "--overwrite")
    assert (branch.path.name, branch.source.parent) == ("other", trained / "checkpoints")
    assert {"step-00000010.pt", "step-00000020.pt", "best.pt"} <= {path.name for path in branch.stale}


def test_nothing_to_resume(tmp_path):
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/config.yaml").touch()
    for path in ("out", "out/checkpoints"):
        with pytest.raises(UsageError, match=r"out has no checkpoint yet; start it .* --resume auto --output out"):
            found("--resume", path)
    assert found("--resume", "auto", "--output", "out")[1].source is None, "as it says"
    with pytest.raises(UsageError, match=r"--resume missing\.pt: there is no such checkpoint or run"):
        found("--resume", "missing.pt")
    Path("empty").mkdir()
    with pytest.raises(UsageError, match="empty is neither a checkpoint nor the folder of a run"):
        found("--resume", "empty")
    Path("some.pt").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"some\.pt is not a checkpoint: 7 bytes"):
        found("--resume", "some.pt")


def test_a_new_run_may_not_take_the_place_of_another(trained):
    with pytest.raises(UsageError, match=r"out holds a run.*--resume auto.*--overwrite.*--output"):
        found("--output", "out")
    for resume in ([], ["--resume", "auto"]):
        Path("file").touch()
        with pytest.raises(UsageError, match="--output file is a file; expected a folder"):
            found("--output", "file", *resume)


def test_a_resumed_run_keeps_its_settings_and_says_what_changes(trained, capsys):
    config, _ = found("--resume", "auto", "--output", "out", "--epochs", "50", "--time-limit", "9")
    assert (config.optim.lr, config.optim.batch_size, config.optim.epochs) == (0.5, 32, 50)
    assert (config.run.time_limit, config.run.output, config.run.resume) == (9, "out", "auto")
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "        the cosine schedule is stretched over 50 epochs",
        "resume: epochs: 40 → 50",
        "resume: time_limit: None → 9.0",
    ]
    found("--resume", "out", "--lr", "0.5", "--batch-size", "32", "--epochs", "40")
    assert capsys.readouterr().out == "", "nothing changes"
    made_run(Path("constant"), "--schedule", "constant", "--epochs", "40")
    found("--resume", "constant", "--epochs", "50")
    assert capsys.readouterr().out == "resume: epochs: 40 → 50\n", "no schedule to stretch"


def test_settings_come_from_the_checkpoint_alone(trained):
    stored = yaml.safe_load((trained / "config.yaml").read_text())
    stored["optim"]["lr"] = 9.0
    for text in (yaml.safe_dump(stored), "data: {data: digits}", "{", None):
        (trained / "config.yaml").unlink()
        (trained / "config.yaml").touch() if text is None else (trained / "config.yaml").write_text(text)
        for resume in (["auto", "--output", "out"], ["out"], ["out/checkpoints"]):
            assert found("--resume", *resume)[0].optim.lr == 0.5
    (trained / "config.yaml").unlink()
    for resume in (["auto", "--output", "out"], ["out"], ["out/checkpoints"], ["out/checkpoints/step-00000020.pt"]):
        config, run = found("--resume", *resume)
        assert (config.optim.lr, run.path.absolute()) == (0.5, trained.absolute())


def test_a_setting_that_is_given_again_with_its_default_is_given(trained):
    assert found("--resume", "out", "--lr", "0.1")[0].optim.lr == 0.1, "the demo's"
    Path("settings.yaml").write_text("optim: {lr: 0.001}\nrun: {keep: 3}")
    config, _ = found("--resume", "out", "--config", "settings.yaml")
    assert (config.optim.lr, config.run.keep, config.optim.batch_size) == (0.001, 3, 32), "by a file, too"
    assert found("--resume", "out", "--config", "settings.yaml", "--lr", "0.7")[0].optim.lr == 0.7


def test_the_settings_of_a_config_made_in_python_are_those_that_differ(trained):
    config = Config(optim=OptimConfig(epochs=50), run=RunConfig(resume="out"))
    resumed, run = find_run(config)
    assert (resumed.optim.epochs, resumed.optim.lr, resumed.data.augment) == (50, 0.5, "none")
    assert (run.state.step, resumed.run.resume) == (20, "out")
    named = dataclasses.replace(
        config, given=frozenset({"batch_size", "lr"}), run=RunConfig(resume="out", override=True)
    )
    resumed, _ = find_run(named)
    assert (resumed.optim.epochs, resumed.optim.batch_size) == (40, OptimConfig().batch_size)
    assert resumed.optim.lr == 0.5, "auto is what was found"
    assert resumed.run.resume == "out", "how it is started is never taken from the checkpoint"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch-size", "64"], "the run has batch_size 32, and --batch-size is 64"),
        (["--seed", "1"], "the run has seed 0, and --seed is 1"),
        (["--image-size", "32"], "the run has image_size 64, and --image-size is 32"),
        (["--augment", "flip"], "the run has augment 'none', and --augment is 'flip'"),
        (["--augment", "flip", "--views", "4"], "the run has (augment|views) "),
        (["--val-fraction", "0.5"], r"the run has val_fraction 0\.2, and --val-fraction is 0\.5"),
        (["--bad-images", "skip"], "the run has bad_images 'stop', and --bad-images is 'skip'"),
        (["--model", "resnet34"], "the run has model 'resnet18', and --model is 'resnet34'"),
        (["--train", "all"], r"the run has train \['head'\], and --train is \['all'\]"),
        (["--optimizer", "sgd"], "the run has optimizer 'adamw', and --optimizer is 'sgd'"),
    ],
)
def test_a_resumed_run_stays_the_same_run(trained, capsys, flags, says):
    with pytest.raises(UsageError, match=says) as error:
        found("--resume", "out", *flags)
    assert f"Omit {flags[0]} to continue the run as it is, omit --resume to start a new run, or " in str(error.value)
    if flags[0] in ("--batch-size", "--seed", "--image-size", "--augment"):
        assert str(error.value).endswith("or give --override as well.")
        config, _ = found("--resume", "out", *flags, "--override")
        assert "→" in capsys.readouterr().out
        assert config.optim.lr == 0.5
    else:  # the checkpoint would not fit
        assert str(error.value).endswith("or start that run with --weights CHECKPOINT.")
        with pytest.raises(UsageError, match=says):
            found("--resume", "out", *flags, "--override")


def test_settings_may_contradict_the_demo_but_not_the_run(trained, tmp_path):
    made_run(Path("sgd"), "--data", tmp_path, "--optimizer", "sgd", "--momentum", "0.8")
    assert found("--resume", "sgd", "--momentum", "0.95")[0].optim.momentum == 0.95
    assert found("--resume", "sgd", "--views", "4", "--override")[0].speed.views == 4
    with pytest.raises((UsageError, SystemExit)):
        found("--resume", "out", "--momentum", "0.5")
    with pytest.raises(UsageError, match="--augment none makes all views equal"):
        find_run(replace(Config(), resume="out", views=4, override=True))


def test_the_data_of_a_run_may_have_moved(tmp_path, capsys):
    Path("photos").mkdir()
    made_run(Path("out"), "--data", "photos")
    found("--resume", "out", "--data", "photos")
    assert capsys.readouterr().out == "", "it is stored as an absolute path"
    Path("photos").rename("moved")
    assert found("--resume", "out", "--data", "moved")[0].data.data == "moved"
    assert capsys.readouterr().out == f"resume: data: {tmp_path}/photos → {tmp_path}/moved\n"


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"optim": {"lr": "fast"}}, r"the settings in out/checkpoints/step-00000020\.pt: optim\.lr is 'fast'"),
        ({"model": {}}, r"the settings in out/checkpoints/step-00000020\.pt name no model"),
    ],
)
def test_a_setting_of_a_run_that_does_not_fit_is_named(trained, stored, says):
    path = checkpoint.path_of(trained / "checkpoints", 20)
    checkpoint.write(path, made_state(step=20, config=to_dict(parsed()) | stored))
    with pytest.raises(UsageError, match=says):
        found("--resume", "out")


def test_the_settings_of_a_run_cannot_say_where_to_write(trained):
    path, stored = checkpoint.path_of(trained / "checkpoints", 20), to_dict(parsed())
    stored["run"] |= {"output": "/etc", "overwrite": True, "override": True, "config": "other.yaml", "resume": "x"}
    checkpoint.write(path, made_state(step=20, config=stored))
    config, run = found("--resume", "out")
    assert (run.path.name, run.stale) == ("out", [])
    start = config.run.output, config.run.overwrite, config.run.override, config.run.config, config.run.resume
    assert start == (None, False, False, None, "out")


def test_a_launcher_that_starts_us_again_means_the_run_that_it_started(trained, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    file = trained / "checkpoints" / "step-00000010.pt"
    given = [["--output", "out", "--overwrite"], ["--resume", "out"], ["--resume", file]]
    (trained / "status.json").write_text(json.dumps({"launcher": Identity.of(os.getppid()).to_dict()}))
    for arguments in given:
        config, run = found(*arguments)
        assert (run.path.absolute(), run.source.name, run.stale) == (trained.absolute(), "step-00000020.pt", [])
        assert (config.run.resume, Path(config.run.output).absolute()) == ("auto", trained.absolute())
        assert (config.run.overwrite, config.optim.lr) == (False, 0.5)
    for status in (json.dumps({"launcher": Identity.of().to_dict()}), "[]", "{", "{}"):
        (trained / "status.json").write_text(status)
        config, run = found("--output", "out", "--overwrite")
        assert (run.source, config.run.resume, config.optim.lr) == (None, None, "auto")
        assert found("--resume", "out")[0].run.resume == "out", "as given"
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    (trained / "status.json").write_text(json.dumps({"launcher": Identity.of(os.getppid()).to_dict()}))
    assert found("--output", "out", "--overwrite")[1].source is None, "the same shell starts another run"


def test_a_run_without_a_name_is_found_again_after_a_restart(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for number in ("", "-2"):
        made_run(Path(f"runs/digits-resnet18{number}"))
    Path("runs/digits-resnet18-2/status.json").write_text(json.dumps({"launcher": Identity.of(os.getppid()).to_dict()}))
    config, run = found()
    assert (run.path.name, run.source.name) == ("digits-resnet18-2", "step-00000020.pt")
    assert config.run.resume == "auto"
    Path("runs/digits-resnet18-2/status.json").unlink()
    assert found()[1].path.name == "digits-resnet18-3", "it had not come to its folder"


def test_a_real_run_that_lost_its_settings_has_them_in_its_checkpoints(digits_run):
    shutil.copytree(digits_run, "copy")
    Path("copy/config.yaml").unlink()
    for resume in (["auto", "--output", "copy"], ["copy"]):
        config, run = found("--resume", *resume)
        assert (config.optim.epochs, run.state.epoch) == (2, 2)


@pytest.mark.parametrize("resume", [["--resume", "auto", "--output", "out"], ["--resume", "out"]])
def test_damaged_checkpoints_are_skipped_and_renamed_when_the_run_begins(trained, caplog, resume):
    newest = trained / "checkpoints" / "step-00000020.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    _, run = found(*resume)
    assert (run.source.name, run.damaged) == ("step-00000010.pt", [newest.absolute()])
    assert "step-00000020.pt is truncated" in caplog.text
    assert newest.exists(), "the run may still fail to start"


def test_a_damaged_checkpoint_that_is_named_is_not_replaced_by_another(trained):
    newest = trained / "checkpoints" / "step-00000020.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000020\.pt is truncated"):
        found("--resume", newest)
    for path in (trained / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in out/checkpoints can be used"):
        found("--resume", "auto", "--output", "out")


def test_looking_for_a_run_writes_nothing(trained):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    for resume in ("auto", "out", "out/checkpoints/step-00000020.pt"):
        found("--resume", resume, "--output", "out")
    found("--output", "new")
    found()
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert os.listdir() == ["out"]


HOLD = "import sys; from pathlib import Path; from trainer.run.folder import Run; "
HOLD += "Run(Path('out')).lock(); print(flush=True); sys.stdin.read()"


def test_a_folder_that_is_in_use_or_cannot_be_written_is_refused_at_once(trained, monkeypatch):
    other = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    try:
        with pytest.raises(UsageError, match=rf"another run works in out: host .*, pid {other.pid}, since 20"):
            found("--resume", "out")
    finally:
        other.kill()
        other.communicate()
    assert found("--resume", "out")[1].source.name == "step-00000020.pt"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="cannot be written, so neither can the run's folder: 'out'"):
        found("--resume", "out")


def test_all_processes_are_given_what_the_main_one_found(trained):
    config, run = open_run(Accelerator(cpu=True), parsed("--resume", "out"))
    assert (config.optim.lr, run.state.step) == (0.5, 20)
    with pytest.raises(UsageError, match="no such checkpoint or run"):
        open_run(Accelerator(cpu=True), parsed("--resume", "missing"))


def test_resume_auto_says_that_a_new_run_starts(capsys):
    found("--resume", "auto", "--output", "fresh")
    assert capsys.readouterr().out == "resume  there is no checkpoint in fresh yet: a new run\n"
    found("--output", "fresh")
    assert capsys.readouterr().out == ""
