"""A small run, as facts."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.report import Facts, Finding, Table

NAUGHTY = "<script>document.title='owned'</script>"
QUOTED = "\"'><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="session")
def facts() -> Facts:
    """Twelve images of three classes, nine of them classified correctly; class and file names that want to be code."""
    labels = np.arange(12) % 3
    logits = np.eye(3)[labels] * 2.0
    logits[:3] = logits[[1, 2, 0]]  # each taken for the next class
    logits[3:] += np.arange(9)[:, None] * np.eye(3)[labels[3:]] / 10

    def thumbnail(image: int) -> Image.Image | torch.Tensor:
        if image == 5:
            raise OSError("it is gone")
        if image % 2:
            return torch.full((3, 30, 40), 20 * image, dtype=torch.uint8)
        return Image.new(("RGB", "L", "RGBA", "P")[image % 4], (300, 200))

    return Facts(
        title=f"A run of {NAUGHTY}",
        classes=[NAUGHTY, QUOTED, "naïve 猫 \ud800 \u202e"],
        labels=torch.from_numpy(labels),
        logits=torch.from_numpy(logits).bfloat16(),
        names=[f"val/{QUOTED}/{NAUGHTY}/{image}.jpg" for image in range(12)],
        thumbnail=thumbnail,
        heat_map=lambda image: torch.randn(3, 4),
        features=np.random.default_rng(0).normal(size=(12, 5)),
        history=[
            {"epoch": 1, "step": 5, "train": {"loss": 1.5}, "val": {"loss": 1.2, QUOTED: 0.5}, "lr": 0.1, "seconds": 2},
            {"epoch": 2, "step": 10, "train": {"loss": 1.0}, "val": {"loss": float("nan"), QUOTED: 0.75}, "lr": 0.01},
        ],
        timings={QUOTED: 61.0, "evaluate": 0.5},
        search=Table(["rate", NAUGHTY], [[0.1, 0.8], [0.01, QUOTED]], chosen=0),
        audit=[Finding(f"2 images {NAUGHTY}", [f"{QUOTED}{number}" for number in range(20)], advice=QUOTED)],
        settings={"model": {"name": NAUGHTY, "train": ["head"]}, "seed": 0, QUOTED: {}},
        versions={"torch": "2.11", NAUGHTY: QUOTED},
        command=f"python train.py \\\n  --data '{NAUGHTY}'",
    )


@pytest.fixture(scope="session")
def bare(facts) -> Facts:
    """The same run, of which only what must be known is known."""
    return Facts("A run", ["a", "b", "c"], facts.labels, facts.logits)


@pytest.fixture
def changed(facts) -> Callable[..., Facts]:
    """The small run with other facts."""
    return lambda **other: dataclasses.replace(facts, **other)
