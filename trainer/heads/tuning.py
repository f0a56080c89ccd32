"""`--lr auto`: the learning rate, weight decay and number of epochs that a run leaves open, found on its kept features.

Whether a search makes sense is asked of the run itself, so that a changed recipe is never searched for by wrong rules:
the loss of its step has to be the cross-entropy, and its optimizer and schedule those that the search knows.
"""

import json
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config import Config, OptimConfig, to_dict
from trainer.data.sampling import kept_randomness, random_key
from trainer.errors import UsageError
from trainer.heads.grid import Course
from trainer.heads.search import Choice, grid_for, search_head
from trainer.heads.stack import stack
from trainer.processes.together import gather, on_main, print_main
from trainer.run.folder import Run
from trainer.storage import files
from trainer.trainer import Trainer
from trainer.trunk.features import CachedFeatures, Source

OPEN = ("lr", "weight_decay", "epochs")


def tune(loop: Trainer, train: Source, config: Config, run: Run) -> None:
    """Give the trainer the settings that are "auto", before its first step (a collective).

    They are found by a search if `--lr` is "auto" and nothing speaks against one; otherwise they have fixed values.
    Then they are as if they had been given: in the run's `config.yaml` and in its checkpoints, so that a resumed run
    does not search. The same features lead to the same choice: a run that was killed in a search repeats it.

    Args:
        loop: at its start; with all settings in its `about`.
        train: features of the training set.
        config: of the run.
        run: its folder gets `search.json`: the choice, and what every head of the search was worth.
    """
    optim = config.optim
    if loop.step or not any(getattr(optim, name) == "auto" for name in OPEN):
        return
    if optim.lr == "auto":
        if reason := obstacle(loop, train, optim):
            print_main(f"lr      {optim.settled().lr:g}, not searched for: {reason}")
        else:
            choice = search(loop, train, optim)
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


def obstacle(loop: Trainer, train: Source, optim: OptimConfig) -> str:
    """Why there can be no search for this run; empty if there can be one."""
    tail = loop.accelerator.unwrap_model(loop.tail)
    if not isinstance(train, CachedFeatures):
        return "the features of the training images are not kept"
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
    try:
        stack(tail, 1, tuple(tensor[:1] for tensor in train.inputs))
    except UsageError as error:
        return str(error)
    return ""


def search(loop: Trainer, train: CachedFeatures, optim: OptimConfig) -> Choice:
    """Compare heads on folds of the training set; the grid is dealt out to all processes (a collective)."""
    accelerator, settled = loop.accelerator, optim.settled()
    course = Course(
        windows=lambda epoch: loop.plan.windows(seed=loop.seed, epoch=epoch),
        factor=loop.recipe.learning_rate(replace(settled, lr=1.0)),
        key=lambda step: random_key(loop.seed, "step", step, 0),
        optimizer=optim.optimizer,
        momentum=optim.momentum,
        clip_norm=optim.clip_norm,
    )
    inputs, tail = tuple(tensor.float() for tensor in train.inputs), accelerator.unwrap_model(loop.tail)
    maps = inputs[0].ndim > 2
    lengths = [optim.epochs] if optim.epochs != "auto" else [30] if maps else [10, 30, 100]
    settings = grid_for(
        inputs, tail, course, epochs=lengths, label_smoothing=optim.label_smoothing, standardised=[False]
    )
    if optim.weight_decay != "auto":
        settings = [*dict.fromkeys(replace(setting, weight_decay=optim.weight_decay) for setting in settings)]
    with kept_randomness():
        return search_head(
            inputs,
            train.labels,
            tail,
            course,
            classes=len(loop.about["classes"]),
            settings=settings,
            folds=3 if maps else 5,
            dropout=not maps,
            seed=loop.seed,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            merge=lambda rows: gather(accelerator, rows),
        )


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
