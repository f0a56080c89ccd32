"""Many heads trained together on kept features, and what each is worth on samples it has not seen.

All heads read the same batches. A head of a fold does not count the samples of its fold in its loss: its window is the
run's own window without them, its loss the mean over the rest. So it makes as many steps, at the same rates, as the run
will, with slightly smaller windows. A window that lies in its fold as a whole has the gradient zero.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.heads.optimizer import Optimizer
from trainer.heads.stack import Inputs, Stack, bytes_of, stack

_ROWS = 256  # samples at a time in an evaluation


@dataclass(frozen=True)
class HeadSetting:
    """How one head is trained.

    lr: peak rate. weight_decay: of weights, not of biases. label_smoothing: 0 to 1, in training only.
    epochs: length of its run, over which the schedule stretches.
    """

    lr: float
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    epochs: int = 10


@dataclass(frozen=True)
class Course:
    """What all heads share with the run.

    windows: epoch → the samples of each step, in order: `BatchPlan.windows`.
    factor: progress, 0 to 1, → share of the peak rate: `optim.learning_rate` with a peak of 1.
    key: step → seed of its dropout.
    optimizer: "adamw" or "sgd". momentum: of SGD. clip_norm: largest 2-norm of a gradient; None: no clipping.
    """

    windows: Callable[[int], Iterable[Sequence[int]]]
    factor: Callable[[float], float]
    key: Callable[[int], int] = int
    optimizer: str = "adamw"
    momentum: float = 0.9
    clip_norm: float | None = None


@dataclass
class Trained:
    """The heads of one setting, and what they are worth on samples that they have not seen.

    Attributes:
        setting: of the heads.
        tensors: the trained tensors `[K, ...]`, by name.
        count: samples in each fold, `[K]`; empty without folds.
        right: of them, `[K]`. nll: their sums of negative log-likelihoods, `[K]`, in nats.
    """

    setting: HeadSetting
    tensors: dict[str, Tensor]
    count: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Each held-out sample counted once."""
        return sum(self.right) / sum(self.count)

    @property
    def loss(self) -> float:
        """The mean NLL, in nats."""
        return sum(self.nll) / sum(self.count)


def train_heads(
    inputs: Tensor | Inputs,
    labels: Tensor,
    settings: Sequence[HeadSetting],
    *,
    tail: nn.Module,
    course: Course,
    folds: Tensor | None = None,
    memory: float = 2.0,
) -> list[Trained]:
    """Train every setting from the tail's own weights; the tail is not changed.

    Args:
        inputs: features `[views · N, ...]`, or several for a tail that reads several; row `view · N + index`. Epoch e
            reads the view e modulo their number.
        labels: int64 `[N]`, on the features' device.
        settings: of the heads.
        tail: features → logits `[B, C]`; a linear layer or a 1×1 convolution is fastest, see `stack`.
        course: what they share with the run.
        folds: int64 `[N]`, the fold of each sample, 0 to K − 1: K heads a setting, each evaluated on its fold, in the
            first view. None: one head a setting, trained on all samples, and no evaluation.
        memory: GiB that heads which are trained together may take.

    Returns:
        The heads of each setting, in their order.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    count = 1 if folds is None else int(folds.max()) + 1
    found: dict[int, Trained] = {}
    sample = tuple(tensor[: max(len(window) for window in course.windows(0))] for tensor in inputs)
    most = max(int(memory * 2**30 / (bytes_of(tail, sample) * count)), 1)
    devices = [labels.device] if labels.device.type == "cuda" else []
    for epochs in sorted({setting.epochs for setting in settings}):
        places = [place for place, setting in enumerate(settings) if setting.epochs == epochs]
        for first in range(0, len(places), most):
            group = places[first : first + most]
            with torch.random.fork_rng(devices), torch.no_grad():
                trained = _train(inputs, labels, [settings[place] for place in group], tail, course, folds)
            found |= zip(group, trained, strict=True)
    return [found[place] for place in range(len(settings))]


def fold_of(labels: Tensor, folds: int, *, seed: int) -> Tensor:
    """The fold of each sample, int64 `[N]`: each class is dealt to all folds in turn, in an order from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]  # by class
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order)) % min(folds, len(order))
    return found.to(labels.device)


def default_settings(
    inputs: Tensor,
    *,
    optimizer: str = "adamw",
    epochs: Sequence[int] = (10,),
    lrs: int = 8,
    weight_decays: int = 2,
    label_smoothing: float = 0.0,
) -> list[HeadSetting]:
    """A log-spaced grid around what suits the scale of the features `[N, D, ...]`.

    A step of AdamW moves a weight by the rate, whatever the gradient, and so a logit by up to the rate times the sum of
    the features' magnitudes: rates go from 0.3 to 100 over it, but not above 1; decays from 0.01 to 1. The step of
    SGD and its decay follow the gradient: rates are shares, from 1e-3 to 10, of one over the mean squared norm, decays,
    from 1e-6 to 1e-2, shares of that norm. Pairs whose product is 1 or more are omitted: a step would turn weights
    round.
    """
    size = inputs.shape[1]
    if optimizer == "sgd":
        squares = float(inputs.double().square().mean() * size) or 1.0
        rates, decays = torch.logspace(-3, 1, lrs) / squares, torch.logspace(-6, -2, weight_decays) * squares
    else:
        scale = max(float(inputs.abs().mean(dtype=torch.float64) * size), 100.0)
        rates, decays = torch.logspace(math.log10(0.3), 2, lrs) / scale, torch.logspace(-2, 0, weight_decays)
    rounded = [[float(f"{value:.3g}") for value in values.tolist()] for values in (rates, decays)]
    pairs = [(lr, decay) for lr, decay in product(*rounded) if lr * decay < 1]
    return [HeadSetting(*pair, label_smoothing, length) for length in epochs for pair in pairs]


def _train(
    inputs: Inputs,
    labels: Tensor,
    settings: Sequence[HeadSetting],
    tail: nn.Module,
    course: Course,
    folds: Tensor | None,
) -> list[Trained]:
    """Heads of one length. Head `s · K + k` has setting s, and leaves out fold k."""
    samples, device, epochs = len(labels), labels.device, settings[0].epochs
    views = len(inputs[0]) // samples
    counts = torch.ones(samples, 1, device=device)  # [N, K], 1 where the sample counts
    if folds is not None:
        counts = 1 - F.one_hot(folds).float()
    number = counts.shape[1]

    def each(name: str) -> Tensor:  # [H]
        values = torch.tensor([getattr(setting, name) for setting in settings], dtype=torch.float32, device=device)
        return values.repeat_interleave(number)

    rates = each("lr")
    heads = stack(tail, rates, tuple(tensor[:1] for tensor in inputs))
    options = {"momentum": course.momentum, "clip_norm": course.clip_norm}
    optimizer = Optimizer(heads.tensors, course.optimizer, lr=rates, weight_decay=each("weight_decay"), **options)
    smoothing = each("label_smoothing")
    done = step = 0
    for epoch in range(epochs):
        windows = [list(window) for window in course.windows(epoch)]
        order = torch.tensor([*chain.from_iterable(windows)], device=device)
        for index in order.split([len(window) for window in windows]):
            if heads.random:
                torch.manual_seed(course.key(step))
            logits = heads.train(tuple(t.index_select(0, index + epoch % views * samples) for t in inputs))  # [B, H, C]
            weights = counts.index_select(0, index)  # [B, K]
            weights /= weights.sum(dim=0).clamp(min=1)
            gradient = _gradient(logits, labels.index_select(0, index), smoothing, weights)
            optimizer.step(heads.backward(gradient), course.factor((done + len(index) / 2) / (epochs * samples)))
            done, step = done + len(index), step + 1
    found = []
    for place, setting in enumerate(settings):
        part = slice(place * number, (place + 1) * number)
        found.append(Trained(setting, {name: tensor[part] * setting.lr for name, tensor in heads.tensors.items()}))
    for fold in range(number if folds is not None else 0):
        rows = (folds == fold).nonzero()[:, 0]
        right, nll = _evaluate(heads, inputs, labels, rows, slice(fold, None, number))
        for trained, own_right, own_nll in zip(found, right, nll, strict=True):
            trained.count.append(len(rows))
            trained.right.append(own_right)
            trained.nll.append(own_nll)
    return found


def _gradient(logits: Tensor, labels: Tensor, smoothing: Tensor, weights: Tensor) -> Tensor:
    """That of the heads' weighted cross-entropies: logits `[B, H, C]`, smoothing `[H]`, weights `[B, K]`."""
    batch, _, classes = logits.shape
    # Heads last: on a CPU a softmax over the last of few values takes 12 times as long as over a dimension before it.
    gradient = logits.transpose(1, 2).contiguous().softmax(dim=1).sub_(smoothing / classes)  # [B, C, H]
    gradient[torch.arange(batch, device=labels.device), labels] -= 1 - smoothing
    gradient.view(batch, classes, -1, weights.shape[1]).mul_(weights[:, None, None])
    return gradient.transpose(1, 2).contiguous()


def _evaluate(heads: Stack, inputs: Inputs, labels: Tensor, rows: Tensor, part: slice) -> tuple[list[int], list[float]]:
    """How many of these rows a part of the heads gets right, and the sum of their NLL, for each head."""
    right, losses = [], []
    for index in rows.split(_ROWS):
        logits = heads.logits(tuple(tensor.index_select(0, index) for tensor in inputs), heads=part)  # [B, H, C]
        truth = labels.index_select(0, index)[:, None].expand(logits.shape[:2])  # [B, H]
        right.append((logits.argmax(dim=2) == truth).sum(dim=0))
        losses.append(F.cross_entropy(logits.movedim(2, 1), truth, reduction="none").double().sum(dim=0))
    return torch.stack(right).sum(dim=0).tolist(), torch.stack(losses).sum(dim=0).tolist()
