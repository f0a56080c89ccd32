"""Shared by the tests: the launcher, tiny images, a tiny network."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).parent.parent
TINY_RUN = ROOT / "tests" / "tiny_run.py"


def launch(
    script: Path,
    *arguments: object,
    cwd: Path,
    config: str = "cpu",
    processes: int | None = None,
    env: dict | None = None,
):
    """Run a script through `accelerate launch` with one of the configurations; gives the finished process."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    command += ["--num_processes", str(processes)] if processes else []
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def join(rank: int, processes: int, port: int) -> None:
    """Make this process one of several on this machine, by the environment that a launcher gives it."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def tiny_run(folder: Path, *options: object, processes: int, check: bool = True):
    """Run tiny_run.py on several processes through the launcher; gives the finished process."""
    folder.mkdir(exist_ok=True)
    done = launch(TINY_RUN, folder, *options, cwd=folder.parent, config="cpu_x2", processes=processes)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def digits_run(program, tmp_path_factory) -> Path:
    """Two epochs of the demo: the folder of a real run. Not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    done = program("--epochs", "2", "--output", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def write_run(folder: Path, name: str, size: int, *, train: tuple[str, ...] = ("head",), weights: str = "none") -> Path:
    """A run of any torchvision model as if it had been trained: its trained tensors are moved a little."""
    from trainer import checkpoint
    from trainer.backbones import build_model
    from trainer.freezing import fingerprint, freeze, trained_tensors

    backbone = build_model(name, 3, weights=weights, image_size=size)
    plan = freeze(backbone.model, train, head=backbone.head)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, value in trained_tensors(backbone.model).items():
        value = value.detach().clone()
        tensors[key] = (
            value + 0.1 * torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        )
    state = {
        "model": tensors,
        "optimizer": {"kind": "AdamW", "state": {}},
        "scaler": None,
        **dict.fromkeys(("epoch", "step", "samples", "skipped_samples", "training_samples"), 1),
        "totals": {},
        "metrics": {"val": {"loss": 1.0, "accuracy": 0.5}},
        "fingerprint": fingerprint(backbone.model),
        "freeze_plan": plan.to_dict(),
        "classes": ["a", "b", "ç {x}"],
        "data": {},
        "base": backbone.base,
        "config": {
            "data": {"data": "nowhere", "data_root": "nowhere", "val_fraction": 0.2, "image_size": size},
            "model": {"name": name, "weights": weights, "train": list(train)},
            "run": {"seed": 0, "exact": False},
        },
        "compute": {"device": "cpu", "precision": "no", "micro_batch": 4},
    }
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.write(folder / "checkpoints" / "best.pt", state)
    return folder


class Program:
    """Runs train.py, or another program of this project, in a third of a second: see program.py."""

    def __init__(self):
        command = [sys.executable, str(ROOT / "tests" / "program.py")]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def __call__(
        self,
        *arguments: object,
        cwd: Path,
        target: Path | str = ROOT / "train.py",
        processes: int = 1,
        setup: str = "",
        env: dict | None = None,
        timeout: float = 100,
    ):
        """Run it; gives returncode, stdout, stderr and pid.

        Args:
            arguments: its command line.
            target: a script, or the name of a package.
            processes: how many, which find each other as those of a launcher do.
            setup: Python code to run before, in each process: where a test breaks something.
            timeout: seconds, after which it is killed.
        """
        job = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "setup": setup, "env": env or {}}
        job |= {"target": str(target), "processes": processes, "timeout": timeout}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return SimpleNamespace(**json.loads(self.server.stdout.readline()))


@pytest.fixture(scope="session")
def program():
    started = Program()
    yield started
    started.server.kill()  # not told by the end of its input: a data worker of these tests may hold that open
    started.server.communicate()


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of JPEGs of two classes, 30 + 10 each: stripes one way, stripes the other, with noise."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("val", 10)):
        for label in ("across", "down"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                wave = np.sin(np.arange(64) / generator.uniform(1.5, 3))[:, None]
                stripes = np.broadcast_to(wave, (64, 64)) if label == "across" else np.broadcast_to(wave.T, (64, 64))
                pixels = 128 + 90 * stripes[..., None] + generator.normal(0, 20, (64, 64, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{number:03d}.jpg", quality=90)
    return root


class TinyNet(nn.Module):
    """8×8 images; BatchNorm and dropout before a frozen layer, dropout before the head."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.early = nn.Dropout(0.5)
        self.block = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.late = nn.Dropout(0.25)
        self.fc = nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.block(self.early(torch.relu(self.bn(self.conv(images)))))  # [B, 8, 3, 3]
        return self.fc(self.late(features.mean((2, 3))))


@pytest.fixture
def tiny() -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyNet()
