"""The command line of train.py: layers, messages, help."""

import io
import os
import subprocess
import sys

import pytest
import yaml
from launching import ROOT

from trainer import cli
from trainer.config import Config, default_name, given, to_dict


def parsed(*arguments: object) -> Config:
    return cli.parse(arguments=[str(argument) for argument in arguments])


def test_defaults_are_the_demo():
    config = parsed()
    assert (config.data.data, config.data.augment, config.data.image_size) == ("digits", "auto", 64)
    assert (config.model.model, config.weights.weights, config.model.train) == ("resnet18", "none", ("head",))
    assert (config.optim.epochs, config.optim.lr, config.optim.label_smoothing) == ("auto", "auto", 0.1)
    assert config.speed.workers == 0
    assert default_name(config) == "digits-resnet18"
    assert given(config) == set(), "nobody gave the demo's"


def test_other_data_has_other_defaults(tmp_path):
    config = parsed("--data", tmp_path, "--model", "resnet50", "--train", "layer4", "fc")
    assert (config.data.augment, config.data.image_size, config.weights.weights) == ("auto", None, "default")
    assert (config.optim.epochs, config.optim.label_smoothing, config.speed.workers) == ("auto", 0.0, None)
    assert config.model.train == ("layer4", "fc")
    assert default_name(config) == f"{tmp_path.name}-resnet50"


def test_flags_override_the_file_that_overrides_the_demo(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("optim: {lr: 1e-2, epochs: 7}\ndata: {image_size: 32}\nrun: {exact: true}")
    config = parsed("--config", path, "--epochs", "3", "--no-exact")
    assert (config.optim.lr, config.optim.epochs, config.data.image_size) == (0.01, 3, 32)
    assert (config.run.exact, config.weights.weights) == (False, "none")
    path.write_text("data: {data: photos}\noptim: {lr: 1}")
    config = parsed("--config", path)
    assert (config.weights.weights, config.optim.lr, config.optim.label_smoothing) == ("default", 1.0, 0.0), (
        "not the demo"
    )
    config = parsed("--config", path, "--data", "digits")
    assert (config.weights.weights, config.optim.lr, config.optim.label_smoothing) == ("none", 1.0, 0.1), "the demo"


def test_what_was_given_is_known(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("optim: {lr: 0.1}\nspeed: {views: null}")
    config = parsed("--config", path, "--batch_size=64", "--no-exact", "--weights-only", "--seed", "0")
    assert given(config) == {"config", "lr", "views", "batch_size", "exact", "weights_only", "seed"}


def test_stored_settings_repeat_the_run_and_flags_override_them(tmp_path):
    config = parsed("--lr", "0.5", "--clip-norm", "2", "--train", "layer4", "fc", "--seed", "3")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert to_dict(parsed("--config", path)) == to_dict(config)
    other = parsed("--config", path, "--lr", "0.25", "--train", "head")
    assert (other.optim.lr, other.model.train, other.run.seed) == (0.25, ("head",), 3)


def test_the_rules_of_a_file_become_those_of_the_run(tmp_path):
    plan, path = tmp_path / "plan.yaml", tmp_path / "settings.yaml"
    plan.write_text("rules: [{freeze: 're:.*bn'}, {train: [layer4, head]}]")
    rules = ("freeze:re:.*bn", "layer4", "head")
    config = parsed("--train", f"@{plan}")
    assert config.model.train == rules
    assert parsed("--train", "freeze:conv1", f"@{plan}", "layer3").model.train == ("freeze:conv1", *rules, "layer3")
    path.write_text(yaml.safe_dump(to_dict(config)))
    plan.unlink()
    assert parsed("--config", path).model.train == rules, "the run does not depend on the file any more"

    plan.write_text("rules: [{train: fc}]")
    assert parsed("--config", path, "--train", f"@{plan}").model.train == ("fc",)
    path.write_text(f"model: {{train: ['@{plan}']}}")
    assert parsed("--config", path).model.train == ("fc",)
    assert parsed("--config", path, "--train", "layer4").model.train == ("layer4",)


def test_lists_are_stored_and_can_be_emptied_again(tmp_path):
    path = tmp_path / "settings.yaml"
    config = parsed("--weights-only", "layer1", "re:.*bn", "--weights-rename", "module", "", "--weights-first", "3")
    path.write_text(yaml.safe_dump(to_dict(config)))
    again = parsed("--config", path).weights
    assert (again.weights_only, again.weights_rename) == (("layer1", "re:.*bn"), ("module", ""))
    again = parsed("--config", path, "--weights-only", "--weights-first=None").weights
    assert (again.weights_only, again.weights_first) == ((), None)


def test_home_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plan.yaml").write_text("[stem]")
    (tmp_path / "settings.yaml").write_text("speed: {cache_dir: ~/cache}\nrun: {recipe: ~/recipe.py}")
    names = ["data", "data-root", "weights", "output", "resume"]
    config = parsed(*(f"--{name}=~/{name}" for name in names), "--config=~/settings.yaml", "--train=@~/plan.yaml")
    found = [config.data.data, config.data.data_root, config.weights.weights, config.run.output, config.run.resume]
    found += [config.speed.cache_dir, config.run.recipe, config.run.config]
    assert found == [f"{tmp_path}/{name}" for name in [*names, "cache", "recipe.py", "settings.yaml"]]
    assert config.model.train == ("freeze:stem", "all")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--learning", "1"], "Unrecognized"),
        (["--batchsize", "1"], "--batch-size"),
        (["--learning-rate=1"], "error: there is no --learning-rate; did you mean --lr?"),
        (["--backbone", "resnet50"], "error: there is no --backbone; did you mean --model?"),
        (["--given", "lr"], "Unrecognized"),
        (["--lr", "fast"], "could not convert string to float: 'fast'"),
        (["--augment", "mixup"], "invalid choice 'mixup' for argument '--augment'"),
        (["--weights-match", "size"], "invalid choice 'size'"),
        (["--epochs", "0"], "error: --epochs is 0; expected at least 1.\n"),
        (["--lr", "nan"], "error: --lr is nan; expected a finite number, more than 0"),
        (["--augment", "none", "--views", "4"], "error: --views 4 needs views that differ, and --augment none makes"),
        (["--momentum", "0.5"], "error: --momentum has no effect with --optimizer adamw. Omit one of them.\n"),
        (["--weights-rename", "a", "b", "c"], "error: --weights-rename is ('a', 'b', 'c'); expected pairs of names"),
        (["--config", "missing.yaml"], "error: cannot read --config missing.yaml"),
        (["--train", "@missing.yaml"], "error: cannot read the freeze plan missing.yaml"),
    ],
)
def test_a_wrong_flag_is_one_message_and_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(arguments=arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


# Lists of lists of lists: 300 bytes that would be 2^30 items when written out.
BOMB = "[&a0 [x], " + ", ".join(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30)) + "]"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {lrr: 1}", "unknown setting in optim: 'lrr'; did you mean lr?"),
        ("optim: {given: 1}", "unknown setting in optim: 'given'; expected one of epochs, "),
        ("optims: {lr: 1}", "unknown group 'optims'; did you mean optim?"),
        ("given: [lr]", "unknown group 'given'; expected one of data, model, weights"),
        ("optim: {lr: fast}", "optim.lr is 'fast'; expected float or auto."),
        ("data: {val_fraction: 0.1}\noptim: {lr: 1e-3, epochs: 1.5}", "optim.epochs is 1.5; expected int or auto."),
        ("data: {check_data: []}", "data.check_data is []; expected bool."),
        ("data: {augment: mixup}", "data.augment is 'mixup'; expected auto, none, flip or crop."),
        ("model: {train: true}", "model.train is True; expected a list of str."),
        ("model: {train: null}", "model.train is None; expected a list of str."),
        ("model: {train: [head, 3]}", "model.train is ['head', 3]; expected a list of str."),
        ("data: {image_size: big}", "data.image_size is 'big'; expected int or null."),
        ("optim: {lr: {a: 1}}", "optim.lr is {'a': 1}; expected float or auto."),
        ("optim: 3", "optim holds 3; expected settings such as epochs"),
        ("[1, 2]", "holds list; expected groups of settings"),
        ("", "holds NoneType; expected groups of settings"),
        ("optim: {lr: !!python/object/apply:os.system ['true']}", "is not plain YAML"),
        ("a: &a [x]\nb: [*a, *a", "is not plain YAML"),
        ("optim: {lr: 2001-13-45}", "is not plain YAML"),
        (f"optim: {{lr: {'1' * 5000}}}", "is not plain YAML"),
        ("[" * 2000, "is not plain YAML"),
        ("a" * 1_000_001, "is larger than 1 MB"),
        (f"optim: {BOMB}", "optim holds ["),
        (f"optim: {{lr: {BOMB}}}", "optim.lr is [["),
        (f"model: {{train: {BOMB}}}", "model.train is [["),
        ("optim: {lr: 1}\nrun: {output: /etc, 5: 6}", "unknown setting in run: 5"),
    ],
)
def test_a_wrong_file_is_one_message_and_exit_code_2(text, says, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parsed("--config", path)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in said
    assert said.startswith(("error: --config ", "error: cannot read --config "))
    assert str(path) in said
    assert len(said) < 2000


def test_bounds_hold_for_the_settings_of_a_file(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text("optim: {lr: .nan}")
    with pytest.raises(SystemExit):
        parsed("--config", path)
    assert "--lr is nan; expected a finite number, more than 0" in capsys.readouterr().err
    assert parsed("--config", path, "--lr", "1").optim.lr == 1, "a flag overrides it"


def test_a_file_cannot_bring_flags(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("model: {train: [--overwrite]}")
    config = parsed("--config", path)
    assert (config.model.train, config.run.overwrite) == (("--overwrite",), False)


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for arguments in (["--lr", "fast"], ["--epochs", "0"]):
        with pytest.raises(SystemExit) as stop:
            cli.parse(arguments=arguments)
        assert stop.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

        def fileno(self):
            return descriptor

    descriptor = os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as stop, cli.no_broken_pipe():
        print("a line")
    os.close(descriptor)
    assert stop.value.code == 0


def test_every_flag_is_explained():
    help_text = subprocess.run(
        [sys.executable, "-c", "from trainer.cli import parse; parse('About.', ['--help'])"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout
    assert {"--lr", "--cache-memory", "--weights-only"} <= cli.flags()
    assert all(flag in help_text for flag in cli.flags())
    assert "About." in help_text
    assert "--given" not in help_text
    for group in ("data", "model", "weights", "optim", "speed", "run"):
        assert f"{group} options" in help_text


def test_help_does_not_wait_for_torch():
    code = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    code += "sys.argv[1:] = ['--help']; runpy.run_path('train.py', run_name='__main__')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "--cache-memory" in done.stdout
    assert done.stdout.endswith("\nFalse\n")
