"""A model of timm (pip install timm) under a new head; its size and normalisation are its own.

python train.py --recipe examples/timm_vit.py --data ~/photos --model vit_tiny_patch16_224
"""

import timm

from trainer.model import build_model


def model(config, weights, classes, *, image_size, seed):
    net = timm.create_model(config.model, pretrained=weights.weights == "default")
    return build_model(net, len(classes), head=net.pretrained_cfg["classifier"], image_size=image_size, seed=seed)
