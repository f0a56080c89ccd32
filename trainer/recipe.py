"""The recipe: what a project changes. Edit a function here, and train.py and every command follow.

Or leave this file alone, and write only the functions that differ into a file of your own:

    python train.py --recipe my_recipe.py ...
    python -m trainer evaluate --recipe my_recipe.py --run runs/...

examples/ has complete ones: multi-label, regression, image pairs, timm and more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import DataConfig, ModelConfig, OptimConfig, WeightsConfig
from trainer.data.images import Images
from trainer.data.open import load_data
from trainer.data.transforms import InputSpec
from trainer.evaluation import Metrics
from trainer.model.classifiers import Classifier, build_model
from trainer.optim import build_optimizer, schedule
from trainer.steps import Step, classification


def images(config: DataConfig, *, seed: int) -> tuple[Images, Images]:
    """The training and the validation images."""
    return load_data(config.data, val_fraction=config.val_fraction, seed=seed, root=config.data_root)


def transforms(config: DataConfig, spec: InputSpec) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What is done to an image before the model sees it, in training and in evaluation: [C, H, W] → [C, S, S].

    Random numbers may come from `random`, numpy and torch: they are seeded for each image and epoch.
    """
    return spec.train_transform(config.augment), spec.eval_transform()


def model(
    config: ModelConfig, weights: WeightsConfig, classes: Sequence[str], *, image_size: int | None, seed: int
) -> Classifier:
    """The model, under a new head. Of your own: `build_model(MyNet(), len(classes), head="fc")`.

    Random values are the same each time: torch is seeded before this is called.
    """
    return build_model(config.model, len(classes), weights=weights, image_size=image_size, seed=seed)


def step(config: OptimConfig) -> Step:
    """The loss, and metrics of each sample; see `trainer.steps`."""
    return classification(label_smoothing=config.label_smoothing)


metrics: Metrics | None = None
"""Metrics that need all outputs at once: a function (outputs [N, ...], labels [N, ...]) → values by name."""


def score(val: dict[str, float]) -> float:
    """How good an epoch is, from its validation metrics: the one with the highest score is the best."""
    return val["accuracy"]


def optimizer(model: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer, over the parameters that train. Its groups keep the ratios of their learning rates."""
    return build_optimizer(model, config, fused=fused)


def learning_rate(config: OptimConfig) -> Callable[[float], float]:
    """The learning rate as a function of progress, 0 to 1; of the group with the highest one."""
    return schedule(config)


def prediction(output: Tensor, classes: Sequence[str], *, top: int = 3) -> tuple[str, dict[str, Any]]:
    """What is said of an image with these outputs of the model: a text, and values by name for tables."""
    probabilities = output.softmax(dim=0)  # [C]
    order = probabilities.argsort(descending=True).tolist()
    text = "  ".join(f"{classes[index]} {probabilities[index]:.1%}" for index in order[:top])
    best = {"class": classes[order[0]], "probability": probabilities[order[0]].item()}
    return text, {**best, **dict(zip(classes, probabilities.tolist(), strict=True))}
