"""A number for each image: a CSV file with the columns file and value.

python train.py --recipe examples/regression.py --data photos/values.csv --augment none
"""

import csv
from pathlib import Path

import torch

from trainer.data import FileImages, Subset, stratified_split
from trainer.model import build_model


def images(config, *, seed):
    table = Path(config.data)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    values = torch.tensor([float(row["value"]) for row in rows])  # [N]
    every = FileImages([table.parent / row["file"] for row in rows], values)
    train, val = stratified_split(values, config.val_fraction, seed=seed)
    return Subset(every, train), Subset(every, val)


def model(config, weights, classes, *, image_size, seed):
    return build_model(config.model, 1, weights=weights, image_size=image_size, seed=seed)


def step(config):
    def squared(model, batch):
        values = model(*batch["inputs"]).float().squeeze(1)  # [B]
        error = values - batch["label"]
        return {"loss": error.square(), "absolute_error": error.abs(), "outputs": values}

    return squared


def metrics(outputs, labels):
    """The coefficient of determination, R²."""
    return {"r2": 1 - (outputs - labels).square().sum() / (labels - labels.mean()).square().sum()}


def score(val):
    return -val["absolute_error"]


def prediction(output, classes, *, top=3):
    value = output.flatten()[0].item()
    return f"{value:.3f}", {"value": value}
