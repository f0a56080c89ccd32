"""Runs as if they had been trained: of any torchvision model, and of a module of the user's own."""

from pathlib import Path

import torch
from networks import TinyNet
from states import made_state

from trainer.model.classifiers import build_model
from trainer.model.freezing import fingerprint, freeze, trained_tensors
from trainer.storage import checkpoint


def write_run(folder: Path, name: str, size: int, *, train: tuple[str, ...] = ("head",), weights: str = "none") -> Path:
    """A run of any torchvision model as if it had been trained: its trained tensors are moved a little."""
    classifier = build_model(name, 3, weights=weights, image_size=size)
    plan = freeze(classifier.model, train, head=classifier.head)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, value in trained_tensors(classifier.model).items():
        value = value.detach().clone()
        tensors[key] = (
            value + 0.1 * torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        )
    state = made_state(
        model=tensors,
        metrics={"val": {"loss": 1.0, "accuracy": 0.5}},
        fingerprint=fingerprint(classifier.model),
        freeze_plan=plan.to_dict(),
        classes=["a", "b", "ç {x}"],
        base=classifier.base,
        config={
            "data": {"data": "nowhere", "data_root": "nowhere", "val_fraction": 0.2, "image_size": size},
            "model": {"name": name, "weights": weights, "train": list(train)},
            "run": {"seed": 0, "exact": False},
        },
        compute={"device": "cpu", "precision": "no", "micro_batch": 4},
    )
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.write(folder / "checkpoints" / "best.pt", state)
    return folder


RECIPE = """import torch
from networks import TinyNet
import trainer

def model(config, weights, classes, *, image_size, seed):
    torch.manual_seed(0)
    return trainer.build_model(TinyNet(), len(classes), head="fc", image_size=8)
"""


def write_own_run(folder: Path, *, weights: str = "default") -> tuple[Path, Path]:
    """A run of TinyNet with a new head, and the recipe that builds it."""
    folder.mkdir(parents=True)
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = build_model(TinyNet(), 3, head="fc", image_size=8)
    plan = freeze(classifier.model, ["head"], head=classifier.head)
    state = made_state(
        model={name: torch.full_like(value, 0.5) for name, value in trained_tensors(classifier.model).items()},
        metrics={"val": {"loss": 1.0, "accuracy": 0.5}, "best": {"accuracy": 0.5, "epoch": 1}},
        fingerprint=fingerprint(classifier.model),
        freeze_plan=plan.to_dict(),
        classes=["a", "b", "c"],
        base=classifier.base,
        config={
            "data": {"data": "/home/somebody/secret/photos", "image_size": 8},
            "model": {"model": "resnet18", "train": ["head"]},
            "weights": {"weights": weights},
            "run": {"seed": 0},
        },
        compute={"device": "cpu", "precision": "no", "micro_batch": 4},
    )
    (folder / "checkpoints").mkdir()
    checkpoint.write(folder / "checkpoints" / "best.pt", state)
    return folder, recipe
