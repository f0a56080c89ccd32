"""The optimizer and its parameter groups; the learning rate (cosine, linear or constant) as a function of progress."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from trainer.config import OptimConfig
from trainer.errors import UsageError

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")


def build_optimizer(
    model: nn.Module, config: OptimConfig | None = None, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101) or SGD for the trainable parameters.

    Args:
        model: its parameters with `requires_grad` are optimised.
        config: `optimizer`, `lr` (the peak; the trainer sets the rate of each step), `weight_decay` (for matrices and
            kernels; 0 for biases and norms, which have one dimension) and `momentum` (of SGD; not Nesterov's). AdamW
            uses torch's betas, 0.9 and 0.999. None: the defaults.
        fused: use one kernel for each group. Not possible with a GradScaler, because accelerate would not notice the
            steps that the scaler skips.

    Raises:
        UsageError: unknown optimizer, or nothing to train.
    """
    config = (config or OptimConfig()).settled()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise UsageError("nothing to train: no parameter of the model has requires_grad.")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": float(config.weight_decay)},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=float(config.lr), fused=fused)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=float(config.lr), momentum=config.momentum, fused=fused)
    raise UsageError(f"unknown optimizer {config.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}.")


def schedule(config: OptimConfig) -> Callable[[float], float]:
    """The learning rate of a run as a function of progress, 0 to 1; see `learning_rate`."""
    peak = float(config.settled().lr)
    return partial(learning_rate, peak=peak, schedule=config.schedule, warmup=config.warmup)


def learning_rate(progress: float, peak: float, *, schedule: str = "cosine", warmup: float = 0.0) -> float:
    """The learning rate at a point of the run.

    Args:
        progress: share of the samples of the run that were used so far, 0 to 1.
        peak: the highest rate, reached at the end of the warm-up.
        schedule: after the warm-up, "cosine" (Loshchilov & Hutter, 2017, https://arxiv.org/abs/1608.03983) or
            "linear" to zero at the end of the run, or "constant".
        warmup: share of the run, 0 to 1, during which the rate rises linearly from zero.

    Raises:
        UsageError: another schedule.
    """
    if progress < warmup:
        return peak * progress / warmup
    rest = min((progress - warmup) / (1 - warmup), 1.0) if warmup < 1 else 1.0
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * rest))
    if schedule == "linear":
        return peak * (1 - rest)
    if schedule == "constant":
        return peak
    raise UsageError(f"unknown schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}.")
