"""Time many heads that are trained together against one, and against as many that PyTorch trains in turn; a table.

    python benchmarks/heads.py                                               # 1,440 × 512 features, 10 epochs
    python benchmarks/heads.py --samples 10000 --features 2048 --epochs 2

Random features. All ways take turns in one process, so that a slow minute falls on all; shown is the median with
the least and the most. No time is extrapolated: where 64 plain heads take too long, give fewer --epochs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import trainer
from trainer.config import OptimConfig
from trainer.data.sampling import BatchPlan
from trainer.heads import Course, HeadSetting, knn_accuracy, train_heads
from trainer.heads.grid import fold_of
from trainer.heads.ridge import ridge
from trainer.optim import build_optimizer, schedule
from trainer.trunk.features import CachedFeatures


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(args.samples, args.features), torch.arange(args.samples) % args.classes
    plan, optim = BatchPlan(len(labels), args.batch_size, None, 1), OptimConfig(lr=1.0, epochs=args.epochs)
    course = Course(lambda epoch: plan.windows(seed=0, epoch=epoch), schedule(optim))
    rates = torch.logspace(-5, -1, args.heads).tolist()
    settings = [HeadSetting(rate, epochs=args.epochs) for rate in rates]
    together = partial(train_heads, x, labels, tail=nn.Linear(args.features, args.classes), course=course)
    ways: dict[str, Callable[[], float]] = {
        "one head, by the Trainer": lambda: by_the_trainer(x, labels, plan, optim, args.classes),
        "one head, plain PyTorch": lambda: plain(x, labels, settings[:1], course, args.classes),
        f"{args.heads} heads, plain PyTorch in turn": lambda: plain(x, labels, settings, course, args.classes),
        f"{args.heads} heads, together": lambda: timed(partial(together, settings)),
        f"{args.heads} heads in 5 folds, together": lambda: timed(
            partial(together, settings, folds=fold_of(labels, 5, seed=0))
        ),
        "ridge regression, 50 strengths, leave-one-out": lambda: timed(partial(ridge, x, labels, classes=args.classes)),
        "covariance and eigenvectors alone, float64": lambda: timed(partial(eigenvectors, x)),
        "nearest neighbours, leave-one-out": lambda: timed(partial(knn_accuracy, x, labels)),
    }
    for way in ways.values():  # not counted: the first call of everything takes longer
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            found[name].append(way())
    one = statistics.median(found["one head, by the Trainer"])
    print(
        f"{args.samples:,} × {args.features:,} features, {args.classes} classes, {args.epochs} epochs of "
        f"{plan.steps_per_epoch} steps, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| way | median, s | least to most | ÷ one head |\n| --- | ---: | ---: | ---: |")
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(f"| {name} | **{median:.3f}** | {min(seconds):.3f} to {max(seconds):.3f} | {median / one:.2f} |")


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def by_the_trainer(x: Tensor, labels: Tensor, plan: BatchPlan, optim: OptimConfig, classes: int) -> float:
    """Seconds of the epochs of a run, without its start."""
    model = nn.Linear(x.shape[1], classes)
    optimizer = build_optimizer(model, optim, fused=True)
    recipe = trainer.load_recipe(None)
    loop = trainer.Trainer(
        Accelerator(cpu=True), model, model, optimizer, plan=plan, config=optim, recipe=recipe, about={}
    )
    source = CachedFeatures((x,), labels)

    def train() -> None:
        while not loop.finished():
            for _ in loop.steps(source):
                pass
            loop.finish_epoch({"accuracy": 0.0})

    return timed(train)


def plain(x: Tensor, labels: Tensor, settings: list[HeadSetting], course: Course, classes: int) -> float:
    """Seconds of a usual loop, one head after the other."""

    def train() -> None:
        for setting in settings:
            head, done = nn.Linear(x.shape[1], classes), 0
            optimizer = torch.optim.AdamW(head.parameters(), weight_decay=setting.weight_decay)
            for epoch in range(setting.epochs):
                for window in course.windows(epoch):
                    index = torch.tensor(window)
                    progress = (done + len(window) / 2) / (setting.epochs * len(labels))
                    optimizer.param_groups[0]["lr"] = setting.lr * course.factor(progress)
                    F.cross_entropy(head(x[index]), labels[index]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    done += len(window)

    return timed(train)


def eigenvectors(x: Tensor) -> None:
    """Without which there is no ridge regression."""
    centred = x.double() - x.mean(dim=0, dtype=torch.float64)
    torch.linalg.eigh(centred.T @ centred if len(x) > x.shape[1] else centred @ centred.T)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1440)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args())
