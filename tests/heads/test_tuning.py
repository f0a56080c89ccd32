"""The settings that a run leaves open: found on its features, or fixed, and from then on as if they had been given."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator

import trainer
from trainer.config import Config, OptimConfig
from trainer.heads.tuning import tune
from trainer.run.folder import Run
from trainer.trunk.features import CachedFeatures


def _loop(model, config: Config, *, train=("fc",), samples=60, **changes):
    """A trainer, and features of three classes that a head can learn."""
    plan = trainer.freeze(model, train)
    parts = trainer.split_model(model, torch.zeros(1, 3, 8, 8))
    recipe = replace(trainer.Recipe(), **changes)
    optim = config.optim
    loop = trainer.Trainer(
        Accelerator(cpu=True),
        model,
        parts.tail,
        recipe.optimizer(model, optim.settled(), fused=False),
        trainer.BatchPlan(samples, 16, 16, 1),
        optim,
        recipe=recipe,
        about={"freeze_plan": plan.to_dict(), "classes": ["a", "b", "c"], "base": {}, "config": {}},
    )
    labels = torch.arange(samples) % 3
    images = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images[torch.arange(samples), labels] += 1.0  # one colour a class
    with torch.no_grad():
        return loop, CachedFeatures(parts.trunk(images), labels)


def _run(path) -> Run:
    path.mkdir(parents=True, exist_ok=True)
    return Run(path)


def test_a_search_sets_what_is_open_and_is_repeated_to_the_bit(tiny, tmp_path, capsys):
    config, texts = Config(optim=OptimConfig(epochs=4, batch_size=16)), []
    for name in ("one", "again"):
        loop, source = _loop(tiny, config)
        tune(loop, source, config, _run(tmp_path / name))
        texts.append((tmp_path / name / "search.json").read_text())
        found = json.loads(texts[-1])
        stored = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert stored == loop.about["config"]
        assert stored["optim"]["lr"] == found["chosen"]["lr"] == loop.lr(0.05)
        assert stored["optim"]["weight_decay"] == found["chosen"]["weight_decay"]
        assert (loop.epochs, stored["optim"]["epochs"]) == (4, 4), "it was given"
        decays = [group["weight_decay"] for group in loop.optimizer.param_groups]
        assert decays == [found["chosen"]["weight_decay"], 0.0]
        assert found["accuracy"] > 0.6 > found["worst"], "the grid tells good rates from bad ones"
        assert capsys.readouterr().out.startswith(f"search  lr {found['chosen']['lr']:.3g}, weight decay ")
    assert texts[0] == texts[1]


def test_the_weights_do_not_change_in_a_search(tiny, tmp_path):
    loop, source = _loop(tiny, Config())
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    random = torch.get_rng_state()
    tune(loop, source, Config(optim=OptimConfig(epochs=2, batch_size=16)), _run(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_given_is_not_searched_for(tiny, tmp_path, capsys):
    config = Config(optim=OptimConfig(lr=0.3, batch_size=16))
    loop, source = _loop(tiny, config)
    tune(loop, source, config, _run(tmp_path))
    assert (capsys.readouterr().out, loop.epochs, loop.about["config"]["optim"]["epochs"]) == ("", 10, 10)
    assert not (tmp_path / "search.json").exists()
    config = Config(optim=OptimConfig(epochs=3, weight_decay=0.25, batch_size=16))
    loop, source = _loop(tiny, config)
    tune(loop, source, config, _run(tmp_path))
    assert loop.about["config"]["optim"]["weight_decay"] == 0.25
    assert {row["weight_decay"] for row in json.loads((tmp_path / "search.json").read_text())["table"]} == {0.25}


def _focal(config):
    def step(model, batch):
        logits = model(*batch["inputs"])
        loss = F.cross_entropy(logits, batch["label"], reduction="none")
        return {"loss": loss * (1 - (-loss).exp()) ** 2, "accuracy": logits.argmax(dim=1) == batch["label"]}

    return step


def _two_rates(model, config, *, fused):
    groups = [{"params": [value], "lr": lr} for value, lr in zip(model.fc.parameters(), (0.1, 0.2), strict=True)]
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": _focal}, "the recipe has a loss of its own"),
        ({"optimizer": lambda model, *_, fused: torch.optim.NAdam(model.fc.parameters())}, "an optimizer of its own"),
        ({"optimizer": _two_rates}, "groups have rates of their own"),
        ({"learning_rate": lambda config: lambda progress: 0.1}, "does not depend on --lr"),
    ],
)
def test_a_recipe_that_the_search_does_not_know_is_trained_without_one(tiny, tmp_path, capsys, changes, reason):
    config = Config(optim=OptimConfig(batch_size=16))
    loop, source = _loop(tiny, config, **changes)
    tune(loop, source, config, _run(tmp_path))
    out = capsys.readouterr().out
    assert out.startswith("lr      0.001, not searched for: ")
    assert reason in out
    assert loop.about["config"]["optim"]["lr"] == 1e-3


def test_without_kept_features_or_classes_there_is_no_search(tiny, tmp_path, capsys):
    config = Config(optim=OptimConfig(batch_size=16))
    loop, source = _loop(tiny, config)
    tune(loop, CachedFeatures(source.inputs, source.labels.float()), config, _run(tmp_path))
    assert "the labels are no classes" in capsys.readouterr().out
    loop, source = _loop(tiny, config)
    tune(loop, object(), config, _run(tmp_path))
    assert "are not kept" in capsys.readouterr().out


def test_a_search_can_be_stopped(tiny, tmp_path):
    config, calls = Config(optim=OptimConfig(epochs=4, batch_size=16)), []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise trainer.Preempted("told to")

    loop, source = _loop(tiny, config)
    with pytest.raises(trainer.Preempted):
        tune(loop, source, config, _run(tmp_path), between=stop)
    assert (loop.about["config"], list(tmp_path.iterdir())) == ({}, [])


def test_a_run_that_goes_on_does_not_search(tiny, tmp_path, capsys):
    config = Config(optim=OptimConfig(batch_size=16))
    loop, source = _loop(tiny, config)
    next(loop.steps(source))
    tune(loop, source, config, _run(tmp_path))
    assert (capsys.readouterr().out, loop.about["config"]) == ("", {})
