"""Fixtures of all tests."""

from pathlib import Path

import numpy as np
import pytest
import torch
from launching import Program
from networks import TinyNet
from PIL import Image


@pytest.fixture(scope="session")
def digits_run(program, tmp_path_factory) -> Path:
    """Two epochs of the demo: the folder of a real run. Not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    done = program("--epochs", "2", "--lr", "0.01", "--output", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """24 small images of noise, half of them darker: N.png, and by class in classes/, grey/ and deep/ (16 bits)."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(24):
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8) // (1 + number % 2)
        grey = pixels[:, :, 0]
        Image.fromarray(pixels).save(folder / f"{number}.png")
        for kind, values in (("classes", pixels), ("grey", grey), ("deep", grey.astype(np.uint16) * 257)):
            place = folder / kind / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(place / f"{number}.png")
    return folder


@pytest.fixture
def tiny() -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyNet()
