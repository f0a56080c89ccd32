"""What inspect and verify say is true."""

import json
import re
import shutil

import pytest
import torch
from made_run import write_own_run, write_run
from torchvision import models

import trainer
from trainer.commands.arguments import Inspect, Verify
from trainer.commands.inspect import inspect
from trainer.commands.verify import verify
from trainer.errors import CheckpointError, UsageError
from trainer.model import patterns as rules
from trainer.storage import checkpoint


def report(capsys, *args, **kwargs):
    inspect(Inspect(*args, json=True, **kwargs))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
        *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
        *("squeezenet1_1", "swin_t", "vgg11", "vit_b_32"),
    ],
)
def test_numbers_are_torchvisions(name, capsys):
    """Parameters and multiply-adds as torchvision's own documentation has them."""
    found, meta = report(capsys, name), models.get_model_weights(name).DEFAULT.meta
    auxiliary = {"googlenet": 6_624_904 - 6_624_904, "inception_v3": 27_161_264 - 23_834_568}.get(name, 0)
    assert found["total"]["parameters"] == meta["num_params"] - auxiliary
    assert found["total"]["multiply_adds"] / 1e9 == pytest.approx(meta["_ops"], rel=0.02)
    assert found["total"]["bytes"] >= 4 * found["total"]["parameters"]
    assert [row["trains"] for row in found["parameters"]].count(True) in (1, 2)  # the head
    assert found["split"].startswith(("cut before", "uncut"))


def test_the_cut_is_where_training_would_make_it(capsys):
    found = report(capsys, "resnet18", train=("layer4.1", "head"), num_classes=10)
    classifier = trainer.build_model("resnet18", 10, weights="none")
    plan = trainer.freeze(classifier.model, ["layer4.1", "head"], head=classifier.head)
    parts = trainer.split_model(classifier.model, torch.randn(1, 3, 224, 224))
    assert found["split"] == str(parts)
    assert found["train"] == str(plan)
    rows = {row["name"]: row for row in found["modules"]}
    assert (rows["layer4"]["state"], rows["layer4.1"]["state"], rows["layer4.0"]["state"]) == (
        "part",
        "trains",
        "frozen",
    )
    assert (rows["layer4.1"]["mode"], rows["layer4.0"]["mode"]) == ("train", "eval")
    assert rows["layer4.1"]["output"] == [512, 7, 7]
    assert rows["fc"]["multiply_adds"] == 5120


def test_text_fits_a_terminal(digits_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (("densenet121",), ("vit_b_32",), (str(digits_run),)):
        inspect(Inspect(*arguments, depth=9))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 500
    assert max(map(len, lines)) <= 80


def test_a_run_says_what_it_holds_and_what_it_was_trained_with(digits_run, capsys):
    inspect(Inspect(str(digits_run), names=True, grep="fc"))
    text = capsys.readouterr().out
    assert re.search(r"best\.pt: \d+(\.\d)? kB, epoch 2, step 46", " ".join(text.split()))
    assert "2 tensors, 5,130 values" in text
    assert "trains  f32          10×512  fc.weight\ntrains  f32              10  fc.bias\n" in text
    assert "conv1" not in text
    assert "optimizer adamw, lr 0.01" in text
    found = report(capsys, str(digits_run))
    assert found["config"] == checkpoint.read(digits_run / "checkpoints" / "best.pt")["config"]
    assert found["image_size"] == 64


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_plan_is_saved(digits_run, suffix, tmp_path, capsys, monkeypatch):
    path = tmp_path / f"plan{suffix}"
    monkeypatch.setenv("HOME", str(path.parent))
    inspect(Inspect(str(digits_run), save_plan=f"~/{path.name}"))
    assert rules.read(path) == ("head",)  # as --freeze-plan takes it


def test_two_checkpoints_are_compared(digits_run, capsys):
    first, last = checkpoint.steps(digits_run / "checkpoints")
    inspect(Inspect(diff=(str(first), str(last)), json=True))
    found = json.loads(capsys.readouterr().out)
    a, b = (checkpoint.read(path)["model"]["fc.weight"] for path in (first, last))
    (row,) = (row for row in found["tensors"] if row["name"] == "fc.weight")
    assert row["change"] == pytest.approx((b - a).norm().item())
    assert row["norm"] == pytest.approx(a.norm().item())
    assert found["settings"] == {"epoch": [1, 2], "step": [23, 46]}
    inspect(Inspect(diff=(str(last), str(digits_run))))
    assert "0 of 2 tensors differ" in capsys.readouterr().out


def test_checkpoints_of_different_models_are_compared(tmp_path, capsys):
    a = write_run(tmp_path / "a", "squeezenet1_1", 32)
    b = write_run(tmp_path / "b", "squeezenet1_1", 32, train=("head", "features.12"))
    path = b / "checkpoints" / "best.pt"
    state = checkpoint.read(path)
    state["fingerprint"]["features.0.weight"] = "other"
    state["model"]["classifier.1.bias"] = torch.ones(4)
    checkpoint.write(path, state)
    inspect(Inspect(diff=(str(a), str(b))))
    text = capsys.readouterr().out
    assert "3 → 4  classifier.1.bias" in text
    assert "none → 64  features.12.squeeze.bias" in text
    assert "1 frozen tensors differ, such as features.0.weight" in text
    assert "model.train: ['head'] → ['head', 'features.12']" in text


def test_a_file_of_weights_is_listed(tmp_path, capsys):
    torch.save({"state_dict": {"module.fc.weight": torch.ones(2, 3)}}, tmp_path / "x.pth")
    inspect(Inspect(str(tmp_path / "x.pth")))
    assert capsys.readouterr().out.split() == ["f32", "2×3", "fc.weight"]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"target": "resnet19"}, "closest: resnet18"),
        ({"target": "resnet18", "grep": "("}, "is not a regular expression"),
        ({"target": "resnet18", "train": ("layer9",)}, "matches no parameter"),
        ({"target": "inception_v3", "image_size": 74}, "image_size is 74: inception_v3 takes 75 pixels or more"),
        ({"target": "vgg11", "image_size": 31}, "image_size is 31: vgg11 takes 32 pixels or more"),
        ({}, "expected either a model, checkpoint or run to show, or --diff A B"),
        ({"target": "resnet18", "diff": ("a", "b")}, "expected either"),
    ],
)
def test_mistakes(kwargs, says):
    with pytest.raises(UsageError, match=says):
        inspect(Inspect(**kwargs))


def test_every_checkpoint_of_a_run_is_verified(digits_run, tmp_path, capsys):
    verify(Verify(str(digits_run)))
    assert capsys.readouterr().out.count("ok ") == 3
    shutil.copytree(digits_run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    data = bytearray((folder / "step-00000023.pt").read_bytes())
    data[1000] ^= 1
    (folder / "step-00000023.pt").write_bytes(data)
    state = checkpoint.read(folder / "best.pt")
    state["fingerprint"]["conv1.weight"] = "0"
    checkpoint.write(folder / "best.pt", state)
    with pytest.raises(CheckpointError) as caught:
        verify(Verify(str(tmp_path / "run")))
    assert "2 of 3 cannot be used" in str(caught.value)
    assert "step-00000023.pt is damaged" in str(caught.value)
    assert "best.pt: the frozen part of this model is not the one" in str(caught.value)
    assert capsys.readouterr().out.count("ok ") == 1


def test_there_must_be_something_to_verify(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.pt"):
        with pytest.raises(CheckpointError, match="there is no checkpoint and no export here"):
            verify(Verify(str(path)))
    (tmp_path / "x.pt").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"1 of 1 cannot be used:\n  .*x\.pt is truncated, or not a checkpoint"):
        verify(Verify(str(tmp_path / "x.pt")))


def test_a_run_of_a_module_of_ones_own(tmp_path, capsys):
    run, recipe = write_own_run(tmp_path / "run")
    inspect(Inspect(str(run)))
    text = capsys.readouterr().out
    assert "holds   2 tensors, 27 values" in text
    assert "best    accuracy 0.5000, epoch 1\n" in text  # integers as integers
    assert re.search(r"f32 +3×8  fc\.weight\n", text)
    assert "base not at hand: give --recipe FILE" in text
    assert [row["name"] for row in report(capsys, str(run))["holds"]] == ["fc.weight", "fc.bias"]
    verify(Verify(str(run)))
    assert "2 parameters; base not at hand: give --recipe FILE" in capsys.readouterr().out
    verify(Verify(str(run), recipe=str(recipe)))
    assert "2 parameters; base as fingerprinted (14)" in capsys.readouterr().out
    path = run / "checkpoints" / "best.pt"
    state = checkpoint.read(path)
    state.fingerprint["conv.weight"] = "0"
    checkpoint.write(path, state)
    with pytest.raises(CheckpointError, match=r"conv\.weight: expected sha256 0"):
        verify(Verify(str(run), recipe=str(recipe)))
    del state.model["fc.bias"]
    checkpoint.write(path, state)
    with pytest.raises(CheckpointError, match=r"it lacks fc\.bias, which train"):
        verify(Verify(str(run)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        verify(Verify(str(run)))
