"""Metric learning: an embedding of length 1, trained so that each image is near the proxy of its class.

python train.py --recipe examples/embedding.py --data ~/photos --augment none

The loss is CosFace (Wang et al., 2018, https://arxiv.org/abs/1801.09414): a softmax over cosines, from which the true
class must stand out by a margin. The model returns the embedding and the cosines side by side, [B, SIZE + C].
"""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.model import build_model

SIZE, SCALE, MARGIN = 64, 16.0, 0.2


class Embedder(nn.Module):
    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.proxies = encoder, nn.Linear(SIZE, classes, bias=False)

    def forward(self, images):
        embedding = F.normalize(self.encoder(images))  # [B, SIZE]
        return torch.cat([embedding, F.linear(embedding, F.normalize(self.proxies.weight))], dim=1)


def model(config, weights, classes, *, image_size, seed):
    encoder = build_model(config.model, SIZE, weights=weights, image_size=image_size, seed=seed)
    net = Embedder(encoder.model, len(classes))
    built = build_model(net, len(classes), head="proxies", input=encoder.input)
    built.head += tuple(f"encoder.{name}" for name in encoder.head)  # both are new: --train head trains both
    return built


def step(config):
    def cosface(model, batch):
        outputs, label = model(*batch["inputs"]).float(), batch["label"]
        cosines = outputs[:, SIZE:]  # [B, C]
        logits = SCALE * (cosines - MARGIN * F.one_hot(label, cosines.shape[1]) * model.training)
        right = cosines.argmax(dim=1) == label
        return {"loss": F.cross_entropy(logits, label, reduction="none"), "accuracy": right, "outputs": outputs}

    return cosface


def metrics(outputs, labels):
    """Recall@1: the share of images whose nearest other image is of their class."""
    embeddings, hits = outputs[:, :SIZE], []
    for rows in torch.arange(len(labels)).split(1024):
        near = embeddings[rows] @ embeddings.T  # [1024, N]
        near[torch.arange(len(rows)), rows] = -2.0  # not itself
        hits.append(labels[near.argmax(dim=1)] == labels[rows])
    return {"recall_at_1": torch.cat(hits).float().mean()}


def score(val):
    return val["recall_at_1"]


def prediction(output, classes, *, top=3):
    cosines = {classes[at]: output[SIZE + at].item() for at in output[SIZE:].argsort(descending=True).tolist()[:top]}
    best = next(iter(cosines))
    text = "  ".join(f"{name} {cosine:.2f}" for name, cosine in cosines.items())
    return text, {"class": best, "cosine": cosines[best]}
