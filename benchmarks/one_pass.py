"""What the search of the head is worth: the default run against a run with fixed settings, in turn, over several seeds.

    python benchmarks/one_pass.py --data photos --model squeezenet1_0 --weights squeezenet1_0.pth --seeds 5

Prints one table: validation accuracy after the last epoch (mean, and 95 % of Student's t over the seeds) and the time
of whole processes, launcher included. The two kinds of run take turns, so that a busy machine is busy for both.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[1]
FIXED = ["--lr", "1e-3", "--weight-decay", "0.01", "--epochs", "10"]
KINDS = {
    "fixed: crop, lr 1e-3, 10 epochs": ["--augment", "crop", *FIXED],
    "fixed: no augmentation, lr 1e-3, 10 epochs": ["--augment", "none", *FIXED],
    "default: kept features, searched head": [],
}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, by seeds

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seeds", type=int, default=5, choices=T95)
parser.add_argument("--config", default="cpu", help="a file of accelerate_configs/")


def run(options: list[str], folder: Path, *, config: str) -> float:
    """Seconds of a whole run."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), str(ROOT / "train.py")]
    began = time.perf_counter()
    done = subprocess.run([*command, *options, "--output", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began


def interval(values: list[float]) -> str:
    """Mean and half of the 95 % interval, in percent."""
    half = T95[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.1%} ± {100 * half:.1f}"


if __name__ == "__main__":
    args, options = parser.parse_known_args()
    accuracies: dict[str, list[float]] = {kind: [] for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    searches = []
    with tempfile.TemporaryDirectory() as work:
        for seed in range(args.seeds):
            for number, (kind, flags) in enumerate(KINDS.items()):
                folder = Path(work, f"{number}-{seed}")
                seconds[kind].append(run([*options, *flags, "--seed", str(seed)], folder, config=args.config))
                last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
                accuracies[kind].append(last["val"]["accuracy"])
                if not flags:
                    searches.append(json.loads((folder / "search.json").read_text()))
                print(f"seed {seed}  {kind}: {accuracies[kind][-1]:.1%}, {seconds[kind][-1]:.1f} s", flush=True)
    print(f"\n| run ({args.seeds} seeds) | validation accuracy | median time of the process |\n|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {interval(accuracies[kind])} | {median(seconds[kind]):.1f} s |")
    for name, text in (
        ("accuracy", "held out in the search"),
        ("ridge", "ridge, leave-one-out"),
        ("knn", "neighbours"),
    ):
        print(f"| training images, {text} | {interval([search[name] for search in searches])} | |")
