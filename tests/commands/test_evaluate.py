"""A checkpoint is evaluated to the numbers of its training."""

import json
import os

import pytest
from PIL import Image

from trainer import evaluation
from trainer.commands.arguments import Evaluate
from trainer.commands.evaluate import evaluate
from trainer.data.datasets import Digits
from trainer.data.open import load_test
from trainer.errors import DataError, UsageError
from trainer.storage import checkpoint

SMALL = ["--weights", "none", "--image-size", "32", "--epochs", "1", "--workers", "0"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # evaluate sets it to that of training


def test_the_same_numbers_as_in_training(digits_run, capsys):
    for step in checkpoint.steps(digits_run / "checkpoints"):
        found = evaluate(Evaluate(str(step)))
        assert found["all"] == checkpoint.read(step)["metrics"]["val"]
        assert found["samples"] == sum(values["samples"] for values in found["classes"].values()) == 359
        for metric, value in found["all"].items():
            sums = [values["samples"] * values[metric] for values in found["classes"].values()]
            assert sum(sums) / 359 == pytest.approx(value)
        right = {name: values["samples"] * values["accuracy"] for name, values in found["classes"].items()}
        assert all(count == pytest.approx(round(count)) for count in right.values())
    assert capsys.readouterr().out.count("the same as in training, to the last digit") == 2


def test_batches_are_those_of_training(digits_run, tmp_path, monkeypatch):
    """Here other batches would give the same digits; on other machines they do not."""
    state = checkpoint.read(digits_run / "checkpoints" / "best.pt")
    state["compute"]["micro_batch"] = 48
    checkpoint.write(tmp_path / "x.pt", state)
    plans, real = [], evaluation.evaluate

    def noted(*args, plan, **rest):
        plans.append(plan)
        return real(*args, plan=plan, **rest)

    monkeypatch.setattr(evaluation, "evaluate", noted)
    evaluate(Evaluate(str(tmp_path / "x.pt")))
    assert (plans[0].micro_batch, plans[0].processes) == (48, 1)


def test_a_difference_is_said(digits_run, tmp_path, capsys):
    state = checkpoint.read(digits_run / "checkpoints" / "best.pt")
    state["metrics"]["val"]["accuracy"] = 0.5
    checkpoint.write(tmp_path / "x.pt", state)
    evaluate(Evaluate(str(tmp_path / "x.pt")))
    text = capsys.readouterr().out
    assert "trained accuracy 0.5, loss 5." in text
    assert "differs: trained on cpu, evaluated on" in text


@pytest.mark.parametrize(
    ("options", "env", "processes"),
    [
        (["--train", "layer4.1", "fc", "--augment", "crop"], {"ACCELERATE_MIXED_PRECISION": "bf16"}, 1),
        (["--batch-size", "16"], {}, 2),
    ],
)
def test_the_same_numbers_on_other_processes_and_in_bf16(photos, program, tmp_path, options, env, processes):
    """Trained on 1 and evaluated on 2 processes, or trained on 2 (with half the micro-batch) and evaluated on 1."""
    options = ["--data", photos, *SMALL, *options, "--output", tmp_path / "run"]
    done = program(*options, cwd=tmp_path, env=env, processes=processes)
    assert done.returncode == 0, done.stderr
    state = checkpoint.read(tmp_path / "run" / "checkpoints" / "best.pt")
    assert state["compute"]["precision"] == env.get("ACCELERATE_MIXED_PRECISION", "no")
    arguments = ["evaluate", "--run", tmp_path / "run", "--json"]
    done = program(*arguments, target="trainer", cwd=tmp_path, processes=3 - processes)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["all"] == state["metrics"]["val"]


def test_other_images(tmp_path):
    """Classes are known by name: a folder that has only some of them is numbered as the model does."""
    for index in range(3):  # of the digits 0, 1, 2
        folder = tmp_path / "some" / str(Digits().labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(Digits().images[index]).save(folder / "a.png")
    images = load_test(tmp_path / "some", ["x", *"0123456789"])
    assert [images.classes[label] for label in images.labels] == sorted(str(Digits().labels[i]) for i in range(3))
    with pytest.raises(DataError, match=r"have classes without training images: 2\. Training has 0, 1"):
        load_test(tmp_path / "some", ["0", "1"])
    assert len(load_test("digits", "0123456789")) == 1797  # nothing is set apart: all of them
    (tmp_path / "parts").mkdir()
    (tmp_path / "some").rename(tmp_path / "parts" / "train")
    (tmp_path / "parts" / "val" / "7").mkdir(parents=True)
    Image.fromarray(Digits().images[7]).save(tmp_path / "parts" / "val" / "7" / "a.png")
    assert load_test(tmp_path / "parts", "0123456789").labels == [7]


def test_a_folder_is_evaluated(digits_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("new/3")
    Image.fromarray(Digits().images[3]).save("new/3/a.png")
    found = evaluate(Evaluate(str(digits_run), data="new", json=True, workers=0))
    assert (found["samples"], found["classes"]["3"]["samples"], found["classes"]["0"]) == (1, 1, {"samples": 0})
    with pytest.raises(UsageError, match="no folder 'nowhere'"):
        evaluate(Evaluate(str(digits_run), data="nowhere"))
    with pytest.raises(UsageError, match="workers is -1: expected at least 0"):
        evaluate(Evaluate(str(digits_run), workers=-1))
