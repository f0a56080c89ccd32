"""Images that are tensors in memory."""

from trainer.data.images import Images


class Tensors(Images):
    def __init__(self, images, labels, classes=()):
        self.images, self.labels, self.classes = images, labels, classes

    def __getitem__(self, index):
        return self.images[index]
