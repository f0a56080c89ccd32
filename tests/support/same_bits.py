"""Shows that a change of the code changed no result: the checkpoints of two checkouts are compared bit by bit.

    python tests/support/same_bits.py BASE [HEAD] [--ignore KEY] [--args-head "--augment none --lr 1e-3"]

BASE and HEAD are folders of checkouts, or git revisions. Both run with this interpreter on the CPU, one after the other
in the same folder, so that paths in the checkpoints agree. The exit code is 1 if anything differs or a run fails.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = "--data ../photos --model resnet18 --weights none --image-size 32 --augment crop --train head layer4"
PHOTOS += " --batch-size 16 --micro-batch 4 --save-every 2 --workers 0"
RUNS = (  # script, arguments, processes
    ("train.py", "--output demo --epochs 3 --lr 0.1 --augment none", 1),
    ("train.py", f"--output photos {PHOTOS} --epochs 2", 1),
    ("train.py", f"--output resumed {PHOTOS} --epochs 1", 1),
    ("train.py", f"--output resumed {PHOTOS} --epochs 2 --resume auto", 1),
    ("tiny_run.py", "tiny --workers 0", 1),
    ("tiny_run.py", "tiny-block --workers 0 --train fc block", 1),
    ("tiny_run.py", "tiny-exact --workers 0 --exact", 1),
    ("tiny_run.py", "tiny-killed --workers 0 --kill step:7", 1),  # in mid-epoch
    ("tiny_run.py", "tiny-killed --workers 0", 1),
    ("tiny_run.py", "tiny-two --workers 0 --timeout 1", 2),
)
TIMEOUT = 300  # seconds for one run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base", help="folder of a checkout, or git revision")
parser.add_argument("head", nargs="?", default=str(ROOT), help="the same; default: the checkout of this script")
parser.add_argument("--ignore", action="append", default=[], metavar="KEY[.SUBKEY...]", help="entry meant to change")
parser.add_argument("--args-base", default="", metavar="ARGS", help="more arguments for train.py of BASE")
parser.add_argument(
    "--args-head", default="", metavar="ARGS", help='the same of HEAD; --args-head="--one" if it is one'
)


def write_photos(root: Path) -> None:
    """JPEGs of two classes, 12 + 4 of each: stripes across or down, with noise."""
    draw = np.random.default_rng(0)
    for part, label in ((part, label) for part in ("train", "val") for label in ("across", "down")):
        (root / part / label).mkdir(parents=True)
        for number in range(12 if part == "train" else 4):
            wave = np.sin(np.arange(64) / draw.uniform(1.5, 3))
            stripes = wave[:, None, None] if label == "across" else wave[None, :, None]
            pixels = 128 + 90 * stripes + draw.normal(0, 20, (64, 64, 3))  # [H, W, C]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / part / label / f"{number:02d}.jpg")


@contextmanager
def checkout(name: str, folder: Path) -> Iterator[Path]:
    """The folder called `name`, or for as long as needed a worktree at `folder` of the git revision of that name."""
    if (Path(name) / "train.py").is_file():
        yield Path(name).resolve()
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    if subprocess.run([*git, "add", "--quiet", "--detach", str(folder), name]).returncode != 0:
        sys.exit(f"{name}: expected the folder of a checkout or a git revision.")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def run_all(root: Path, work: Path, more: list[str]) -> None:
    """All runs of the checkout at `root`, in the new folder `work`; exits with the end of its output if one fails."""
    work.mkdir()
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for script, arguments, processes in RUNS:
        path = next(path for folder in ("tests/support", "tests", ".") if (path := root / folder / script).exists())
        first = more if script == "train.py" else []  # first: what a run sets itself comes last and wins
        run(path, [*first, *arguments.split()], processes, cwd=work, env=env)


def run(script: Path, arguments: list[str], processes: int, *, cwd: Path, env: dict[str, str]) -> None:
    """Run a script on one or more processes, which find each other as those of a launcher do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started, codes, command = [], [], [sys.executable, str(script), *arguments]
    with open(cwd / "output.txt", "wb") as output:
        try:
            for rank in range(processes):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                own = env | {name: str(value) for name, value in place.items()} if processes > 1 else env
                started.append(subprocess.Popen(command, cwd=cwd, env=own, stdout=output, stderr=subprocess.STDOUT))
            codes += [process.wait(TIMEOUT) for process in started]
        except subprocess.TimeoutExpired:
            codes.append(f"running after {TIMEOUT} s")
        finally:
            for process in started:
                process.kill()
                process.wait()
    if codes != [-signal.SIGKILL if "--kill" in arguments else 0] * processes:
        text = (cwd / "output.txt").read_text(errors="replace")
        sys.exit(f"FAILED {shlex.join(command)}, exit codes {codes}\n" + "\n".join(text.splitlines()[-20:]))


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(keys that lead to it, value) of all that nested dicts and lists hold, and of each of these its type."""
    if not isinstance(value, dict | list | tuple):
        yield path, value
        return
    yield path, type(value)
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(entry, (*path, key))


def difference(base: Any, head: Any) -> str | None:
    """What differs between two leaves, shortened; None if they are the same type and the same bits."""
    if not (isinstance(base, torch.Tensor) and isinstance(head, torch.Tensor)):
        same = type(base) is type(head) and repr(base) == repr(head)  # repr: NaN is NaN, and -0.0 is not 0.0
        return None if same else f"{base!r:.60} → {head!r:.60}"
    kinds = [f"{type(tensor).__name__} {tensor.dtype} {list(tensor.shape)}" for tensor in (base, head)]
    if kinds[0] != kinds[1]:
        return " → ".join(kinds)
    rows = [tensor.detach().reshape(-1, 1).view(torch.uint8) for tensor in (base, head)]  # [elements, bytes of each]
    differ = (rows[0] != rows[1]).any(1)  # [elements]
    first = [tensor.reshape(-1)[differ][:1].tolist() for tensor in (base, head)]
    return f"{int(differ.sum())} of {len(differ)} elements, first {first[0]} → {first[1]}" if differ.any() else None


def compare(base: Path, head: Path, *, ignore: list[str]) -> str | None:
    """The first entry that differs between two checkpoint files, and how many do; None if none does."""
    if not (base.exists() and head.exists()):
        return f"only in {'BASE' if base.exists() else 'HEAD'}"
    sides = [dict(leaves(torch.load(path, map_location="cpu", weights_only=True))) for path in (base, head)]
    found = []
    for path in sides[0] | sides[1]:
        name = ".".join(map(str, path))
        if any(f"{name}.".startswith(f"{key}.") for key in ignore):
            continue
        if path not in sides[0] or path not in sides[1]:
            found.append(f"{name}: only in {'BASE' if path in sides[0] else 'HEAD'}")
        elif what := difference(sides[0][path], sides[1][path]):
            found.append(f"{name}: {what}")
    return f"{found[0]} (entries that differ: {len(found)})" if found else None


def main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        top = Path(name).resolve()
        write_photos(top / "photos")
        for side in ("base", "head"):
            with checkout(getattr(options, side), top / "checkout") as root:
                run_all(root, top / "work", shlex.split(getattr(options, f"args_{side}")))
            (top / "work").rename(top / side)
        patterns = ("*/checkpoints/*.pt", "*/end.*.pt")
        sides = [top / "base", top / "head"]
        paths = {path.relative_to(side) for side in sides for pattern in patterns for path in side.glob(pattern)}
        results = {path: compare(*(side / path for side in sides), ignore=options.ignore) for path in sorted(paths)}
        for path, what in results.items():
            print(f"DIFFERS {path}: {what}" if what else f"same {path}")
        return int(not results or any(results.values()))


if __name__ == "__main__":
    sys.exit(main(parser.parse_args()))
