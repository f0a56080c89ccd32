"""The model, the trainer and the optimizer must train one set of parameters."""

import pytest
import torch
from torch import nn

from trainer.checks import check_trainable
from trainer.errors import UsageError
from trainer.model.freezing import freeze


def _sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_one_set_of_parameters_trains(tiny):
    freeze(tiny, ["fc"])
    trainable = {name: value for name, value in tiny.named_parameters() if value.requires_grad}
    optimizer = _sgd(trainable.values())
    check_trainable(tiny, trainable, optimizer)
    tiny.block[0].weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"requires_grad of block\.0\.weight was changed"):
        check_trainable(tiny, trainable, optimizer)
    tiny.block[0].weight.requires_grad_(False)
    tiny.fc.bias.requires_grad_(False)
    with pytest.raises(UsageError, match=r"requires_grad of fc\.bias was changed .*call freeze\(\)"):
        check_trainable(tiny, trainable, optimizer)


def test_the_optimizer_holds_what_trains(tiny):
    freeze(tiny, ["fc"])
    trainable = {"fc.weight": tiny.fc.weight, "fc.bias": tiny.fc.bias}
    for parameters, says in (
        (tiny.parameters(), "has parameters that do not train: build it after freeze"),
        ([tiny.fc.weight], r"does not have fc\.bias, which should train"),
        ([tiny.fc.weight, tiny.fc.bias, nn.Parameter(torch.ones(1))], "has parameters that do not train"),
    ):
        with pytest.raises(UsageError, match=says):
            check_trainable(tiny, trainable, _sgd(parameters))
    schedule = torch.optim.lr_scheduler.ConstantLR(_sgd(trainable.values()))
    with pytest.raises(UsageError, match="returned ConstantLR; expected an optimizer"):
        check_trainable(tiny, trainable, schedule)
