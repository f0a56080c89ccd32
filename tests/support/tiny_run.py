"""A whole run in a second: TinyNet on random images, with everything in it that could break exactness.

Shuffling, augmentation that draws from `random`, numpy and torch, dropout, AdamW, warm-up and cosine, accumulation,
clipping, an uneven last window, an evaluation each epoch, checkpoints in mid-epoch. A ledger holds one line per step.

    python tests/support/tiny_run.py FOLDER [--kill EVENT] [--exact] ...       # resumes what FOLDER holds

With --kill the process sends itself SIGKILL at an event: start, micro:STEP:NUMBER, step:STEP, trained:EPOCH,
evaluating:EPOCH, evaluated:EPOCH, fsync:N, replace:N, pruned:N, saved:STEP, done. Tests import `run`, or launch it.
"""

import argparse
import hashlib
import json
import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from networks import TinyNet
from tensors import Tensors

import trainer
from trainer.config import OptimConfig, SpeedConfig
from trainer.data.sampling import random_key
from trainer.data.transforms import Normalize
from trainer.model.freezing import digest
from trainer.optim import build_optimizer
from trainer.storage import checkpoint
from trainer.storage.optimizer_state import optimizer_state

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--kill", default=None)
parser.add_argument("--kill-rank", type=int, default=0)
parser.add_argument("--by", default="KILL", help="the signal, such as TERM")
parser.add_argument("--train", nargs="+", default=["fc"])
parser.add_argument("--samples", type=int, default=37)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--micro-batch", type=int, default=2)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--stop", type=int, default=None, help="end after this many epochs, as if that were all")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--save-every", type=int, default=2)
parser.add_argument("--cache", action="store_true")
parser.add_argument("--optimizer", default="adamw")
parser.add_argument("--clip", type=float, default=1.0)
parser.add_argument("--exact", action="store_true")
parser.add_argument("--flip", action="store_true", help="change one bit of process 1's head after the second step")
parser.add_argument("--timeout", type=float, default=0.1, help="minutes that processes wait for each other")
parser.add_argument("--fail", default=None, help="an event at which the process of --kill-rank raises instead")
parser.add_argument("--nan", type=int, default=None, help="sample whose loss is not a number")


def augment(image: torch.Tensor) -> torch.Tensor:
    image = image.flip(-1) if torch.rand(()) < 0.5 else image
    image = image.flip(-2) if random.random() < 0.5 else image
    return image.roll(int(np.random.randint(3)), -1)


class Events:
    """Kills this process at one of them."""

    def __init__(self, kill: str | None, by: str = "KILL"):
        self.signal = signal.Signals[f"SIG{by}"]
        first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.kill, self.counts = kill if first_try else None, dict.fromkeys(("fsync", "replace", "pruned"), 0)

    def __call__(self, *name: object) -> None:
        if self.kill == ":".join(map(str, name)):
            os.kill(os.getpid(), self.signal)

    def after(self, module, function: str, name: str) -> None:
        """Count the calls of a file operation; each is an event."""
        original = getattr(module, function)

        def counted(*args, **kwargs):
            result = original(*args, **kwargs)
            self.counts[name] += 1
            self(name, self.counts[name])
            return result

        setattr(module, function, counted)


def run(options: argparse.Namespace) -> None:
    accelerator = trainer.start(exact=options.exact, timeout=options.timeout)
    rank = accelerator.process_index
    event = Events(options.kill if rank == options.kill_rank else None, options.by)
    event.after(os, "fsync", "fsync")
    event.after(os, "replace", "replace")
    event.after(checkpoint, "prune", "pruned")
    guard = trainer.Preemption(accelerator)
    guard.armed = True
    event("start")

    draw = torch.Generator().manual_seed(random_key("images"))
    count = options.samples
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=draw)
    labels = [int(image.float().mean() * 10) % 3 for image in images]
    torch.manual_seed(0)
    model = TinyNet().to(accelerator.device)
    freeze_plan = trainer.freeze(model, options.train)
    normalize = Normalize((0.5,) * 3, (0.25,) * 3).to(accelerator.device)
    parts = trainer.split_model(model, normalize(images[:1].to(accelerator.device)))
    plan = trainer.BatchPlan(count, options.batch_size, options.micro_batch, accelerator.num_processes)
    seen: list[tuple[list[int], str]] = []
    plain = trainer.classification(label_smoothing=0.1)

    def step(model, batch):
        if model.training:
            event("micro", loop.step + 1, len(seen))
            entry = (batch["index"].tolist(), digest(batch["inputs"][0]))
            seen.extend([entry] if entry not in seen else [])  # the trainer may try its first batch before the step
        outputs = plain(model, batch)
        if options.nan is not None and model.training:
            factors = torch.where(batch["index"] == options.nan, float("nan"), 1.0)
            outputs["loss"] = outputs["loss"] * factors.to(accelerator.device)
        return outputs

    config = OptimConfig(
        epochs=options.epochs, clip_norm=options.clip, optimizer=options.optimizer, lr=0.05, warmup=0.1
    )
    loop = trainer.Trainer(
        accelerator,
        model,
        parts.tail,
        build_optimizer(model, config),
        plan=plan,
        config=config,
        recipe=trainer.Recipe(step=lambda config: step),
        exact=options.exact,
        about={"freeze_plan": freeze_plan.to_dict(), "classes": ["a", "b", "c"], "base": {}, "config": {}},
    )
    sample = normalize(images[:2].to(accelerator.device))
    transform, views = ((lambda image: image), 1) if options.cache else (augment, None)
    train_set = trainer.KeyedDataset(Tensors(images, labels), transform, seed=0, views=views)
    val_set = trainer.KeyedDataset(Tensors(images[:23], labels[:23]), lambda image: image, seed=0)
    features = trainer.Features(
        accelerator,
        parts.trunk,
        normalize,
        sample,
        {"val": val_set, "train": train_set},
        config=SpeedConfig(cache_memory=2 if options.cache else 0),
        epochs=options.epochs,
        plan=plan,
        exact=True,
        folder=options.folder / "features",
        workers=trainer.Workers(options.workers),
    )
    val, train = features.open("val"), features.open("train")
    checkpoints = options.folder / "checkpoints"
    newest, state = trainer.on_main(accelerator, lambda: checkpoint.newest(checkpoints))
    if newest is not None:
        loop.load(state)
    ledger = options.folder / f"ledger.{rank}.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    ledger.write_text("".join(line + "\n" for line in lines if _step(line) <= loop.step))

    def after_step(loop):
        data = sorted(gather_object(list(seen)))
        seen.clear()
        totals = loop.totals.over_processes(accelerator)
        line = {
            "step": loop.step,
            "epoch": loop.epoch,
            "rate": loop.rate.hex(),
            "totals": {name: value.hex() for name, value in totals.items()},
            "data": hashlib.sha256(repr(data).encode()).hexdigest()[:16],
            "weights": {name: digest(parameter) for name, parameter in loop.trainable.items()},
            "optimizer": state_digest(optimizer_state(loop.optimizer.optimizer, model)),
        }
        with open(ledger, "a") as file:
            file.write(json.dumps(line) + "\n")
        event("step", loop.step)
        if options.flip and rank == 1 and loop.step == 2:
            model.fc.bias.data.view(torch.int32)[0] ^= 1
        if options.flip:
            loop.check_replicas()
        if guard.check() or loop.step % options.save_every == 0:
            loop.save(checkpoints, keep=2)
            event("saved", loop.step)

    try:
        for epoch in range(loop.epoch, options.stop or options.epochs):
            for _ in loop.steps(train):
                after_step(loop)
            event("trained", epoch)
            val_means = loop.evaluate(val, between=lambda epoch=epoch: (event("evaluating", epoch), guard.check()))
            event("evaluated", epoch)
            loop.finish_epoch(val_means)
            loop.save(checkpoints, keep=2)
            event("saved", loop.step)
    except trainer.Preempted:
        loop.save(checkpoints, keep=2)
        raise
    event("done")
    state = loop.state().to_dict()
    replica = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state | {"replica": replica}, options.folder / f"end.{rank}.pt")
    (options.folder / f"end.{rank}.txt").write_text(state_digest({**state, "replica": replica}))
    accelerator.end_training()


def _step(line: str) -> int:
    with suppress(json.JSONDecodeError):
        return json.loads(line)["step"]
    return 1 << 60  # torn by a kill


def state_digest(value: object) -> str:
    """One hash of nested plain types and tensors."""
    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, dict):
        value = [(key, state_digest(value[key])) for key in sorted(value)]
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


if __name__ == "__main__":
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    trainer.run_and_exit(run, options)
