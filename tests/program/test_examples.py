"""Each example, as people use it: trained, killed, resumed, evaluated, verified, used, exported."""

import csv

import pytest
import torch
from forks import KILL, SMALL, train, use
from launching import ROOT

import trainer
from trainer.storage import checkpoint

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
    "ema": ["--train", "head", "layer4.1", "--save-every", "4"],  # within the second epoch of three steps
    "timm_vit": ["--model", "vit_tiny_patch16_224", "--image-size", "224"],
    "layer_rates": ["--train", "head", "layer4.1"],
}
SHORT = ["multi_label", "regression", "pairs", "own_net", "layer_rates", "ema", "embedding", "hf_dataset"]
SAYS = {"multi_label": "mean_average_precision", "regression": "r2", "embedding": "recall_at_1"}


def hugging_face(pictures):
    datasets = pytest.importorskip("datasets")
    folder = pictures / "hugging_face"
    found = datasets.load_dataset("imagefolder", data_dir=str(pictures / "classes"), cache_dir=str(pictures / "cache"))
    found["train"].train_test_split(8, seed=0).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [*SHORT, pytest.param("timm_vit", marks=pytest.mark.slow)],
)
def test_an_example_from_training_to_export(name, pictures, program, tmp_path):
    if name == "timm_vit":
        pytest.importorskip("timm")
    data = pictures / "classes"
    if name == "hf_dataset":
        data = hugging_face(pictures)
    if name in COLUMNS:
        data = pictures / f"{name}.csv"
        with open(data, "w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS[name](0))
            table.writeheader()
            table.writerows(map(COLUMNS[name], range(24)))
    recipe = ["--recipe", ROOT / "examples" / f"{name}.py"]
    options = ["--data", data, *SMALL, *OPTIONS.get(name, [])]
    state = train(program, tmp_path, options, recipe=recipe)
    assert SAYS.get(name, "loss") in state.metrics["val"]
    image = None if name == "pairs" else pictures / "0.png"  # it takes two images
    row = use(program, tmp_path, recipe=recipe, image=image)
    if image is not None:
        loaded = trainer.load(tmp_path / "run", recipe=str(recipe[1]), device="cpu")
        (values,) = loaded(str(image))
        assert values.keys() == row.keys() - {"path"}
        for key, value in values.items():
            assert row[key] == value if isinstance(value, str) else float(row[key]) == pytest.approx(value, abs=1e-5)


def test_another_recipe_than_in_training_is_said(pictures, program, tmp_path):
    options = ["--data", pictures / "classes", *SMALL, "--epochs", "1", "--output", "run"]
    recipe = ["--recipe", ROOT / "examples" / "layer_rates.py"]
    assert program(*options, *recipe, cwd=tmp_path).returncode == 0
    done = program("verify", "run", cwd=tmp_path, target="trainer")
    assert done.returncode == 0, done.stderr
    done = program("evaluate", "--run", "run", cwd=tmp_path, target="trainer")
    assert "recipe  optimizer: trained with layer_rates.optimizer" in done.stdout
    assert "recipe  step" not in done.stdout


def runs(folder):
    """The newest checkpoint of each run in a folder."""
    return {path.name: checkpoint.newest(path / "checkpoints")[1] for path in folder.iterdir() if path.is_dir()}


def test_two_stages_are_continued_in_the_second(pictures, program, tmp_path):
    target = ROOT / "examples" / "two_stages.py"
    options = [
        "--data",
        pictures / "classes",
        *SMALL,
        "--augment",
        "none",
        "--epochs",
        "2",
        "--train",
        "head",
        "layer4.1",
    ]
    whole = program(*options, "--output", "whole", cwd=tmp_path, target=target)
    assert whole.returncode == 0, whole.stderr
    assert "whole/head/checkpoints/best.pt: 100% of" in whole.stdout
    setup = KILL.replace("== 2", "== 4")  # in the second epoch of the second stage
    assert program(*options, "--output", "two", cwd=tmp_path, target=target, setup=setup).returncode == -9
    again = program(*options, "--output", "two", cwd=tmp_path, target=target)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout
    found, expected = runs(tmp_path / "two"), runs(tmp_path / "whole")
    assert found.keys() == expected.keys() == {"head", "all"}
    assert found["all"].freeze_plan["train"] == ["head", "layer4.1"]
    for name, state in found.items():
        assert state.step == expected[name].step
        assert all(torch.equal(tensor, expected[name].model[key]) for key, tensor in state.model.items())
    alone = program(*options[:-3], cwd=tmp_path, target=target)
    assert alone.returncode == 2
    assert "say what trains in the second stage" in alone.stderr


def test_a_sweep_is_continued_and_computes_features_once(pictures, program, tmp_path):
    path = tmp_path / "sweep.py"
    text = (ROOT / "examples" / "sweep.py").read_text()
    text = text.replace("1e-4, 3e-4, 1e-3, 3e-3, 1e-2", "1e-3, 1e-2").replace("0, 1, 2", "0, 1")
    path.write_text(text.replace("Path(__file__).parents[1]", f"Path({str(ROOT)!r})"))
    data = pictures / "parts"
    for part in ("train", "val"):
        (data / part).mkdir(parents=True)
        for name in "ab":
            (data / part / name).symlink_to(pictures / "classes" / name)
    options = ["--data", data, *SMALL, "--seed", "0", "--epochs", "2", "--output", "sweep"]
    assert program(*options, cwd=tmp_path, target=path, setup=KILL.replace("== 2", "== 4")).returncode == -9
    done = program(*options, cwd=tmp_path, target=path)
    assert done.returncode == 0, done.stderr
    found = runs(tmp_path / "sweep")
    del found["features"]
    assert found.keys() == {"lr0.001-seed0", "lr0.001-seed1", "lr0.01-seed0", "lr0.01-seed1"}
    assert {state.config["optim"]["lr"] for state in found.values()} == {1e-3, 1e-2}
    assert {state.epoch for state in found.values()} == {2}
    lines = done.stdout.partition("score of the best epoch:\n")[2].splitlines()
    assert lines[0].split() == ["lr", "mean", "seed", "0", "seed", "1"]
    rows = [[float(value) for value in line.split()] for line in lines[1:]]
    assert sorted(row[0] for row in rows) == [1e-3, 1e-2]
    assert rows[0][1] >= rows[1][1]
    for rate, mean, *values in rows:
        scores = [found[f"lr{rate:g}-seed{seed}"].metrics["best"]["accuracy"] for seed in (0, 1)]
        assert values == pytest.approx(scores, abs=1e-4)
        assert mean == pytest.approx(sum(scores) / 2, abs=1e-4)
