"""Runs with several learning rates and seeds on features that are computed once, and a table of them, the best first.

python examples/sweep.py --data ~/photos --model resnet50 --augment none --epochs 20 --output runs/sweep

Flags are those of train.py. Each run is OUTPUT/lr0.001-seed0 and so on; the frozen trunk sees each image once, in the
first run. The same command again continues where it was interrupted, and prints the table if nothing is left to do.
With data that has no validation part, and with random weights, a seed has features of its own: it splits other images
off, or draws other weights.
"""

import itertools
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))  # train.py

import train
import trainer
from trainer.cli import end_at_once, parse
from trainer.config import replace
from trainer.storage import checkpoint

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)


def main(config):
    folder, found = Path(config.run.output or "runs/sweep"), {}
    score = trainer.load_recipe(config.run.recipe).score
    for lr, seed in itertools.product(RATES, SEEDS):
        run = folder / f"lr{lr:g}-seed{seed}"
        values = {"lr": lr, "seed": seed, "cache_dir": config.speed.cache_dir or str(folder / "features")}
        train.main(replace(config, **values, output=str(run), resume="auto"))
        found[lr, seed] = score(checkpoint.read(run / "checkpoints" / "best.pt").metrics["best"])
    rows = {lr: [found[lr, seed] for seed in SEEDS] for lr in RATES}
    lines = [f"{'lr':>8}  {'mean':>8}  " + "  ".join(f"{f'seed {seed}':>8}" for seed in SEEDS)]
    for lr, values in sorted(rows.items(), key=lambda row: mean(row[1]), reverse=True):
        lines.append(f"{lr:8g}  {mean(values):8.4f}  " + "  ".join(f"{value:8.4f}" for value in values))
    trainer.print_main("score of the best epoch:", *lines)


if __name__ == "__main__":
    end_at_once()
    trainer.run_and_exit(main, parse(__doc__))
