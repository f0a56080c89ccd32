"""A change of this template as a project makes it: trained, killed, resumed, and used by every command."""

import csv
import json
from pathlib import Path

import torch

from trainer.storage import checkpoint
from trainer.storage.state import State

SMALL = ["--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "0", "--lr", "1e-3"]
SMALL += ["--augment", "none"]
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


def train(program, folder: Path, options: list, *, recipe: list, **where: object) -> State:
    """Three epochs, in one go and with a kill in the second: the same bits. Returns the state at the end of "run"."""
    options = [*recipe, *options, "--epochs", "3"]
    whole = program(*options, "--output", "whole", cwd=folder, **where)
    assert whole.returncode == 0, whole.stderr
    assert "done: best validation epoch" in whole.stdout
    assert program(*options, "--output", "run", cwd=folder, setup=KILL, **where).returncode == -9
    again = program("--resume", "auto", "--output", "run", *recipe, cwd=folder, **where)
    assert again.returncode == 0, again.stderr
    assert "recipe  " not in again.stdout
    found, expected = (checkpoint.newest(folder / run / "checkpoints")[1] for run in ("run", "whole"))
    assert found.step == expected.step
    assert found.metrics == expected.metrics
    assert all(torch.equal(tensor, expected.model[key]) for key, tensor in found.model.items())
    return found


def use(program, folder: Path, *, recipe: list, image: Path | None) -> dict[str, str]:
    """Run every command on "run"; returns the row of the table for an image, empty without one.

    Args:
        program: the fixture.
        folder: where `train` was.
        recipe: `--recipe FILE`, or nothing.
        image: to predict; None: the model does not take one image.
    """

    def command(*arguments):
        done = program(*arguments, *recipe, cwd=folder, target="trainer")
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        assert "recipe  " not in done.stdout
        return done.stdout

    result = json.loads(command("evaluate", "--run", "run", "--json", "-"))
    assert result["all"] == checkpoint.read(folder / "run" / "checkpoints" / "best.pt").metrics["val"]
    assert "base as fingerprinted" in command("verify", "run")
    assert "not at hand" not in command("inspect", "run")
    assert command("export", "--run", "run").count("bit-equal logits") == 2
    assert "report.html: " in command("report", "run")
    if image is None:
        return {}
    command("predict", "--run", "run", image, "--csv", "table.csv")
    return next(csv.DictReader((folder / "table.csv").read_text().splitlines()))
