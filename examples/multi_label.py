"""Several labels for an image: a CSV file with the columns file and labels, such as "dog;outdoors".

python train.py --recipe examples/multi_label.py --data photos/labels.csv --augment none
"""

import csv
from pathlib import Path

import torch
import torch.nn.functional as F

from trainer.data import FileImages, Subset, stratified_split


def images(config, *, seed):
    table = Path(config.data)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    given = [set(filter(None, row["labels"].split(";"))) for row in rows]
    classes = sorted(set().union(*given))
    labels = torch.tensor([[float(name in names) for name in classes] for names in given])  # [N, C], 0 or 1
    every = FileImages([table.parent / row["file"] for row in rows], labels, classes)
    train, val = stratified_split(labels, config.val_fraction, seed=seed)
    return Subset(every, train), Subset(every, val)


def step(config):
    def binary(model, batch):
        logits, wanted = model(*batch["inputs"]).float(), batch["label"]  # [B, C]
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
        all_right = ((logits > 0) == (wanted > 0)).all(dim=1)
        return {"loss": loss, "all_right": all_right, "outputs": logits}

    return binary


def metrics(outputs, labels):
    """Mean average precision over the classes that occur."""
    found = []
    for scores, wanted in zip(outputs.T, labels.T, strict=True):
        hits = wanted[scores.argsort(descending=True)]
        if hits.any():
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            found.append((precision * hits).sum() / hits.sum())
    return {"mean_average_precision": torch.stack(found).mean()}


def score(val):
    return val["mean_average_precision"]


def prediction(output, classes, *, top=3):
    probabilities = dict(zip(classes, output.sigmoid().tolist(), strict=True))
    names = [name for name, probability in probabilities.items() if probability > 0.5]
    return ", ".join(names) or "none", {"labels": ";".join(names), **probabilities}
