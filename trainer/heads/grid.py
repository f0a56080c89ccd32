"""Many heads trained together on kept features, and what each is worth on samples it has not seen.

All heads read the same batches. A head of a fold does not count the samples of its fold in its loss: its window is the
run's own window without them, its loss the mean over the rest. So it makes as many steps, at the same rates, as the run
will, with slightly smaller windows. A window that lies in its fold as a whole has the gradient zero.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.heads.optimizer import Optimizer
from trainer.heads.stack import Inputs, Stack, bytes_of, stack

_ROWS = 256  # samples at a time in an evaluation
_Held = tuple[Inputs, Tensor, Tensor, slice]  # features, labels, the rows of both that count, the heads they are for


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
class Curve:
    """One setting, over its epochs, on samples that its heads have not seen.

    Attributes:
        setting: of the heads.
        count: samples in each fold, `[K]`; one fold if there is a validation set instead.
        right: of them, by epoch (counted from 1): `[K]`. nll: their sum of negative log-likelihoods, by epoch: `[K]`.
        tensors: the trained tensors `[K, ...]`, by name.
    """

    setting: HeadSetting
    count: list[int]
    right: dict[int, list[int]] = field(default_factory=dict)
    nll: dict[int, list[float]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def accuracy(self, epoch: int | None = None) -> float:
        """Each held-out sample counted once; after the last epoch, or the one that is named."""
        return sum(self.right[epoch or self.setting.epochs]) / sum(self.count)

    def loss(self, epoch: int | None = None) -> float:
        """The mean NLL, in nats."""
        return sum(self.nll[epoch or self.setting.epochs]) / sum(self.count)


def train_heads(
    inputs: Tensor | Inputs,
    labels: Tensor,
    settings: Sequence[HeadSetting],
    *,
    tail: nn.Module,
    course: Course,
    folds: Tensor | None = None,
    val: tuple[Tensor | Inputs, Tensor] | None = None,
    every: int | None = 1,
    memory: float = 1.0,
) -> list[Curve]:
    """Train every setting from the tail's own weights; the tail is not changed.

    Args:
        inputs: features `[views · N, ...]`, or several for a tail that reads several; row `view · N + index`. Epoch e
            reads the view e modulo their number.
        labels: int64 `[N]`, on the features' device.
        settings: of the heads.
        tail: features → logits `[B, C]`; a linear layer (with dropout) is fastest, see `stack`.
        course: what they share with the run.
        folds: int64 `[N]`, the fold of each sample, 0 to K − 1: K heads a setting, each evaluated on its fold, in the
            first view. None: one head a setting, trained on all samples.
        val: features and labels to evaluate on if there are no folds.
        every: epochs between evaluations; the last is evaluated in any case. None: that one alone.
        memory: GiB that heads which are trained together may take.

    Returns:
        One curve for each setting, in their order.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    if val is not None:
        val = ((val[0],) if isinstance(val[0], Tensor) else val[0], val[1])
    count = 1 if folds is None else int(folds.max()) + 1
    curves: dict[int, Curve] = {}
    sample = tuple(tensor[: max(len(window) for window in course.windows(0))] for tensor in inputs)
    most = max(int(memory * 2**30 / (bytes_of(tail, sample) * count)), 1)
    devices = [labels.device] if labels.device.type == "cuda" else []
    for epochs in sorted({setting.epochs for setting in settings}):
        places = [i for i, setting in enumerate(settings) if setting.epochs == epochs]
        for first in range(0, len(places), most):
            group = places[first : first + most]
            with torch.random.fork_rng(devices), torch.no_grad():
                found = _train(inputs, labels, [settings[i] for i in group], tail, course, folds, val, every)
            curves |= zip(group, found, strict=True)
    return [curves[place] for place in range(len(settings))]


def fold_of(labels: Tensor, folds: int, *, seed: int) -> Tensor:
    """The fold of each sample, int64 `[N]`: each class is dealt to all folds in turn, in an order from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]  # by class
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order)) % min(folds, len(order))
    return found.to(labels.device)


def grid_of(
    inputs: Tensor,
    *,
    optimizer: str = "adamw",
    epochs: Sequence[int] = (10,),
    rates: int = 12,
    decays: int = 3,
    label_smoothing: float = 0.0,
) -> list[HeadSetting]:
    """A log-spaced grid around what suits the features `[N, D, ...]`.

    AdamW's step does not depend on the scale of the gradient: rates from 1e-4 to 1, or to 0.03 for maps, whose heads
    end in a ReLU that large steps kill; decays from 1e-3 to 0.1. The step of SGD and its decay do: rates are shares,
    from 1e-3 to 10, of one over the mean squared norm, decays, from 1e-6 to 1e-4, shares of that norm.

    Args:
        inputs: features; their scale and number of dimensions count.
        optimizer: "adamw" or "sgd". epochs: lengths of run. label_smoothing: of all.
        rates, decays: how many of each.
    """
    lrs, others = torch.logspace(-4, 0 if inputs.ndim < 3 else -1.5, rates), torch.logspace(-3, -1, decays)
    if optimizer == "sgd":
        squares = float(inputs.double().square().mean() * inputs.shape[1]) or 1.0
        lrs, others = torch.logspace(-3, 1, rates) / squares, torch.logspace(-6, -4, decays) * squares
    rounded = [[float(f"{value:.3g}") for value in values.tolist()] for values in (lrs, others)]
    return [HeadSetting(lr, decay, label_smoothing, length) for length in epochs for lr, decay in product(*rounded)]


def _train(
    inputs: Inputs,
    labels: Tensor,
    settings: Sequence[HeadSetting],
    tail: nn.Module,
    course: Course,
    folds: Tensor | None,
    val: tuple[Inputs, Tensor] | None,
    every: int | None,
) -> list[Curve]:
    """Heads of one length, on the same features. Head `s · K + k` has setting s, and leaves out fold k."""
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
    first = tuple(tensor[:samples] for tensor in inputs)
    held: list[_Held] = []
    if folds is not None:
        rows = [(folds == fold).nonzero()[:, 0] for fold in range(number)]
        held = [(first, labels, row, slice(fold, None, number)) for fold, row in enumerate(rows)]
    elif val is not None:
        held = [(*val, torch.arange(len(val[1]), device=device), slice(None))]
    curves = [Curve(setting, [len(rows) for _, _, rows, _ in held]) for setting in settings]
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
        if held and (epoch + 1 == epochs or (every is not None and (epoch + 1) % every == 0)):
            _evaluate(heads, held, curves, epoch + 1)
    for place, curve in enumerate(curves):
        part = slice(place * number, (place + 1) * number)
        curve.tensors = {name: tensor[part] * curve.setting.lr for name, tensor in heads.tensors.items()}
    return curves


def _gradient(logits: Tensor, labels: Tensor, smoothing: Tensor, weights: Tensor) -> Tensor:
    """That of the heads' weighted cross-entropies: logits `[B, H, C]`, smoothing `[H]`, weights `[B, K]`."""
    batch, _, classes = logits.shape
    # Heads last: on a CPU a softmax over the last of few values takes 12 times as long as over a dimension before it.
    gradient = logits.transpose(1, 2).contiguous().softmax(dim=1).sub_(smoothing / classes)  # [B, C, H]
    gradient[torch.arange(batch, device=labels.device), labels] -= 1 - smoothing
    gradient.view(batch, classes, -1, weights.shape[1]).mul_(weights[:, None, None])
    return gradient.transpose(1, 2).contiguous()


def _evaluate(heads: Stack, held: Sequence[_Held], curves: Sequence[Curve], epoch: int) -> None:
    """Count what is right, and add up the NLL, of every part that is held out, by the heads that have not seen it."""
    rights, losses = [], []
    for inputs, labels, rows, part in held:
        right, loss = [], []
        for index in rows.split(_ROWS):
            logits = heads.logits(tuple(tensor.index_select(0, index) for tensor in inputs), heads=part)  # [B, H, C]
            truth = labels.index_select(0, index)[:, None].expand(logits.shape[:2])  # [B, H]
            right.append((logits.argmax(dim=2) == truth).sum(dim=0))
            loss.append(F.cross_entropy(logits.movedim(2, 1).float(), truth, reduction="none").double().sum(dim=0))
        rights.append(torch.stack(right).sum(dim=0))
        losses.append(torch.stack(loss).sum(dim=0))
    every_right, every_loss = torch.stack(rights, dim=1).tolist(), torch.stack(losses, dim=1).tolist()  # [S, K]
    for curve, right, loss in zip(curves, every_right, every_loss, strict=True):
        curve.right[epoch], curve.nll[epoch] = right, loss
