"""A checkpoint of every released format, in formats/, must load for ever.

python tests/test_formats.py        # writes that of the present format; never again once it is released
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import TinyNet

import trainer
from trainer import checkpoint
from trainer.features import Kept

FILES = sorted(Path(__file__).with_name("formats").glob("format-*.pt"))


def _loop():
    """A trainer of a network whose every number is known, whatever a new version of torch draws."""
    model = TinyNet()
    for number, tensor in enumerate(model.state_dict().values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.arange(1.0, tensor.numel() + 1).reshape(tensor.shape).div(7 * tensor.numel() + number))
    plan = trainer.freeze(model, ["block", "fc"])
    parts = trainer.split_model(model, torch.zeros(1, 3, 8, 8))
    images = torch.linspace(-1, 1, 21 * 192).reshape(21, 3, 8, 8)
    with torch.no_grad():
        source = Kept(parts.trunk(images), torch.arange(21) % 3)
    about = {"freeze_plan": plan.to_dict(), "classes": ["a", "b", "ç"], "base": {"source": "none"}, "config": {}}
    about["data"] = {"training": "0" * 16, "validation": "1" * 16, "skipped": [["a/0.jpg"], []]}
    loop = trainer.Trainer(
        *(Accelerator(cpu=True), model, parts.tail, trainer.build_optimizer(model, "adamw", lr=0.01)),
        plan=trainer.BatchPlan(21, 8, 4, 1),
        lr=partial(trainer.learning_rate, peak=0.01),
        epochs=3,
        about=about,
    )
    return loop, source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_released_format_loads_for_ever(path, tmp_path):
    state = checkpoint.read(path)
    assert f"format-{state['format']}" == path.stem
    loop, source = _loop()
    loop.load(path)
    assert (loop.epoch, loop.step, loop.samples) == (1, 3, 21)
    assert loop.metrics["best"]["accuracy"] == 0.5
    live = {name: tensor for name, tensor in loop.model.state_dict().items() if name in state["model"]}
    assert live.keys() == state["model"].keys()
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in live.items())
    kept = checkpoint.optimizer_state(loop.optimizer.optimizer, loop.model)["state"]
    assert kept.keys() == state["optimizer"]["state"].keys()
    assert all(torch.equal(kept[name]["exp_avg"], state["optimizer"]["state"][name]["exp_avg"]) for name in kept)
    loop.finish_epoch(train=loop.train_epoch(source))
    assert checkpoint.read(loop.save(tmp_path))["step"] == 6


def test_the_present_format_is_among_them():
    assert f"format-{checkpoint.FORMAT}" in {path.stem for path in FILES}


if __name__ == "__main__":
    loop, source = _loop()
    means = loop.train_epoch(source)
    loop.finish_epoch(train=means, val=means, best={"accuracy": 0.5})
    checkpoint.write(Path(__file__).with_name("formats") / f"format-{checkpoint.FORMAT}.pt", loop.state())
