"""Lower rates for earlier layers, another optimizer, another schedule.

python train.py --recipe examples/layer_rates.py --data ~/photos --train head layer4 layer3
"""

import torch


def optimizer(model, config, *, fused):
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = (
                config.lr if name.startswith("fc") else config.lr / 3 if name.startswith("layer4") else config.lr / 10
            )
            groups.setdefault(rate, []).append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
    return torch.optim.NAdam(groups, weight_decay=config.weight_decay, decoupled_weight_decay=True)


def learning_rate(config):
    """Three steps down; each group keeps its ratio to the highest rate."""
    return lambda progress: config.lr * 0.1 ** int(progress * 3)
