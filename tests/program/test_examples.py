"""Each example, as people use it: trained, killed, resumed, evaluated, verified, used, exported."""

import csv
import json

import numpy as np
import pytest
import torch
from launching import ROOT
from PIL import Image

import trainer
from trainer.storage import checkpoint

SMALL = ["--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "0", "--augment", "none", "--lr"]
# Kills the process at the end of the second epoch, before its checkpoint.
KILL = """
import os, signal, trainer
old, calls = trainer.Trainer.finish_epoch, []
def finish_epoch(self, val):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return old(self, val)
trainer.Trainer.finish_epoch = finish_epoch
"""
COLUMNS = {
    "own_net": lambda n: {"file": f"{n}.png", "class": "ab"[n % 2]},
    "multi_label": lambda n: {
        "file": f"{n}.png",
        "labels": ";".join(name for name in "xyz" if n % (2 + ord(name) % 3)),
    },
    "regression": lambda n: {"file": f"{n}.png", "value": n / 10},
    "pairs": lambda n: {"first": f"{n}.png", "second": f"{(n + 2) % 24}.png", "same": n % 2},
}
OPTIONS = {
    "own_net": ["--train", "all", "--micro-batch", "2"],
    "timm_vit": ["--model", "vit_tiny_patch16_224", "--image-size", "224"],
    "layer_rates": ["--train", "head", "layer4.1"],
}
SAYS = {"multi_label": "mean_average_precision", "regression": "r2"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 small images, in a folder with class folders and in a flat one."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(24):
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8) // (1 + number % 2)
        for path in (folder / f"{number}.png", folder / "classes" / "ab"[number % 2] / f"{number}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


@pytest.mark.parametrize(
    "name",
    ["multi_label", "regression", "pairs", "own_net", "layer_rates", pytest.param("timm_vit", marks=pytest.mark.slow)],
)
def test_an_example_from_training_to_export(name, pictures, program, tmp_path):
    if name == "timm_vit":
        pytest.importorskip("timm")
    data = pictures / "classes"
    if name in COLUMNS:
        data = pictures / f"{name}.csv"
        with open(data, "w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS[name](0))
            table.writeheader()
            table.writerows(map(COLUMNS[name], range(24)))
    recipe = ["--recipe", ROOT / "examples" / f"{name}.py"]
    options = [*recipe, "--data", data, *SMALL, "1e-3", "--epochs", "3", *OPTIONS.get(name, [])]
    whole = program(*options, "--output", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "done: best validation epoch" in whole.stdout
    if name != "own_net":
        assert "split   cut before" in whole.stdout

    killed = program(*options, "--output", "run", cwd=tmp_path, setup=KILL)
    assert killed.returncode == -9
    again = program("--resume", "auto", "--output", "run", *recipe, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    found, expected = (checkpoint.newest(tmp_path / run / "checkpoints")[1] for run in ("run", "whole"))
    assert found.step == expected.step
    assert all(torch.equal(tensor, expected.model[key]) for key, tensor in found.model.items())

    def command(*arguments):
        done = program(*arguments, *recipe, cwd=tmp_path, target="trainer")
        assert done.returncode == 0, done.stderr
        assert "recipe  " not in done.stdout
        return done.stdout

    result = json.loads(command("evaluate", "--run", "run", "--json"))
    assert result["all"] == checkpoint.read(tmp_path / "run" / "checkpoints" / "best.pt").metrics["val"]
    assert SAYS.get(name, "loss") in result["all"]
    assert "ok   " in command("verify", "run")
    assert command("export", "--run", "run").count("bit-equal logits") == 2
    if name != "pairs":  # it takes two images
        text = command("predict", "--run", "run", pictures / "0.png", "--csv", "table.csv")
        row = next(iter(csv.DictReader((tmp_path / "table.csv").read_text().splitlines())))
        loaded = trainer.load(tmp_path / "run", recipe=str(recipe[1]), device="cpu")
        (values,) = loaded(str(pictures / "0.png"))
        assert values.keys() == row.keys() - {"path"}
        for key, value in values.items():
            assert row[key] == value if isinstance(value, str) else float(row[key]) == pytest.approx(value, abs=1e-5)
        assert text.startswith(str(pictures / "0.png")[:8]) or "…" in text


def test_another_recipe_than_in_training_is_said(pictures, program, tmp_path):
    options = ["--data", pictures / "classes", *SMALL, "1e-3", "--epochs", "1", "--output", "run"]
    recipe = ["--recipe", ROOT / "examples" / "layer_rates.py"]
    assert program(*options, *recipe, cwd=tmp_path).returncode == 0
    done = program("verify", "run", cwd=tmp_path, target="trainer")
    assert done.returncode == 0, done.stderr
    done = program("evaluate", "--run", "run", cwd=tmp_path, target="trainer")
    assert "recipe  optimizer: trained with layer_rates.optimizer" in done.stdout
    assert "recipe  step" not in done.stdout
