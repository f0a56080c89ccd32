"""A network of your own, and images listed in a CSV file with the columns file and class.

python train.py --recipe examples/own_net.py --data photos/labels.csv --train all --image-size 64
"""

import csv
from pathlib import Path

from torch import nn

from trainer.data import FileImages, InputSpec, Subset, stratified_split
from trainer.model import build_model


def images(config, *, seed):
    table = Path(config.data)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    classes = sorted({row["class"] for row in rows})
    labels = [classes.index(row["class"]) for row in rows]
    every = FileImages([table.parent / row["file"] for row in rows], labels, classes)
    train, val = stratified_split(labels, config.val_fraction, seed=seed)
    return Subset(every, train), Subset(every, val)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.fc = nn.Linear(32, 2)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


def model(config, weights, classes, *, image_size, seed):
    spec = InputSpec.square(image_size or 64, mean=(0.5,) * 3, std=(0.25,) * 3)
    return build_model(Net(), len(classes), head="fc", input=spec, seed=seed)
