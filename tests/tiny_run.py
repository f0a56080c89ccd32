"""Train TinyNet on random images and save what came of it; run on 1, 2 and 4 processes by test_trainer.py.

python tests/tiny_run.py OUT.pt [--train PATTERNS] [--epochs N] [--stop N] [--checkpoints FOLDER] [--resume FILE] ...
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from conftest import TinyNet

import trainer
from trainer.sampling import random_key

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--train", nargs="+", default=["block", "fc"])
parser.add_argument("--samples", type=int, default=37)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--micro-batch", type=int, default=2)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--stop", type=int, default=None)
parser.add_argument("--optimizer", default="adamw")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--cache", action="store_true")
parser.add_argument("--checkpoints", type=Path)
parser.add_argument("--resume", type=Path)


def augment(image: torch.Tensor) -> torch.Tensor:
    return image.flip(-1) if torch.rand(()) < 0.5 else image


def main(options: argparse.Namespace) -> None:
    accelerator = trainer.start()
    draw = torch.Generator().manual_seed(random_key("images"))
    count = options.samples
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=draw)
    labels = [int(image.float().mean() * 10) % 3 for image in images]
    torch.manual_seed(0)
    model = TinyNet()
    plan = trainer.freeze(model, options.train)
    normalize = trainer.Normalize((0.5,) * 3, (0.25,) * 3)
    parts = trainer.split_model(model, normalize(images[:1]))
    optimizer = trainer.build_optimizer(model, options.optimizer, lr=0.05)
    batches = trainer.BatchPlan(count, options.batch_size, options.micro_batch, accelerator.num_processes)
    loop = trainer.Trainer(
        accelerator,
        model,
        parts.tail,
        optimizer,
        plan=batches,
        lr=partial(trainer.learning_rate, peak=0.05, warmup=0.1),
        epochs=options.epochs,
        clip_norm=1.0,
        about={"freeze_plan": plan.to_dict(), "classes": ["a", "b", "c"], "base": {}, "config": {}},
    )
    transform = (lambda image: image) if options.cache else augment
    source = partial(trainer.Stream, trunk=parts.trunk, normalize=normalize, accelerator=accelerator)
    train = source(trainer.KeyedDataset(images, labels, transform, seed=0), workers=options.workers)
    val = source(trainer.KeyedDataset(images[:23], labels[:23], lambda image: image, seed=0))
    if options.cache:
        train, val = (trainer.keep(part, batches, limit=1) for part in (train, val))
    if options.resume:
        loop.load(options.resume)
    counted = []
    for _ in range(loop.epoch, options.stop or options.epochs):
        means = loop.train_epoch(train, after_step=lambda _, totals: counted.append(totals.count))
        loop.metrics = {"train": means, "val": loop.evaluate(val)}
        if options.checkpoints:
            loop.save(options.checkpoints, keep=9)
    state = loop.state() | {"counted": counted, "replica": {k: v.clone() for k, v in model.state_dict().items()}}
    torch.save(state, options.out.with_suffix(f".{accelerator.process_index}.pt"))
    accelerator.end_training()


if __name__ == "__main__":
    main(parser.parse_args())
