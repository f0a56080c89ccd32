"""Settings as values: groups, bounds, contradictions, and the stored form."""

import dataclasses

import pytest

from trainer import config as settings
from trainer.config import Bounds, Config, ModelConfig, OptimConfig, RunConfig, from_dict, replace, to_dict
from trainer.errors import UsageError


def test_a_setting_belongs_to_one_group_and_has_one_flag():
    names = [f.name for group in settings._GROUPS.values() for f in dataclasses.fields(group)]
    assert len(names) == len(set(names)) == len(settings.GROUP_OF)
    assert settings.flag("cache_memory") == "--cache-memory"
    assert set(settings.START) | set(settings.PATHS) <= set(names)


def test_settings_are_replaced_in_their_groups():
    before = Config()
    after = replace(before, lr=0.5, epochs=3, seed=7)
    assert (after.optim.lr, after.optim.epochs, after.run.seed) == (0.5, 3, 7)
    assert after.data is before.data
    assert before == Config()
    assert settings.get(after, "seed") == 7


def test_what_is_given_are_the_settings_that_differ_unless_somebody_names_them():
    assert settings.given(Config()) == set()
    assert settings.given(Config(optim=OptimConfig(epochs=3), run=RunConfig(resume="auto"))) == {"epochs", "resume"}
    assert settings.given(Config(optim=OptimConfig(epochs=3), given=frozenset({"lr"}))) == {"lr"}


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Bounds(least=1, unit="image"), "at least 1 image", [1, 64], [0, -3, float("nan")]),
        (Bounds(above=0, unit="minutes"), "more than 0 minutes", [0.1, 1e9], [0, float("nan"), float("inf")]),
        (Bounds(least=0, most=1), "at least 0 and at most 1", [0, 0.5, 1], [1.01, -0.01]),
        (Bounds(above=0, below=1), "more than 0 and less than 1", [0.5], [0, 1]),
    ],
)
def test_bounds(bounds, text, inside, outside):
    assert str(bounds) == text
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"epochs": 0}, "--epochs is 0; expected at least 1."),
        ({"lr": float("nan")}, "--lr is nan; expected a finite number, more than 0"),
        ({"lr": float("inf")}, "--lr is inf; expected a finite number, more than 0"),
        ({"lr": 0.0}, "--lr is 0.0; expected more than 0"),
        ({"keep": 1}, "--keep is 1; expected at least 2."),
        ({"warmup": 3.0}, "--warmup is 3.0; expected at least 0 and at most 1."),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0; expected more than 0 and less than 1."),
        ({"batch_size": 0}, "--batch-size is 0; expected at least 1 image."),
        ({"micro_batch": 0}, "--micro-batch is 0; expected at least 1 image."),
        ({"image_size": 0}, "--image-size is 0; expected at least 1 pixel."),
        ({"workers": -1}, "--workers is -1; expected at least 0."),
        ({"patience": 0}, "--patience is 0; expected at least 1 epoch."),
        ({"momentum": 1.0, "optimizer": "sgd"}, "--momentum is 1.0; expected at least 0 and less than 1."),
        ({"clip_norm": 0.0}, "--clip-norm is 0.0; expected more than 0."),
        ({"save_minutes": 0.0}, "--save-minutes is 0.0; expected more than 0 minutes."),
        ({"timeout": float("inf")}, "--timeout is inf; expected a finite number, more than 0"),
        ({"cache_memory": -1.0}, "--cache-memory is -1.0; expected at least 0 GiB."),
        ({"weights_first": 0}, "--weights-first is 0; expected at least 1 entry."),
        ({"weights_coverage": 90.0}, "--weights-coverage is 90.0; expected at least 0 and at most 1."),
        ({"weights_rename": ("a", "b", "c")}, "--weights-rename is ('a', 'b', 'c'); expected pairs of names: OLD NEW."),
        ({"views": 4, "augment": "none"}, "--augment none makes all views equal. Omit --views, or give --augment flip"),
        ({"momentum": 0.5}, "--momentum has no effect with --optimizer adamw. Omit one of them."),
    ],
)
def test_a_value_out_of_bounds_or_against_another_is_named(values, says):
    with pytest.raises(UsageError) as error:
        settings.check(replace(Config(), **values))
    assert says in str(error.value)


def test_values_at_their_bounds_and_settings_that_agree_are_fine():
    settings.check(Config())
    settings.check(replace(Config(), epochs=1, keep=2, warmup=0.0, workers=0, cache_memory=0.0, weights_coverage=1.0))
    settings.check(replace(Config(), views=1, augment="none"))
    settings.check(replace(Config(), views=4, augment="flip", optimizer="sgd", momentum=0.5))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"lr": "1e-3"}, 0.001),  # what YAML makes of a number without a point
        ({"clip_norm": "1e1"}, 10.0),
        ({"lr": 1}, 1.0),
        ({"lr": 10**400}, float("inf")),
        ({"clip_norm": None}, None),
        ({"train": ["head", "layer4"]}, ("head", "layer4")),
        ({"weights_only": []}, ()),
        ({"image_size": 96}, 96),
    ],
)
def test_plain_values_become_those_of_a_setting(values, found):
    (name,) = values
    value = settings.get(settings.update(Config(), values, "x"), name)
    assert (value, type(value)) == (found, type(found))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lr": "fast"}, "x: optim.lr is 'fast'; expected float or auto."),
        ({"lr": True}, "x: optim.lr is True; expected float or auto."),
        ({"epochs": 1.5}, "x: optim.epochs is 1.5; expected int or auto."),
        ({"epochs": True}, "x: optim.epochs is True; expected int or auto."),
        ({"seed": "1"}, "x: run.seed is '1'; expected int."),
        ({"image_size": "big"}, "x: data.image_size is 'big'; expected int or null."),
        ({"image_size": True}, "x: data.image_size is True; expected int or null."),
        ({"check_data": 3}, "x: data.check_data is 3; expected bool."),
        ({"augment": "mixup"}, "x: data.augment is 'mixup'; expected auto, none, flip or crop."),
        ({"train": "head"}, "x: model.train is 'head'; expected a list of str."),
        ({"train": None}, "x: model.train is None; expected a list of str."),
        ({"train": ["head", 3]}, "x: model.train is ['head', 3]; expected a list of str."),
        ({"train": [["head"]]}, "x: model.train is [['head']]; expected a list of str."),
        ({"output": 3}, "x: run.output is 3; expected str or null."),
    ],
)
def test_a_value_of_another_type_is_named_with_its_source(values, says):
    with pytest.raises(UsageError) as error:
        settings.update(Config(), values, "x")
    assert str(error.value) == says


def test_the_stored_form_repeats_the_settings_and_does_not_say_how_the_run_was_started():
    config = replace(Config(), lr=0.5, train=("layer4", "fc"), weights_rename=("module", ""), seed=3)
    config = replace(config, output="x", resume="auto", overwrite=True, override=True, config="y.yaml")
    stored = to_dict(config)
    assert not stored["run"].keys() & set(settings.START)
    assert (stored["model"]["train"], stored["run"]["seed"]) == (["layer4", "fc"], 3)
    again = from_dict(stored, "x")
    assert to_dict(again) == stored
    assert again == replace(config, **{name: settings.get(Config(), name) for name in settings.START})


def test_relative_paths_that_exist_are_stored_absolute(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name in ("file.pth", "recipe.py"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    config = replace(Config(), data="photos", weights="file.pth", recipe="recipe.py")
    stored = to_dict(config)
    found = stored["data"]["data"], stored["weights"]["weights"], stored["run"]["recipe"]
    assert found == (str(tmp_path / "photos"), str(tmp_path / "file.pth"), str(tmp_path / "recipe.py"))
    assert config.data.data == "photos", "each machine may have its own"
    (tmp_path / "digits").mkdir()
    stored = to_dict(replace(config, data="digits", weights="IMAGENET1K_V2"))
    assert (stored["data"]["data"], stored["weights"]["weights"]) == ("digits", "IMAGENET1K_V2")


def test_settings_of_a_checkpoint_are_found_whatever_their_group_and_age():
    of_0_1 = {
        "data": {"data": "photos", "views": 4, "workers": 0},
        "model": {"name": "resnet50", "weights": "none", "train": ["layer4"], "compile": "off"},
        "run": {"cache_memory": 1.0, "output": "/etc", "overwrite": True},
    }
    config = from_dict(of_0_1 | {"of tomorrow": {"warp": 9}}, "x")
    assert config.model == ModelConfig("resnet50", ("layer4",))
    assert (config.weights.weights, config.speed.views, config.speed.workers) == ("none", 4, 0)
    assert (config.speed.compile, config.speed.cache_memory) == ("off", 1.0)
    assert (config.run.output, config.run.overwrite) == (None, False), "no checkpoint says where to write"
    assert config.optim == OptimConfig()


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"optim": {"lr": 0.1}}, "x name no model"),
        ({}, "x name no model"),
        ({"model": {"model": "resnet18"}, "optim": {"lr": "fast"}}, "x: optim.lr is 'fast'; expected float or auto."),
        ({"model": {"model": 18}}, "x: model.model is 18; expected str."),
        ({"model": {"model": "resnet18"}, "optim": 3}, "x: optim holds 3; expected"),
    ],
)
def test_settings_of_a_checkpoint_that_do_not_fit_are_named(stored, says):
    with pytest.raises(UsageError) as error:
        from_dict(stored, "x")
    assert says in str(error.value)


def test_a_run_is_named_for_its_data_and_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.default_name(Config()) == "digits-resnet18"
    config = replace(Config(), data="some/Photos/", model="resnet50")
    assert settings.default_name(config) == "photos-resnet50"
    assert settings.default_name(replace(config, data=".")) == f"{tmp_path.name}-resnet50".lower()
