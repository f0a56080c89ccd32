"""A checkpoint is evaluated to the numbers of its training."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT
from PIL import Image

from trainer import evaluation
from trainer.commands.arguments import Evaluate
from trainer.commands.evaluate import evaluate
from trainer.data.datasets import Digits
from trainer.data.open import load_data, load_test
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
    assert "trained accuracy 0.5, loss " in text
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
    arguments = ["evaluate", "--run", tmp_path / "run", "--json", "-"]
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
    found = evaluate(Evaluate(str(digits_run), data="new", json="-", workers=0))
    assert (found["samples"], found["classes"]["3"]["samples"]) == (1, 1)
    assert found["classes"]["0"].keys() == {"samples", "predicted"}  # it has no recall
    assert found["seen_in_training"] is None  # the run's images are no files
    with pytest.raises(UsageError, match="no folder 'nowhere'"):
        evaluate(Evaluate(str(digits_run), data="nowhere"))
    with pytest.raises(UsageError, match="workers is -1: expected at least 0"):
        evaluate(Evaluate(str(digits_run), workers=-1))


def lines_of(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_numbers_of_a_classifier_are_those_of_scikit_learn(digits_run, tmp_path, capsys):
    metrics = pytest.importorskip("sklearn.metrics")
    found = evaluate(
        Evaluate(str(digits_run), json=str(tmp_path / "x.json"), csv=str(tmp_path / "x.csv"), threshold=0.2)
    )
    assert json.loads((tmp_path / "x.json").read_text()) == found
    rows = lines_of(tmp_path / "x.csv")
    assert [*rows[0]] == ["path", "label", "prediction", *"0123456789"]
    labels, said = [row["label"] for row in rows], [row["prediction"] for row in rows]
    shares = np.array([[float(row[name]) for name in "0123456789"] for row in rows])
    scores, names = found["scores"], list("0123456789")
    assert scores["accuracy"] == metrics.accuracy_score(labels, said) == found["all"]["accuracy"]
    assert scores["low_95"] < scores["accuracy"] < scores["high_95"]
    assert scores["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, said))
    assert scores["top_5"] == metrics.top_k_accuracy_score([int(label) for label in labels], shares, k=5)
    assert scores["nll"] == pytest.approx(metrics.log_loss(labels, shares / shares.sum(1, keepdims=True)), rel=1e-4)
    for kind in ("macro", "weighted"):
        theirs = metrics.precision_recall_fscore_support(labels, said, average=kind, zero_division=0)[:3]
        assert tuple(scores[kind].values()) == pytest.approx(theirs)
    assert found["confusion"] == metrics.confusion_matrix(labels, said, labels=names).tolist()
    assert [found["classes"][name]["f1"] for name in names] == pytest.approx(
        metrics.f1_score(labels, said, labels=names, average=None, zero_division=0)
    )
    sure = shares.max(1) >= 0.2
    above = found["above_threshold"]
    assert (above["images"], above["coverage"]) == (sure.sum(), sure.sum() / 359)
    assert above["accuracy"] == pytest.approx(np.mean(np.array(labels)[sure] == np.array(said)[sure]))
    text = capsys.readouterr().out
    assert "95 % Wilson interval" in text
    assert "commonest mistakes" in text
    evaluate(Evaluate(str(digits_run), csv=str(tmp_path / "x.csv")))
    assert "x.csv: 359 rows, in place of the file that was there" in capsys.readouterr().out
    with pytest.raises(UsageError, match="threshold is 7: expected a probability"):
        evaluate(Evaluate(str(digits_run), threshold=7))


def test_files_and_numbers_do_not_depend_on_the_processes(digits_run, program, tmp_path):
    written = []
    for number in (1, 2):
        names = [f"{number}.json", f"{number}.csv"]
        arguments = ["evaluate", "--run", digits_run, "--json", names[0], "--csv", names[1]]
        done = program(*arguments, cwd=tmp_path, target="trainer", processes=number)
        assert done.returncode == 0, done.stderr
        content = json.loads((tmp_path / names[0]).read_text())
        assert content.pop("processes") == number
        written.append((content, (tmp_path / names[1]).read_text()))
    assert written[0] == written[1]


def test_two_runs_are_compared_on_the_same_images(digits_run, tmp_path, capsys):
    state = checkpoint.read(digits_run / "checkpoints" / "best.pt")
    generator = torch.Generator().manual_seed(0)
    state.model["fc.weight"] += 0.2 * torch.randn(state.model["fc.weight"].shape, generator=generator)
    checkpoint.write(tmp_path / "other.pt", state)
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    found = evaluate(Evaluate(str(digits_run), compare=str(tmp_path / "other.pt"), csv=str(files[0])))["compare"]
    other = evaluate(Evaluate(str(tmp_path / "other.pt"), csv=str(files[1])))
    first, second = map(lines_of, files)
    changed = [
        {"path": a["path"], "label": a["label"], "run": a["prediction"], "compared": b["prediction"]}
        for a, b in zip(first, second, strict=True)
        if (a["prediction"] == a["label"]) != (b["prediction"] == b["label"])
    ]
    assert changed
    assert found["changed"] == changed
    assert found["compared_accuracy"] == other["scores"]["accuracy"]
    assert found["only_run_right"] + found["only_compared_right"] == len(changed)
    assert found["seen_in_training"] == 0
    assert "McNemar's exact test: p = " in capsys.readouterr().out


def test_a_moved_copy_is_evaluated_on_the_validation_images_of_the_run(photos, program, tmp_path, capsys):
    shutil.copytree(photos / "train", tmp_path / "here")
    done = program("--data", "here", *SMALL, "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state = checkpoint.read(tmp_path / "run" / "checkpoints" / "best.pt")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    run = str(tmp_path / "run")
    state.config["data"]["data"] = str(tmp_path / "here")
    checkpoint.write(tmp_path / "run" / "checkpoints" / "best.pt", state)
    found = evaluate(Evaluate(run, data=str(tmp_path / "there")))
    assert (found["own_validation_images"], found["samples"]) == (True, 12)
    assert found["all"] == state.metrics["val"]
    # One image that is not the run's: all are evaluated, and the others known by their bytes, whatever their names.
    shutil.copy(photos / "val" / "down" / "001.jpg", tmp_path / "there" / "down" / "001.jpg")
    os.rename(tmp_path / "there" / "down" / "002.jpg", tmp_path / "there" / "down" / "new.jpg")
    found = evaluate(Evaluate(run, data=str(tmp_path / "there")))
    _, val = load_data(tmp_path / "here")
    replaced = (tmp_path / "here/down/001.jpg") not in [Path(val.path(index)) for index in range(len(val))]
    assert (found["own_validation_images"], found["samples"]) == (False, 60)
    assert found["seen_in_training"] == 48 - replaced
    assert f"note    {48 - replaced} of these images were seen in training; the numbers are better" in (
        capsys.readouterr().out
    )
    assert evaluate(Evaluate(run, data=str(photos)))["seen_in_training"] == 0  # its val/
    os.remove(tmp_path / "here" / "down" / "003.jpg")
    evaluate(Evaluate(run))
    assert "note    these are not the run's images any more" in capsys.readouterr().out
    assert evaluate(Evaluate(run, data=str(photos)))["seen_in_training"] is None


@pytest.fixture
def tables(tmp_path):
    """Twenty digits, with several labels each, and with a number each."""
    rows = {"labels": [], "value": []}
    for index in range(20):
        Image.fromarray(Digits().images[index]).save(tmp_path / f"{index}.png")
        digit = Digits().labels[index]
        names = ["odd" if digit % 2 else "even", *["large"] * (digit > 4)]
        rows["labels"].append(f"{index}.png,{';'.join(names)}")
        rows["value"].append(f"{index}.png,{digit}")
    for column, lines in rows.items():
        (tmp_path / f"{column}.csv").write_text("\n".join([f"file,{column}", *lines]))
    return tmp_path


def trained(program, folder, *, example: str, data: str) -> str:
    recipe = str(ROOT / "examples" / f"{example}.py")
    done = program("--data", data, *SMALL, "--recipe", recipe, "--augment", "none", "--output", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return recipe


def test_several_labels(tables, program, monkeypatch, capsys):
    metrics = pytest.importorskip("sklearn.metrics")
    monkeypatch.chdir(tables)
    recipe = trained(program, tables, example="multi_label", data="labels.csv")
    found = evaluate(Evaluate("run", recipe=recipe, csv="x.csv"))
    rows = lines_of("x.csv")
    names = ["even", "large", "odd"]
    shares = np.array([[float(row[name]) for name in names] for row in rows])
    wanted = np.array([json.loads(row["label"]) for row in rows])
    assert [found["classes"][name]["average_precision"] for name in names] == pytest.approx(
        metrics.average_precision_score(wanted, shares, average=None)
    )
    f1 = {kind: metrics.f1_score(wanted, shares > 0.5, average=kind, zero_division=0) for kind in ("macro", "micro")}
    assert (found["scores"]["macro_f1"], found["scores"]["micro_f1"]) == pytest.approx((f1["macro"], f1["micro"]))
    assert found.keys().isdisjoint({"confusion", "above_threshold"})
    assert f"macro f1 {f1['macro']:.4f}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--threshold needs a classifier"):
        evaluate(Evaluate("run", recipe=recipe, threshold=0.5))
    # Other images go through the recipe, which opens a table.
    (tables / "new.csv").write_text((tables / "labels.csv").read_text().replace("\n1.png", "\n./1.png"))
    other = evaluate(Evaluate("run", recipe=recipe, data="new.csv"))
    assert (other["samples"], other["data"]) == (found["samples"], "new.csv")


def test_a_number_for_each_image(tables, program, monkeypatch, capsys):
    monkeypatch.chdir(tables)
    recipe = trained(program, tables, example="regression", data="value.csv")
    found = evaluate(Evaluate("run", recipe=recipe, csv="x.csv"))
    assert found["all"].keys() == {"loss", "absolute_error", "r2"}
    assert (found.get("scores"), found["classes"]) == (None, {})
    rows = lines_of("x.csv")
    errors = [abs(float(row["label"]) - float(row["value"])) for row in rows]
    assert np.mean(errors) == pytest.approx(found["all"]["absolute_error"], rel=1e-5)
    assert not any(word in capsys.readouterr().out for word in ("NLL", "accuracy", "entropy"))
    with pytest.raises(UsageError, match="--compare needs a classifier"):
        evaluate(Evaluate("run", recipe=recipe, compare="run"))
