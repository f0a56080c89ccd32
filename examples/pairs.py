"""Do two images show the same thing? A CSV file with the columns first, second and same (0 or 1).

Both images of a pair are one tensor [2, 3, H, W], so that they get the same crop; the frozen encoder sees each of them
once, and its features are kept. The images of a pair are resized to one size.

python train.py --recipe examples/pairs.py --data photos/pairs.csv --augment none
"""

import csv
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms import v2

from trainer.data import FileImages, Subset, decode, stratified_split
from trainer.model import build_model


class Pairs(FileImages):
    def __init__(self, files, others, labels):
        super().__init__(files, labels, ("different", "same"))
        self.others = others

    def __getitem__(self, index):
        pair = (decode(self.files[index]), decode(self.others[index]))
        return torch.stack([v2.functional.resize(image, [256, 256], antialias=True) for image in pair])


def images(config, *, seed):
    table = Path(config.data)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    files, others = ([table.parent / row[column] for row in rows] for column in ("first", "second"))
    labels = [int(row["same"]) for row in rows]
    train, val = stratified_split(labels, config.val_fraction, seed=seed)
    every = Pairs(files, others, labels)
    return Subset(every, train), Subset(every, val)


class Siamese(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.fc = encoder, nn.Linear(1000, 2)

    def forward(self, pairs):  # [B, 2, 3, S, S]
        features = self.encoder(pairs.flatten(0, 1)).unflatten(0, (-1, 2))  # [B, 2, F]
        return self.fc((features[:, 0] - features[:, 1]).abs())


def model(config, weights, classes, *, image_size, seed):
    encoder = build_model(config.model, 1000, weights=weights, image_size=image_size, seed=seed)
    return build_model(Siamese(encoder.model), len(classes), head="fc", input=encoder.input, seed=seed)
