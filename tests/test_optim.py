import pytest
import torch

from trainer.config import OptimConfig
from trainer.errors import UsageError
from trainer.model.freezing import freeze
from trainer.optim import build_optimizer, learning_rate


def test_only_what_trains_is_optimised_and_only_weights_decay(tiny):
    freeze(tiny, ["block", "fc"])
    decayed, plain = build_optimizer(tiny, OptimConfig(lr=0.1, weight_decay=0.2)).param_groups
    assert [id(p) for p in decayed["params"]] == [id(tiny.block[0].weight), id(tiny.fc.weight)]
    norm = tiny.block[1]
    assert [id(p) for p in plain["params"]] == [
        id(p) for p in (tiny.block[0].bias, norm.weight, norm.bias, tiny.fc.bias)
    ]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)


def test_kinds(tiny):
    assert isinstance(build_optimizer(tiny), torch.optim.AdamW)
    assert build_optimizer(tiny, OptimConfig(optimizer="sgd", momentum=0.8)).param_groups[0]["momentum"] == 0.8
    with pytest.raises(UsageError, match="expected one of adamw, sgd"):
        build_optimizer(tiny, OptimConfig(optimizer="adam"))
    with pytest.raises(UsageError, match="nothing to train"):
        build_optimizer(tiny.requires_grad_(False))


def test_learning_rate_by_hand():
    at = [learning_rate(p, 2.0, schedule="linear", warmup=0.2) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert at == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])
    at = [learning_rate(p, 2.0, schedule="cosine", warmup=0.0) for p in (0.0, 1 / 3, 0.5, 1.0, 1.1)]
    assert at == pytest.approx([2.0, 1.5, 1.0, 0.0, 0.0])
    assert [learning_rate(p, 2.0, schedule="constant", warmup=1.0) for p in (0.5, 1.0)] == [1.0, 2.0]
    with pytest.raises(UsageError, match="cosine, linear, constant"):
        learning_rate(0.5, 1.0, schedule="step")
