"""A checkpoint of every released format, in formats/, must load for ever.

python tests/storage/test_formats.py        # writes that of the present format; never again once it is released
"""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from networks import TinyNet

import trainer
from trainer.config import OptimConfig
from trainer.optim import build_optimizer
from trainer.storage import checkpoint
from trainer.storage.optimizer_state import optimizer_state
from trainer.trunk.features import CachedFeatures

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
        source = CachedFeatures(parts.trunk(images), torch.arange(21) % 3)
    config = OptimConfig(epochs=3, lr=0.01, warmup=0.0)
    about = {"freeze_plan": plan.to_dict(), "classes": ["a", "b", "ç"], "base": {"source": "none"}, "config": {}}
    about["data"] = {"training": "0" * 16, "validation": "1" * 16, "skipped": [["a/0.jpg"], []]}
    loop = trainer.Trainer(
        *(Accelerator(cpu=True), model, parts.tail, build_optimizer(model, config)),
        plan=trainer.BatchPlan(21, 8, 4, 1),
        config=config,
        recipe=trainer.Recipe(),
        about=about,
    )
    return loop, source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_released_format_loads_for_ever(path, tmp_path):
    state = checkpoint.read(path)
    assert f"format-{state['format']}" == path.stem
    loop, source = _loop()
    loop.load(state)
    assert (loop.epoch, loop.step, loop.samples) == (1, 3, 21)
    assert loop.metrics["best"]["accuracy"] == 0.5
    live = {name: tensor for name, tensor in loop.model.state_dict().items() if name in state["model"]}
    assert live.keys() == state["model"].keys()
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in live.items())
    kept = optimizer_state(loop.optimizer.optimizer, loop.model)["state"]
    assert kept.keys() == state["optimizer"]["state"].keys()
    assert all(torch.equal(kept[name]["exp_avg"], state["optimizer"]["state"][name]["exp_avg"]) for name in kept)
    for _ in loop.steps(source):
        pass
    loop.finish_epoch(loop.evaluate(source))
    assert checkpoint.read(loop.save(tmp_path))["step"] == 6


def test_the_present_format_is_among_them():
    assert f"format-{checkpoint.FORMAT}" in {path.stem for path in FILES}


if __name__ == "__main__":
    loop, source = _loop()
    for _ in loop.steps(source):
        pass
    loop.finish_epoch({"accuracy": 0.5, "loss": 1.0})
    checkpoint.write(Path(__file__).with_name("formats") / f"format-{checkpoint.FORMAT}.pt", loop.state())
