"""What only a GPU can show: fp16 with its scaler, determinism, a run that moves between devices."""

import json
import os
import subprocess
import sys

import pytest
import torch
from launching import ROOT, TINY_RUN

from trainer.storage import checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRAIN = ROOT / "train.py"
SMALL = ["--model", "resnet18", "--weights", "none", "--image-size", "64", "--batch-size", "16", "--workers", "2"]


def _train(*arguments: object, cwd, **env: str):
    """train.py as one process; the launcher's choices are environment variables."""
    done = subprocess.run(
        [sys.executable, str(TRAIN), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def _tiny(folder, *options: str, **env: str):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(TINY_RUN), str(folder), *options]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return (folder / "end.0.txt").read_text()


@pytest.mark.parametrize("train", ["head", "all"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_it_learns_in_each_precision(photos, tmp_path, precision, train):
    options = ["--data", photos, *SMALL, "--train", train, "--epochs", "8", "--lr", "0.01", "--output", "run"]
    _train(*options, cwd=tmp_path, ACCELERATE_MIXED_PRECISION=precision)
    state = checkpoint.read(checkpoint.newest(tmp_path / "run" / "checkpoints"))
    assert all(value.dtype == torch.float32 for value in state["model"].values() if value.is_floating_point())
    assert state["metrics"]["best"]["accuracy"] >= 0.8
    assert (state["scaler"] is None) == (precision != "fp16")
    if precision == "fp16":
        assert state["scaler"]["scale"] > 0


def test_a_scaler_survives_a_part_of_the_run_without_one(photos, tmp_path):
    options = ["--data", photos, *SMALL, "--output", "run", "--lr", "0.001"]
    _train(*options, "--epochs", "1", cwd=tmp_path, ACCELERATE_MIXED_PRECISION="fp16")
    scale = checkpoint.read(checkpoint.newest(tmp_path / "run" / "checkpoints"))["scaler"]
    cpu = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    _train("--resume", "run", "--epochs", "2", cwd=tmp_path, **cpu)
    assert checkpoint.read(checkpoint.newest(tmp_path / "run" / "checkpoints"))["scaler"] == scale
    _train("--resume", "run", "--epochs", "3", cwd=tmp_path, ACCELERATE_MIXED_PRECISION="fp16")
    after = checkpoint.read(checkpoint.newest(tmp_path / "run" / "checkpoints"))["scaler"]
    assert after["_growth_tracker"] > scale["_growth_tracker"]


def test_an_exact_run_repeats_itself_and_survives_a_kill(tmp_path):
    golden = _tiny(tmp_path / "golden", "--exact", "--workers=1")
    assert _tiny(tmp_path / "again", "--exact", "--workers=1") == golden
    folder = tmp_path / "killed"
    folder.mkdir()
    command = [sys.executable, str(TINY_RUN), str(folder), "--exact", "--workers=1", "--kill", "step:7"]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert _tiny(folder, "--exact", "--workers=1") == golden


def test_a_run_moves_from_cpu_to_gpu_and_back(tmp_path):
    """The same samples and learning rates; the bits of the weights are another matter."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    _tiny(tmp_path / "cpu", **hidden)
    _tiny(tmp_path / "moved", "--stop=1", **hidden)
    _tiny(tmp_path / "moved", "--stop=2")
    _tiny(tmp_path / "moved", **hidden)
    runs = [(tmp_path / name / "ledger.0.jsonl").read_text().splitlines() for name in ("cpu", "moved")]
    for left, right in zip(*(map(json.loads, run) for run in runs), strict=True):
        assert (left["step"], left["rate"]) == (right["step"], right["rate"])
    left, right = (torch.load(tmp_path / name / "end.0.pt", weights_only=True)["model"] for name in ("cpu", "moved"))
    for name, value in left.items():
        assert ((value - right[name]).norm() / value.norm()).item() < 1e-3, name
