import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from trainer import config
from trainer.errors import CheckpointError, UsageError


def test_defaults_are_the_demo():
    settings = config.parse(arguments=[])
    assert (settings.data.data, settings.data.augment, settings.data.image_size) == ("digits", "none", 64)
    assert (settings.model.name, settings.model.weights, settings.model.train) == ("resnet18", "none", ("head",))
    assert config.default_name(settings) == "digits-resnet18"


def test_other_data_has_other_defaults(tmp_path):
    settings = config.parse(arguments=["--data", str(tmp_path), "--model", "resnet50", "--train", "layer4", "fc"])
    assert (settings.data.augment, settings.data.image_size, settings.model.weights) == ("crop", None, "default")
    assert settings.model.train == ("layer4", "fc")
    assert config.default_name(settings) == f"{tmp_path.name}-resnet50"


def test_stored_settings_repeat_the_run_and_flags_override_them(tmp_path):
    settings = config.parse(arguments=["--lr", "0.5", "--clip-norm", "2", "--train", "layer4", "fc", "--seed", "3"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(settings)))
    again = config.parse(arguments=["--config", str(path)])
    assert config.to_dict(again) == config.to_dict(settings)
    other = config.parse(arguments=["--config", str(path), "--lr", "0.25", "--train", "head"])
    assert (other.optim.lr, other.model.train, other.run.seed) == (0.25, ("head",), 3)


def test_a_freeze_plan_becomes_the_rules_of_the_run(tmp_path):
    plan, settings = tmp_path / "plan.yaml", tmp_path / "settings.yaml"
    plan.write_text("rules: [{freeze: 're:.*bn'}, {train: [layer4, head]}]")
    rules = ("freeze:re:.*bn", "layer4", "head")
    config_of_plan = config.parse(arguments=["--freeze-plan", str(plan)])
    assert config_of_plan.model.train == rules
    settings.write_text(yaml.safe_dump(config.to_dict(config_of_plan)))
    assert "freeze_plan" not in config.to_dict(config_of_plan)["model"]
    plan.unlink()
    assert config.parse(arguments=["--config", str(settings)]).model.train == rules

    plan.write_text("rules: [{train: fc}]")
    assert config.parse(arguments=["--config", str(settings), "--freeze-plan", str(plan)]).model.train == ("fc",)
    settings.write_text(f"model: {{freeze_plan: {plan}}}")
    assert config.parse(arguments=["--config", str(settings)]).model.train == ("fc",)
    assert config.parse(arguments=["--config", str(settings), "--train", "layer4"]).model.train == ("layer4",)


def test_lists_are_stored_and_can_be_emptied_again(tmp_path):
    settings = tmp_path / "settings.yaml"
    given = ["--weights-only", "layer1", "re:.*bn", "--weights-rename", "module", "", "--weights-first", "3"]
    settings.write_text(yaml.safe_dump(config.to_dict(config.parse(arguments=given))))
    again = config.parse(arguments=["--config", str(settings)]).model
    assert (again.weights_only, again.weights_rename) == (("layer1", "re:.*bn"), ("module", ""))
    again = config.parse(arguments=["--config", str(settings), "--weights-only", "--weights-first=None"]).model
    assert (again.weights_only, again.weights_first) == ((), None)


def test_stored_settings_do_not_say_how_the_run_was_started():
    stored = config.to_dict(config.parse(arguments=["--output", "x", "--overwrite"]))
    assert not stored["run"].keys() & {"output", "resume", "overwrite", "override", "config"}
    assert stored["run"]["seed"] == 0


def test_relative_folders_are_stored_absolute(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = config.parse(arguments=["--data", "photos"])
    assert settings.data.data == "photos", "each machine may have its own"
    assert config.to_dict(settings)["data"]["data"] == str(tmp_path / "photos")
    (tmp_path / "file.pth").touch()
    assert config.to_dict(config.parse(arguments=["--weights", "file.pth"]))["model"]["weights"] == str(
        tmp_path / "file.pth"
    )


def test_home_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plan.yaml").write_text("[stem]")
    (tmp_path / "settings.yaml").write_text("run: {cache_dir: ~/cache}")
    names = ["data", "data-root", "weights", "output", "resume"]
    settings = config.parse(
        arguments=[*(f"--{name}=~/{name}" for name in names), "--config=~/settings.yaml", "--freeze-plan=~/plan.yaml"]
    )
    found = [settings.data.data, settings.data.data_root, settings.model.weights]
    found += [settings.run.output, settings.run.resume, settings.run.cache_dir]
    assert found == [f"{tmp_path}/{name}" for name in [*names, "cache"]]
    assert settings.model.train == ("freeze:stem", "all")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--learning", "1"], "Unrecognized"),
        (["--batchsize", "1"], "--batch-size"),
        (["--lr", "fast"], "could not convert string to float: 'fast'"),
        (["--augment", "mixup"], "invalid choice 'mixup' for argument '--augment'"),
        (["--epochs", "0"], "--epochs is 0; expected at least 1"),
        (["--lr", "nan"], "--lr is nan; expected a number above 0"),
        (["--keep", "1"], "--keep is 1; expected at least 2"),
        (["--warmup", "3"], "--warmup is 3.0; expected a share of the run"),
        (["--config", "missing.yaml"], "cannot read --config missing.yaml"),
        (["--freeze-plan", "missing.yaml"], "cannot read the freeze plan missing.yaml"),
        (["--freeze-plan", "plan.yaml", "--train", "layer4"], "--train and --freeze-plan both say what trains"),
        (["--freeze-plan", "plan.yaml", "--train", "head"], "--train and --freeze-plan both say what trains"),
        (["--weights-rename", "a", "b", "c"], "--weights-rename is ('a', 'b', 'c'); expected pairs of names"),
        (["--weights-first", "0"], "--weights-first is 0; expected at least 1"),
        (["--weights-coverage", "90"], "--weights-coverage is 90.0; expected a share"),
        (["--weights-match", "size"], "invalid choice 'size'"),
    ],
)
def test_a_wrong_flag_is_one_message_and_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(arguments=arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


# Lists of lists of lists: 300 bytes that would be 2^30 items when written out.
BOMB = "data: {val_fraction: &a0 [x]}\n"
BOMB = "[&a0 [x], " + ", ".join(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30)) + "]"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {lrr: 1}", "unknown setting in optim: 'lrr'; did you mean lr?"),
        ("optims: {lr: 1}", "unknown group 'optims'; did you mean optim?"),
        ("optim: {lr: fast}", "optim.lr is 'fast'; expected float."),
        ("data: {val_fraction: 0.1}\noptim: {lr: 1e-3, epochs: 1.5}", "optim.epochs is 1.5; expected int."),
        ("data: {check_data: []}", "data.check_data is []; expected bool."),
        ("data: {check_data: 3}", "data.check_data is 3; expected bool."),
        ("data: {augment: mixup}", "data.augment is 'mixup'; expected Literal['none', 'flip', 'crop']."),
        ("model: {train: true}", "model.train is True; expected tuple[str, ...]."),
        ("model: {train: null}", "model.train is None; expected tuple[str, ...]."),
        ("data: {image_size: big}", "data.image_size is 'big'; expected int | None."),
        ("optim: {lr: {a: 1}}", "optim.lr is {'a': 1}; expected float."),
        ("model: {train: [--overwrite]}", "model.train holds ['--overwrite'], which the command line would take"),
        ("optim: 3", "optim holds 3; expected settings such as epochs"),
        ("[1, 2]", "holds list; expected groups of settings"),
        ("optim: {lr: !!python/object/apply:os.system ['true']}", "is not plain YAML"),
        ("a: &a [x]\nb: [*a, *a", "is not plain YAML"),
        ("optim: {lr: 2001-13-45}", "is not plain YAML"),
        (f"optim: {{lr: {'1' * 5000}}}", "is not plain YAML"),
        ("[" * 2000, "is not plain YAML"),
        (f"optim: {BOMB}", "optim holds ["),
        (f"optim: {{lr: {BOMB}}}", "optim.lr is [["),
        ("optim: {lr: 1}\nrun: {output: /etc, 5: 6}", "unknown setting in run: 5"),
    ],
)
def test_a_wrong_file_is_one_message_and_exit_code_2(text, says, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        config.parse(arguments=["--config", str(path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in said
    assert said.startswith(("error: --config ", "error: cannot read --config "))
    assert str(path) in said


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for arguments in (["--lr", "fast"], ["--epochs", "0"]):
        with pytest.raises(SystemExit):
            config.parse(arguments=arguments)
    assert capsys.readouterr().err == ""


@pytest.fixture
def stored_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    settings = config.parse(arguments=["--lr", "0.5", "--batch-size", "32"])
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(settings)))
    return folder


def _resumed(*arguments):
    return config.resumed(config.parse(arguments=list(arguments)), list(arguments))


def test_a_resumed_run_keeps_its_settings_and_says_what_changes(stored_run, capsys):
    settings = _resumed("--resume", "auto", "--output", str(stored_run), "--epochs", "50")
    assert (settings.optim.lr, settings.optim.batch_size, settings.optim.epochs) == (0.5, 32, 50)
    assert capsys.readouterr().out == "resume: epochs: 40 → 50\n"


def test_a_launcher_that_starts_us_again_means_the_run_that_it_started(stored_run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    file = stored_run / "checkpoints" / "step-00000001.pt"
    said = [["--output", str(stored_run), "--overwrite"], ["--resume", str(stored_run)], ["--resume", str(file)]]
    for launcher, found in ((os.getppid(), True), (os.getppid() + 1, False)):
        (stored_run / "status.json").write_text(json.dumps({"launcher": launcher}))
        for arguments in said[: 3 if found else 1]:
            settings = _resumed(*arguments)
            assert (settings.optim.lr == 0.5) == found
            assert (settings.run.resume, settings.run.output) == (
                ("auto", str(stored_run)) if found else (None, str(stored_run))
            )
    assert _resumed("--resume", str(stored_run)).run.resume == str(stored_run)  # as they said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch-size", "64"], "the run has batch_size 32, the command line 64"),
        (["--model", "resnet34"], "the run has name 'resnet18', the command line 'resnet34'"),
        (["--seed", "1"], "the run has seed 0, the command line 1"),
        (["--train", "all"], r"the run has train \['head'\], the command line \['all'\]"),
        (["--optimizer", "sgd"], "the run has optimizer 'adamw', the command line 'sgd'"),
    ],
)
def test_a_resumed_run_stays_the_same_run(stored_run, capsys, flags, says):
    with pytest.raises(UsageError, match=says):
        _resumed("--resume", str(stored_run), *flags)
    if flags[0] in ("--batch-size", "--seed"):
        _resumed("--resume", str(stored_run), *flags, "--override")
        assert "→" in capsys.readouterr().out
    else:  # the checkpoint would not fit
        with pytest.raises(UsageError, match=says):
            _resumed("--resume", str(stored_run), *flags, "--override")


def test_a_run_that_lost_its_settings_has_them_in_its_checkpoints(digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("data: {data: digits}")
    for _ in range(2):
        for resume in (["auto", "--output", str(tmp_path / "run")], [str(tmp_path / "run")]):
            assert _resumed("--resume", *resume).optim.epochs == 2
        (tmp_path / "run" / "config.yaml").unlink(missing_ok=True)


def test_resuming_what_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="there is no such checkpoint or run"):
        _resumed("--resume", str(tmp_path / "missing.pt"))
    assert _resumed("--resume", "auto", "--output", str(tmp_path)).optim.lr == 0.1


@pytest.mark.parametrize("text", ["run: {output: /etc}", "run: {overwrite: true}", "run: {config: other.yaml}"])
def test_the_settings_of_a_run_cannot_say_where_to_write(stored_run, text):
    (stored_run / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"its settings say \w+, which no run stores"):
        _resumed("--resume", str(stored_run))


def test_a_setting_of_a_run_that_does_not_fit_is_named(stored_run):
    (stored_run / "config.yaml").write_text("optim: {lr: fast}")
    with pytest.raises(UsageError, match=rf"the settings of --resume {stored_run}: optim.lr is 'fast'; expected float"):
        _resumed("--resume", str(stored_run))


@pytest.mark.parametrize("text", ["[1]", "lr: !!python/object/apply:os.system ['true']", "{", "a: 2001-13-45", ""])
def test_settings_of_a_run_that_are_no_settings_are_an_error(stored_run, text):
    (stored_run / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        _resumed("--resume", str(stored_run))


def test_every_flag_is_explained():
    help_text = subprocess.run(
        [sys.executable, "-c", "from trainer.config import parse; parse('About.', ['--help'])"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout
    assert all(flag in help_text for flag in config.flags())
    assert "About." in help_text
    for title in ("data options", "model options", "optim options", "run options"):
        assert title in help_text


def test_help_does_not_wait_for_torch():
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); sys.argv[1:] = ['--help']; "
    )
    code += "runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--freeze-plan" in done.stdout
    assert done.stdout.endswith("\nFalse\n")
