"""The way back from a checkpoint to a model. There is only this one.

    state = checkpoint.read(Path("runs/birds/checkpoints/best.pt"))
    classifier = recipe.restore(state)

A checkpoint holds the tensors that training could change. The frozen rest is built again, as before training, and
compared with the fingerprint in the checkpoint; so a restored model is the trained one, or there is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torchvision import models

from trainer import config as settings
from trainer.config import Config
from trainer.errors import CheckpointError, UsageError
from trainer.model.freezing import Fingerprint, check_fingerprint, fingerprint, freeze, trained_tensors
from trainer.model.weights import WeightsFilter, base_weights, fetch_weights
from trainer.storage import checkpoint
from trainer.storage.state import State


class Built(Protocol):
    """A model as `classifiers.Classifier` has it: with the names of its head, and where its weights are from."""

    model: nn.Module
    head: tuple[str, ...]
    base: dict[str, Any]


B = TypeVar("B", bound=Built)

NO_BASE = "base not at hand: give --recipe FILE, as in training (it was trained from a module of your own)"


def restore(
    state: State | Mapping[str, Any],
    *,
    build: Callable[[Config], B] | None,
    weights: str | None = None,
) -> B:
    """Restore the whole model of a checkpoint: built as before training, frozen as in training, then filled.

    Nothing is downloaded or read that only the checkpoint names: it may come from a stranger. Exceptions are
    torchvision's own weights, and files on this machine with the sha256 in the checkpoint; see `base_weights`.

    Args:
        state: content of a checkpoint, or of an export with its tensors under "model".
        build: settings → the model as before training; None if it was a module of the user's own and no recipe that
            builds it was given.
        weights: where the frozen weights are; None: where they were in training.

    Returns:
        The model on the CPU, in train mode but for its frozen modules, with gradients where it trained. Its `base` says
        where the weights are now.

    Raises:
        CheckpointError: the frozen weights are not those of the training, or the tensors do not fit, or the checkpoint
            does not describe a model.
        DataError: the frozen weights are not there, or are another file.
        UsageError: the user has to name the weights or the recipe.
    """
    if build is None:
        raise UsageError(NO_BASE)
    try:
        config, rules = _settings(state, weights), list(state["freeze_plan"]["train"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint does not say how its model is built: {error!r}") from error
    classifier = build(config)
    freeze(classifier.model, rules, head=classifier.head)
    fill(classifier.model, state["model"], state["fingerprint"])
    return classifier


def _settings(state: State | Mapping[str, Any], weights: str | None) -> Config:
    """The settings of the run, with the weights that may be used."""
    base, config = state["base"], settings.from_dict(state["config"], "the settings in the checkpoint")
    name, kind = config.model.model, base.get("source")
    if kind == "module" or name not in models.list_models(module=models):
        stored = config.weights.weights
        # The recipe decides what it does with them, and no hash tells what they were.
        if weights is None and stored.lower() not in ("default", "none") and not stored.isidentifier():
            raise UsageError(
                f"the checkpoint names weights at {stored!r}; if you trust that, repeat it with --weights."
            )
        return settings.replace(config, weights=weights or stored)
    found = base_weights(name, base, weights=weights)
    if found.sha256 is not None:  # checked before anything parses the file
        fetch_weights(name, found.weights, sha256=found.sha256)
    match = asdict(WeightsFilter.from_dict(base.get("match", {})))
    return settings.replace(config, weights=found.weights, seed=base.get("seed", config.run.seed), **match)


@torch.no_grad()
def fill(model: nn.Module, tensors: dict[str, torch.Tensor], expected: Fingerprint) -> None:
    """Copy the tensors of a checkpoint into a model that is frozen as in training.

    Args:
        tensors: of the checkpoint; the model's own are then equal to them, bit for bit.
        expected: fingerprint of the frozen tensors in training.

    Raises:
        CheckpointError: the frozen tensors differ, or `tensors` are not exactly those that train; names them. The model
            is then unchanged.
    """
    check_fingerprint(fingerprint(model), expected)
    live = trained_tensors(model)
    checkpoint.check_tensors(tensors, live)
    for name, tensor in live.items():
        tensor.copy_(tensors[name])
