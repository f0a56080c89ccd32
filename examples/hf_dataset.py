"""An image dataset of Hugging Face (pip install datasets): its name on the Hub, or a folder of `save_to_disk`.

python train.py --recipe examples/hf_dataset.py --data ethz/food101 --model resnet50
"""

import os

import datasets

from trainer.data import Images, Subset, stratified_split, to_rgb
from trainer.data.images import blame

IMAGE, LABEL = "image", "label"  # columns


class Rows(Images):
    def __init__(self, rows):
        self.rows, self.labels, self.classes = rows, list(rows[LABEL]), tuple(rows.features[LABEL].names)

    def __getitem__(self, index):
        with blame(self.name(index)):
            return to_rgb(self.rows[index][IMAGE])

    def name(self, index):
        return f"{self.rows.split}[{index}]"

    def stamp(self):
        return self.rows._fingerprint  # of all its values: kept features are of these images


def images(config, *, seed):
    found = datasets.load_from_disk(config.data) if os.path.isdir(config.data) else datasets.load_dataset(config.data)
    for part in ("validation", "test"):
        if part in found:
            return Rows(found["train"]), Rows(found[part])
    every = Rows(found["train"])
    train, val = stratified_split(every.labels, config.val_fraction, seed=seed)
    return Subset(every, train), Subset(every, val)
