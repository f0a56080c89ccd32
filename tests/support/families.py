"""Small models of every family of torchvision."""

import torch
from torch import nn
from torchvision import models

FAMILIES = {
    "alexnet": ("classifier.6", "classifier.6"),  # the last dropout comes before a frozen layer
    "convnext_tiny": ("classifier.2", "classifier.2"),
    "densenet121": ("classifier", "classifier"),
    "efficientnet_b0": ("classifier.1", "classifier"),
    "googlenet": ("fc", "dropout"),
    "inception_v3": ("fc", "dropout"),
    "mnasnet0_5": ("classifier.1", "classifier"),
    "mobilenet_v2": ("classifier.1", "classifier"),
    "mobilenet_v3_small": ("classifier.3", "classifier.2"),
    "regnet_y_400mf": ("fc", "fc"),
    "resnet18": ("fc", "fc"),
    "resnext50_32x4d": ("fc", "fc"),
    "shufflenet_v2_x0_5": ("fc", "fc"),
    "squeezenet1_1": ("classifier.1", "classifier"),
    "swin_t": ("head", "head"),
    "vgg11_bn": ("classifier.6", "classifier.5"),
    "vit_b_32": ("heads.head", "heads"),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, num_classes=5, **options)
        if options:
            model.aux_logits = False
        side = {"vit_b_32": 224, "maxvit_t": 224, "inception_v3": 80}.get(name, 64)
        for module in model.modules():  # statistics that do something
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        return model, torch.randn(2, 3, side, side)
