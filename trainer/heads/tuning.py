"""`--lr auto`: the learning rate, weight decay and number of epochs that a run leaves open, found on its kept features.

Whether a search makes sense is asked of the run itself, so that a changed recipe is never searched for by wrong rules:
the loss of its step has to be the cross-entropy, and its optimizer and schedule those that the search knows.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import Config, OptimConfig, to_dict
from trainer.data.sampling import kept_randomness, random_key
from trainer.heads import stack
from trainer.heads.grid import Course, default_settings
from trainer.heads.search import Choice, search_head
from trainer.heads.stack import Inputs
from trainer.processes.together import gather, on_main, print_main
from trainer.run.folder import Run
from trainer.storage import files
from trainer.trainer import Trainer
from trainer.trunk.features import CachedFeatures, Source

OPEN = ("lr", "weight_decay", "epochs")


class _Grid(NamedTuple):
    """Lengths of run to compare, numbers of rates and of weight decays, and folds."""

    epochs: list[int]
    rates: int
    decays: int
    folds: int


# The first that is not too much work is taken. Work is counted in operations, not in seconds: a run that starts again
# must come to the same grid.
_GRIDS = (
    _Grid([10, 40], 8, 2, 5),
    _Grid([10, 40], 8, 1, 5),
    _Grid([40], 8, 1, 5),
    _Grid([10], 8, 1, 5),
    _Grid([10], 6, 1, 3),
)
_MOST_WORK = defaultdict(lambda: 1e14, cpu=1.5e12)


def tune(loop: Trainer, train: Source, config: Config, run: Run, *, between: Callable[[], Any] = lambda: None) -> None:
    """Give the trainer the settings that are "auto", before its first step (a collective).

    They are found by a search if `--lr` is "auto" and nothing speaks against one; otherwise they have fixed values.
    Then they are as if they had been given: in the run's `config.yaml` and in its checkpoints, so that a resumed run
    does not search. The same features lead to the same choice: a run that was killed in a search repeats it.

    Args:
        loop: at its start; with all settings in its `about`.
        train: features of the training set.
        config: of the run.
        run: its folder gets `search.json`: the choice, and what every head of the search was worth.
        between: called now and then in a search on one process. Several train different heads, and do not meet.
    """
    optim = config.optim
    if loop.step or not any(getattr(optim, name) == "auto" for name in OPEN):
        return
    if optim.lr == "auto":
        choice, reason = None, "the features of the training images are not kept"
        if isinstance(train, CachedFeatures) and not (reason := obstacle(loop, train, optim)):
            choice = search(loop, train, optim, between)
        if choice is None:
            print_main(f"lr      {optim.settled().lr:g}, not searched for: {reason or 'that would take long'}")
        else:
            found = {name: getattr(choice.setting, name) for name in OPEN if getattr(optim, name) == "auto"}
            optim = replace(optim, **found)
            text = json.dumps({"chosen": found, **choice.to_dict()}, indent=1)
            on_main(loop.accelerator, files.replace, run.path / "search.json", text.encode())
            print_main(f"search  {choice}")
    config = replace(config, optim=optim.settled())
    loop.configure(config.optim)
    for group in loop.optimizer.param_groups:
        group["weight_decay"] = config.optim.weight_decay if group["weight_decay"] else 0.0
    loop.about["config"] = to_dict(config)
    on_main(loop.accelerator, run.write_config, loop.about["config"])


def obstacle(loop: Trainer, train: CachedFeatures, optim: OptimConfig) -> str:
    """Why there can be no search for this run; empty if there can be one."""
    tail = loop.accelerator.unwrap_model(loop.tail)
    if train.labels.is_floating_point() or train.labels.ndim != 1:
        return "the labels are no classes"
    if loop.accelerator.scaler is not None:
        return "in fp16 heads are not compared"
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optim.optimizer]
    if not isinstance(loop.optimizer.optimizer, kind) or any("schedule" in g for g in loop.optimizer.param_groups):
        return "the recipe has an optimizer of its own"
    if len({group["lr"] for group in loop.optimizer.param_groups}) > 1:
        return "the recipe's groups have rates of their own"
    rates = [loop.recipe.learning_rate(replace(optim.settled(), lr=lr))(0.5) for lr in (1.0, 2.0)]
    if abs(rates[1] - 2 * rates[0]) > 1e-6:
        return "the recipe's learning rate does not depend on --lr"
    if not _is_cross_entropy(loop, tail, train):
        return "the recipe has a loss of its own"
    reason = stack.obstacle(tail)
    return f"the heads cannot be compared: {reason}." if reason else ""


def search(loop: Trainer, train: CachedFeatures, optim: OptimConfig, between: Callable[[], Any]) -> Choice | None:
    """Compare heads on folds of the training set; the grid is dealt out to all processes (a collective).

    Returns:
        The choice; None if even the smallest grid would take too long.
    """
    accelerator, settled = loop.accelerator, optim.settled()
    inputs, tail = tuple(tensor.float() for tensor in train.inputs), accelerator.unwrap_model(loop.tail)

    def windows(epoch: int) -> Iterator[list[int]]:
        if accelerator.num_processes == 1:
            between()
        return loop.plan.windows(seed=loop.seed, epoch=epoch)

    course = Course(
        windows=windows,
        factor=loop.recipe.learning_rate(replace(settled, lr=1.0)),
        key=lambda step: random_key(loop.seed, "step", step, 0),
        optimizer=optim.optimizer,
        momentum=optim.momentum,
        clip_norm=optim.clip_norm,
    )
    each = 6 * macs(tail, inputs) * len(train)  # operations of one head in one epoch, backward included
    for grid in _GRIDS:
        settings = default_settings(
            inputs[0],
            optimizer=optim.optimizer,
            epochs=grid.epochs if optim.epochs == "auto" else [optim.epochs],
            lrs=grid.rates,
            weight_decays=grid.decays,
            label_smoothing=optim.label_smoothing,
        )
        if optim.weight_decay != "auto":
            settings = [*dict.fromkeys(replace(setting, weight_decay=optim.weight_decay) for setting in settings)]
        if each * grid.folds * sum(setting.epochs for setting in settings) <= _MOST_WORK[accelerator.device.type]:
            break
    else:
        return None
    with kept_randomness():
        return search_head(
            inputs,
            train.labels,
            tail,
            course,
            classes=len(loop.about["classes"]),
            settings=settings,
            folds=grid.folds,
            dropout=inputs[0].ndim < 3,  # of maps, its random numbers cost more than the heads
            seed=loop.seed,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            merge=lambda rows: gather(accelerator, rows),
        )


def macs(tail: nn.Module, inputs: Inputs) -> int:
    """Multiplications of one forward of one sample."""
    with FlopCounterMode(display=False) as counter, kept_randomness(), torch.no_grad():
        tail(*(tensor[:2] for tensor in inputs))  # two: a BatchNorm that trains refuses one
    return counter.get_total_flops() // 4


def _is_cross_entropy(loop: Trainer, tail: nn.Module, train: CachedFeatures) -> bool:
    """Whether the run's loss is the cross-entropy of its logits, tried on a few images."""
    batch = next(train.batches([[0, len(train) // 2, len(train) - 1]], epoch=0))
    with kept_randomness(), torch.no_grad():
        tail.eval()
        values = loop.step_function(tail, batch)
        logits = tail(*batch["inputs"]).float()
        if logits.ndim != 2 or logits.shape[1] != len(loop.about["classes"]):
            return False
        expected = F.cross_entropy(logits, train.labels[batch["index"].to(train.labels.device)], reduction="none")
        return torch.allclose(values["loss"].float(), expected, rtol=1e-3, atol=1e-4)
