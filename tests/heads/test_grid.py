"""Heads trained together are the heads that torch trains one by one."""

import math
from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from trainer.errors import UsageError
from trainer.heads.grid import Course, HeadSetting, default_settings, fold_of, train_heads
from trainer.heads.stack import LinearStack, ModuleStack, stack

SAMPLES, CLASSES, SIZE, BATCH = 45, 3, 8, 8


def windows(epoch: int) -> list[list[int]]:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [order[first : first + BATCH] for first in range(0, SAMPLES, BATCH)]


def factor(progress: float) -> float:
    return progress / 0.2 if progress < 0.2 else 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def course(**options: object) -> Course:
    return Course(windows, factor, key=lambda step: 1000 + step, **options)


def data(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    features = torch.rand(SAMPLES, *shape, generator=generator)
    features[:, 0] += labels.view(-1, *[1] * (len(shape) - 1))
    return features, labels


def alone(tail: nn.Module, x: Tensor, labels: Tensor, setting: HeadSetting, train: Tensor, course: Course) -> nn.Module:
    """As the trainer does it, on the samples where `train`."""
    head = deepcopy(tail).train()
    parameters = [p for p in head.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": setting.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if course.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=course.momentum)
    done = step = 0
    views = len(x) // SAMPLES
    for epoch in range(setting.epochs):
        for window in course.windows(epoch):
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * factor((done + len(window) / 2) / (setting.epochs * SAMPLES))
            torch.manual_seed(course.key(step))
            index = torch.tensor(window)
            keep = train[index]
            rows = x[index + epoch % views * SAMPLES]
            if rows.ndim == 4:
                rows = rows.contiguous(memory_format=torch.channels_last)  # the order in which dropout is drawn
            losses = F.cross_entropy(
                head(rows), labels[index], reduction="none", label_smoothing=setting.label_smoothing
            )
            (losses[keep].sum() / max(int(keep.sum()), 1)).backward()
            done, step = done + len(window), step + 1
            if course.clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters, course.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
    return head.eval()


def compare(tail: nn.Module, x: Tensor, labels: Tensor, settings: Sequence[HeadSetting], course: Course, folds: Tensor):
    every = train_heads(x, labels, settings, tail=tail, course=course, folds=folds)
    for setting, trained in zip(settings, every, strict=True):
        right, nll = 0, 0.0
        for fold in range(int(folds.max()) + 1):
            head = alone(tail, x, labels, setting, folds != fold, course)
            for name, parameter in head.named_parameters():
                if parameter.requires_grad:
                    torch.testing.assert_close(trained.tensors[name][fold], parameter, rtol=1e-4, atol=1e-5)
            logits = head(x[:SAMPLES][folds == fold]).detach()
            right += int((logits.argmax(dim=1) == labels[folds == fold]).sum())
            nll += float(F.cross_entropy(logits, labels[folds == fold], reduction="sum"))
        assert sum(trained.right) == right
        assert trained.loss == pytest.approx(nll / SAMPLES, rel=1e-4)


GRID = [
    HeadSetting(0.02, 0.1, epochs=3),
    HeadSetting(0.1, 0.0, label_smoothing=0.1, epochs=3),
    HeadSetting(0.05, 1.0, label_smoothing=0.2, epochs=2),
]
TAILS = {
    "linear": lambda: nn.Linear(SIZE, CLASSES),
    "no bias": lambda: nn.Linear(SIZE, CLASSES, bias=False),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(SIZE, CLASSES)),
    "perceptron": lambda: nn.Sequential(
        nn.Linear(SIZE, 5), nn.LayerNorm(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, CLASSES)
    ),
}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("name", TAILS)
def test_together_as_alone(name, kind):
    torch.manual_seed(0)
    tail, (x, labels) = TAILS[name](), data(SIZE)
    assert isinstance(stack(tail, torch.ones(2), (x,)), ModuleStack if name == "perceptron" else LinearStack)
    compare(tail, x, labels, GRID, course(optimizer=kind), fold_of(labels, 4, seed=1))


def test_a_convolution_over_maps():
    torch.manual_seed(0)
    parts = [nn.Dropout(0.5), nn.Conv2d(SIZE, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    tail, (x, labels) = fx.symbolic_trace(nn.Sequential(*parts)), data(SIZE, 3, 3)
    compare(tail, x, labels, GRID, course(), fold_of(labels, 3, seed=1))


def test_clipped_and_with_two_views():
    torch.manual_seed(0)
    tail, (x, labels) = nn.Linear(SIZE, CLASSES), data(SIZE)
    compare(
        tail, torch.cat([x, x * 1.5]), labels, GRID, course(optimizer="sgd", clip_norm=0.1), fold_of(labels, 3, seed=1)
    )


def test_a_window_in_one_fold_has_no_gradient_for_its_head():
    torch.manual_seed(0)
    tail, (x, labels) = nn.Linear(SIZE, CLASSES), data(SIZE)
    folds = fold_of(labels, 3, seed=1)
    for epoch in range(3):
        folds[windows(epoch)[1]] = 0
    for kind in ("adamw", "sgd"):
        compare(tail, x, labels, GRID, course(optimizer=kind), folds)


def test_what_is_frozen_in_a_tail_is_shared():
    torch.manual_seed(0)
    tail, (x, labels) = TAILS["perceptron"](), data(SIZE)
    tail[0].requires_grad_(False)
    every = train_heads(x, labels, GRID, tail=tail, course=course(), folds=fold_of(labels, 3, seed=1))
    assert set(every[0].tensors) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    compare(tail, x, labels, GRID, course(), fold_of(labels, 3, seed=1))


def test_groups_and_repetitions_have_the_same_bits_and_nothing_outside_changes():
    tail, (x, labels) = TAILS["dropout"](), data(SIZE)
    before, random = {name: value.clone() for name, value in tail.state_dict().items()}, torch.get_rng_state()
    settings = default_settings(x, epochs=(2,), lrs=3, weight_decays=2)
    arguments = {"tail": tail, "course": course(), "folds": fold_of(labels, 3, seed=1)}
    one, again = (train_heads(x, labels, settings, **arguments) for _ in range(2))
    small = train_heads(x, labels, settings, memory=1e-9, **arguments)
    for a, b, c in zip(one, again, small, strict=True):
        assert a.right == b.right == c.right
        assert a.nll == b.nll
        assert a.loss == pytest.approx(c.loss, rel=1e-5)
        assert torch.equal(a.tensors["2.weight"], b.tensors["2.weight"])
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in tail.state_dict().items())
    assert tail.training


def test_without_folds_heads_are_trained_on_all_samples():
    tail, (x, labels) = nn.Linear(SIZE, CLASSES), data(SIZE)
    (trained,) = train_heads(x, labels, GRID[:1], tail=tail, course=course())
    head = alone(tail, x, labels, GRID[0], torch.ones(SAMPLES, dtype=torch.bool), course())
    torch.testing.assert_close(trained.tensors["weight"][0], head.weight, rtol=1e-4, atol=1e-5)
    assert trained.count == []


def test_folds_have_their_share_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 11 + [2])
    folds = fold_of(labels, 5, seed=3)
    assert sorted(torch.bincount(folds).tolist()) == [4, 4, 4, 5, 5]
    assert torch.bincount(folds[:10]).tolist() == [2] * 5
    assert torch.equal(folds, fold_of(labels, 5, seed=3))
    assert not torch.equal(folds, fold_of(labels, 5, seed=4))


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 1), ("sgd", 2)])
def test_the_grid_follows_the_scale_of_the_features(optimizer, power):
    x, _ = data(SIZE)
    one, ten = (default_settings(scale * x, optimizer=optimizer) for scale in (100, 1000))
    assert ten[0].lr == pytest.approx(one[0].lr / 10**power, rel=0.01)
    assert ten[0].weight_decay == pytest.approx(one[0].weight_decay * (100 if optimizer == "sgd" else 1), rel=0.01)
    settings = default_settings(x, optimizer=optimizer, lrs=5, weight_decays=3, epochs=(2, 4))
    assert 20 <= len(settings) <= 30
    assert max(s.lr * s.weight_decay for s in settings) < 1
    assert max(s.lr for s in default_settings(0 * x, optimizer=optimizer)) in (1.0, 10.0)


def test_tails_that_cannot_be_compared():
    x = torch.ones(2, SIZE)
    with pytest.raises(UsageError, match="nothing to train"):
        stack(nn.Linear(SIZE, 2).requires_grad_(False), torch.ones(2), (x,))
    with pytest.raises(UsageError, match="BatchNorm"):
        stack(nn.Sequential(nn.BatchNorm1d(SIZE), nn.Linear(SIZE, 2)), torch.ones(2), (x,))
