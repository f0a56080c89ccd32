"""Restore the model of a checkpoint.

    state = checkpoint.read(Path("runs/birds/checkpoints/best.pt"))
    classifier = load_recipe(None).restore(state)

A checkpoint holds the tensors that training could change. The frozen tensors are loaded again as before training, and
compared with the fingerprint in the checkpoint: a restored model is the trained one, or there is an error.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torchvision import models

from trainer import config as settings
from trainer.config import Config
from trainer.errors import CheckpointError, UsageError
from trainer.model.freezing import Fingerprint, check_fingerprint, fingerprint, freeze, trained_tensors
from trainer.model.weights import base_weights, fetch_weights
from trainer.model.weights_filter import from_stored
from trainer.storage import checkpoint
from trainer.storage.state import State


class Built(Protocol):
    """The part of `classifiers.Classifier` that is used here."""

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
    """Restore the model of a checkpoint: built as before training, frozen as in training, filled with trained tensors.

    A checkpoint may come from a stranger. Nothing is downloaded or read because only the checkpoint names it, except
    for torchvision's own weights, and files on this machine with the sha256 in the checkpoint; see `base_weights`.

    Args:
        state: content of a checkpoint, or of an export with its tensors under "model".
        build: builds the model as before training, from the settings; None if it was a module of the user's own, and
            no recipe that builds it was given.
        weights: where the frozen weights are; None: where they were in training.

    Returns:
        What `build` returned. The model is on the CPU and in train mode except for its frozen modules; the parameters
        that were trained require gradients. Its `base` says where the weights are now.

    Raises:
        CheckpointError: the frozen weights are not those of the training, the tensors do not fit, or the checkpoint
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
    """The settings of the run, with weights that are safe to use."""
    base, config = state["base"], settings.from_dict(state["config"], "the settings in the checkpoint")
    name, kind = config.model.model, base.get("source")
    if kind == "module" or name not in models.list_models(module=models):
        stored = config.weights.weights
        # A recipe may use them in any way, and the checkpoint has no hash to compare them with.
        if weights is None and stored.lower() not in ("default", "none") and not stored.isidentifier():
            raise UsageError(
                f"the checkpoint names weights at {stored!r}; if you trust that, repeat it with --weights."
            )
        return settings.replace(config, weights=weights or stored)
    if weights is None:
        weights, sha256 = base_weights(name, base)
        if sha256 is not None:
            fetch_weights(name, weights, sha256=sha256)  # checks the file before anything parses it
    config = settings.replace(config, seed=base.get("seed", config.run.seed))
    return dataclasses.replace(config, weights=from_stored(base.get("match", {}), weights=weights))


@torch.no_grad()
def fill(model: nn.Module, tensors: dict[str, torch.Tensor], expected: Fingerprint) -> None:
    """Copy the tensors of a checkpoint into a model that is frozen as in training.

    Args:
        model: its `trained_tensors` are replaced.
        tensors: the tensors of the checkpoint.
        expected: the fingerprint in the checkpoint.

    Raises:
        CheckpointError: the frozen tensors differ, or `tensors` are not exactly the `trained_tensors`; names them. The
            model is then unchanged.
    """
    check_fingerprint(fingerprint(model), expected)
    live = trained_tensors(model)
    checkpoint.check_tensors(tensors, live)
    for name, tensor in live.items():
        tensor.copy_(tensors[name])
