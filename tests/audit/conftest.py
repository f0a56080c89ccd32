"""The built-in digits, their random features and prints: computed once."""

from types import SimpleNamespace

import pytest
import torch

from trainer.audit import features_of, take_prints
from trainer.config import DataConfig, SpeedConfig
from trainer.data.loader import Workers
from trainer.data.open import load_data
from trainer.model.classifiers import build_model
from trainer.processes.startup import finish, start


@pytest.fixture(scope="session")
def digits():
    """What the demo sees: ResNet-18 without pretrained weights, at 64 pixels."""
    parts = load_data(DataConfig().data)
    classifier = build_model("resnet18", 10, weights="none", image_size=64)
    transform, accelerator = classifier.input.eval_transform(), start()
    features = features_of(accelerator, classifier, parts, transform=transform, config=SpeedConfig(compile="off"))
    prints = take_prints(accelerator, parts, workers=Workers())
    finish()
    labels = torch.tensor([*parts[0].labels, *parts[1].labels])
    return SimpleNamespace(
        parts=parts,
        features=features,
        prints=[*prints[0], *prints[1]],
        labels=labels,
        train=len(parts[0]),
        transform=transform,
    )
