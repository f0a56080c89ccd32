"""Measure the template against the usual ways to do the same; print a table, keep it.

    pip install -e ".[bench]"
    python benchmarks/run.py head --model resnet50      # ten head-only epochs: the template and seven peers
    python benchmarks/run.py steps
    python benchmarks/run.py head --quick               # a minute or two, two peers: does it run? keeps no result
    python benchmarks/run.py head --augment crop --template-flags "--views 4" --peers plain timm

Every measurement is a process of its own; repetitions are interleaved, so that a slow minute falls on all sides; shown
is the median, with the fastest and the slowest. A whole process is timed from start to end where that is what people
wait for, a part of it where it is not. A time counts only if the same work was done: the accuracy must be that of the
template without any cache, in fp32, within 0.2 points, or one image of a small validation set. A template row that
fails this ends the command with exit code 1. Peers draw an order and a head of their own, so that a peer may be a few
images off and have done the same work; one that trains with a frozen trunk in train mode has not.
"""

import argparse
import ast
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = ("plain", "accelerate", "lightning", "pytorch_accelerated", "fastai", "transformers", "timm")
POINTS = 0.2  # of accuracy, in percent, that a row may be away from the reference


@dataclass
class Row:
    """One line of a table: how it is measured, and what was found.

    commands: run one after the other and timed together; what the first one reports is the row's.
    ours: has to pass the gate. baseline: others are divided by it. reference: of the accuracy, within its group.
    once: measured in the first round alone. factor: of its time. share: of its epochs that are run; the others are
    taken to last as long, and its accuracy is not known. prepare: called before, untimed.
    log: the metrics.jsonl that holds the accuracy, where the process does not print it.
    """

    name: str
    commands: list[list[str]]
    group: str = ""
    ours: bool = False
    baseline: bool = False
    reference: bool = False
    once: bool = False
    factor: int = 1
    share: float = 1.0
    prepare: Callable[[], object] = lambda: None
    env: dict[str, str] = field(default_factory=dict)
    log: Path | None = None
    found: list[dict] = field(default_factory=list)  # "seconds"; "ready", "accuracy", "samples", "same", "extra"
    problem: str = ""

    def median(self, key: str) -> float | None:
        values = [found[key] for found in self.found if found.get(key) is not None]
        return statistics.median(values) if values else None


# ------------------------------------------------------------------------------------------------------- measuring


def measure(rows: list[Row], repeats: int) -> None:
    """Fill in `found`: all rows once, then all again, each round beginning with another row."""
    for turn in range(repeats):
        for row in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
            if row.problem or (row.once and row.found):
                continue
            row.prepare()
            if found := run(row):
                row.found.append(found)
            state = row.problem or f"{found['seconds']:.4g} s, accuracy {found.get('accuracy')}"
            print(f"{turn + 1}/{repeats} {row.group} {row.name}: {state}", file=sys.stderr, flush=True)


def run(row: Row) -> dict | None:
    """One measurement; None, and `row.problem`, if a process failed."""
    reported, total = {}, 0.0
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **row.env}
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    for number, command in enumerate(row.commands):
        start, lines = time.perf_counter(), []
        with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as process:
            for line in process.stdout:
                lines.append(line)
                if number == 0 and re.match(r"ready|batch  ", line):  # train.py says its batch plan then
                    reported["ready"] = time.perf_counter() - start
                if number == 0 and line.startswith("result "):
                    reported |= json.loads(line.removeprefix("result "))
        total += time.perf_counter() - start
        if process.returncode != 0:
            print("".join(lines[-30:]), file=sys.stderr)
            row.problem = f"exit code {process.returncode}: {lines[-1].strip() if lines else ''}"
            return None
    if row.log is not None:
        reported["accuracy"] = json.loads(row.log.read_text().splitlines()[-1])["val"]["accuracy"]
    if row.share < 1:
        total = reported["ready"] + (total - reported["ready"]) / row.share
        del reported["accuracy"]
    return {**reported, "seconds": reported.get("seconds", total) * row.factor}


# ---------------------------------------------------------------------------------------------------------- tables


def points_away(row: Row, rows: list[Row]) -> float | None:
    """Accuracy, in points above that of its group's reference."""
    reference = next((other for other in rows if other.reference and other.group == row.group), None)
    mine, theirs = row.median("accuracy"), reference.median("accuracy") if reference else None
    return None if mine is None or theirs is None else 100 * (mine - theirs)


def allowed(row: Row) -> float:
    """Points that its accuracy may be off: 0.2, or one image where that is more."""
    return max(POINTS, 100 / (row.median("samples") or 1e9))


def same(row: Row, rows: list[Row]) -> bool | None:
    """Whether a row did the same work; None where nothing says so."""
    if row.median("same") is not None:
        return all(found["same"] for found in row.found)
    away = points_away(row, rows)
    return None if away is None else abs(away) <= allowed(row) + 1e-9


def failures(rows: list[Row]) -> list[str]:
    """What is wrong with the template's own rows."""
    wrong = [(row, row.problem or "not the same accuracy") for row in rows if row.problem or same(row, rows) is False]
    return [f"{row.group} {row.name}: {problem}".strip() for row, problem in wrong if row.ours]


def table(rows: list[Row], unit: str = "s") -> str:
    """The rows as a Markdown table."""
    scale, digits = {"s": (1, 1), "ms": (1e3, 2), "µs": (1e6, 0)}[unit]
    extras = list(dict.fromkeys(name for row in rows for found in row.found for name in found.get("extra", {})))
    bases = list(dict.fromkeys(row.name for row in rows if row.baseline))
    lines = []
    for row in rows:
        cells = {"group": row.group, "side": row.name}
        lines.append(cells)
        if not row.found:
            cells["same"] = row.problem.replace("|", "/")[:120] or "not run"
            continue
        times = [found["seconds"] * scale for found in row.found]
        cells[f"median, {unit}"] = f"**{statistics.median(times):.{digits}f}**"
        cells["min to max"] = f"{min(times):.{digits}f} to {max(times):.{digits}f} ({len(times)})"
        cells["start-up, s"] = "" if row.median("ready") is None else f"{row.median('ready'):.1f}"
        for name in extras:
            values = [found["extra"][name] for found in row.found if name in found.get("extra", {})]
            cells[name] = f"{statistics.median(values):,.4g}" if values else ""
        accuracy, away = row.median("accuracy"), points_away(row, rows)
        cells["accuracy"] = "" if accuracy is None else f"{accuracy:.2%}"
        cells["points away"] = "" if away is None else f"{away:+.2f}"
        verdict = {True: "yes", False: "**NO**", None: ""}[same(row, rows)]
        cells["same"] = "reference" if row.reference else verdict
        for base in bases:
            other = next((r for r in rows if r.name == base and r.group == row.group and r.found), None)
            cells[f"÷ {base}"] = f"{row.median('seconds') / other.median('seconds'):.2f}" if other else ""
    heads = [head for head in max(lines, key=len) if any(cells.get(head) for cells in lines)]
    rule = ["---" if head in ("group", "side") else "---:" for head in heads]
    body = [[cells.get(head, "") for head in heads] for cells in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *body])


@cache
def gpu_name() -> str:
    """Empty without one. Asked in a process of its own, so that this one holds no GPU memory."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def hardware() -> tuple[str, str]:
    """This machine: short, for a file name, and in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name, cores = facts.get("model name", platform.processor()), len(os.sched_getaffinity(0))
    flags = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in facts.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    words = f"{gpu_name() or 'no GPU'}; {name}, {cores} of {os.cpu_count()} cores, {' '.join(flags)}, {memory:.0f} GiB"
    short = gpu_name() or re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", f"{short} {cores}c".lower()).strip("-"), words


def version_of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def without_folders(text: str) -> str:
    """The text with the last name of each absolute path in its place: folders of one machine mean nothing on others."""
    return re.sub(r"""(?<![^\s='"(])~?/(?:[^\s/'"]+/)*([^\s/'"]+)""", r"\1", text)


def command_line(arguments: list[str]) -> str:
    """The command that made a table, without where it kept its files."""
    words, kept = iter(arguments), []
    for word in words:
        if word in ("--work", "--out"):
            next(words, None)
        elif not word.startswith(("--work=", "--out=")):
            kept.append(word)
    return shlex.join(["python", "benchmarks/run.py", *kept])


def report(name: str, bench: "Bench", rows: list[Row], *, load: float) -> str:
    """The file that is kept."""
    command = command_line(sys.argv[1:])
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    notes = [f"{datetime.date.today()}, commit {commit}, load {load:.1f} when it began", hardware()[1]]
    packages = ("torch", "torchvision", *(peer.replace("_", "-") for peer in PEERS[1:]), "pillow", "numpy")
    notes += [", ".join([f"Python {platform.python_version()}", *map(version_of, packages)]), *bench.notes]
    if (off := max(map(allowed, rows))) > POINTS:
        notes.append(f"small validation set: one image is {off:.2f} points, and one is allowed")
    docs = {peer: ast.get_docstring(ast.parse((HERE / f"peer_{peer}.py").read_text())) for peer in bench.used}
    parts = [f"# {name}", " ".join(CELLS[name].__doc__.split()), f"    {command}"]
    parts += ["\n".join(f"- {note}" for note in notes), table(rows, bench.unit)]
    parts += [f"FAILED: {what}" for what in failures(rows)]
    parts += ["\n".join(f"- **{peer}**: {' '.join(doc.split())}" for peer, doc in docs.items())] * bool(docs)
    return without_folders("\n\n".join(parts)) + "\n"


# ----------------------------------------------------------------------------------------------------------- cells


class Bench:
    """What the cells are made of: the inputs, and a row for each side."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.unit, self.notes, self.used = args, "s", [], []
        self.probes: dict[tuple, dict] = {}

    def part(self, name: str, *flags: object, launch: str = "", **row) -> Row:
        """A part of parts.py, by `python` or by the launcher with one of its configurations."""
        config = str(ROOT / "accelerate_configs" / f"{launch}.yaml")
        start = ["-m", "accelerate.commands.launch", "--config_file", config] if launch else []
        return Row(name, [[sys.executable, *start, str(HERE / "parts.py"), *map(str, flags)]], **row)

    def written(self, path: Path, part: str, *flags: object) -> Path:
        """`path`, which parts.py writes if it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        row = self.part(part, part, *flags, "--output", path)
        if not path.exists() and run(row) is None:
            raise SystemExit(f"error: cannot write {path}: {row.problem}")
        return path

    def photos(self, **other: int) -> Path:
        """Their folder; `other` than the job's, or than 500 × 375 pixels."""
        args = self.args
        if args.data is not None:
            return args.data
        values = {"images": args.images, "val": args.val, "classes": args.classes, "width": 500, "height": 375} | other
        flags = [item for name, value in values.items() for item in (f"--{name}", value)]
        return self.written(args.work / f"photos-{'-'.join(map(str, values.values()))}", "photos", *flags)

    def weights(self) -> Path:
        args = self.args
        if args.weights is not None:
            return args.weights
        path = args.work / f"{args.model}-{args.images}-{args.classes}-{args.size}px.pth"
        return self.written(path, "weights", "--model", args.model, "--data", self.photos(), "--size", args.size)

    def probe(self, train: str, epochs: int) -> dict:
        """Whether bf16 and torch.compile pay here, for this many images."""
        args, images = self.args, epochs * (self.args.images + self.args.val)
        if (train, images) not in self.probes:
            flags = ["--model", args.model, "--size", args.size, "--batch-size", args.batch_size, "--images", images]
            row = self.part("probe", "probe", *flags, "--train", train, env=self.compiler(args.work / "probe", train))
            if (found := run(row)) is None:
                raise SystemExit(f"error: cannot try out bf16 and torch.compile: {row.problem}")
            self.probes[train, images] = found
            switches = ", ".join(f"{name} {'on' if found[name] else 'off'}" for name in ("bf16", "compile"))
            self.notes.append(f"tuned, for {images:,} images: {switches}; images/s {found['images_per_second']}")
        return self.probes[train, images]

    def compiler(self, folder: Path, train: str) -> dict[str, str]:
        """Nobody finds what an earlier process has compiled; frozen weights may be compiled as constants."""
        shutil.rmtree(folder / "inductor", ignore_errors=True)
        freezing = str(int(train == "head"))
        return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCHINDUCTOR_FREEZING": freezing}

    def job(self, data: Path | None, epochs: int | None, train: str) -> list[str]:
        """What the command lines of all sides share."""
        args = self.args
        flags = ["--data", data or self.photos(), "--weights", self.weights(), "--epochs", epochs or args.epochs]
        flags += ["--model", args.model, "--batch-size", args.batch_size, "--train", train, "--augment", args.augment]
        return list(map(str, flags))

    def template(
        self, name: str, *flags: object, bf16=False, data=None, epochs=None, train="head", lrs=(), **row
    ) -> Row:
        """train.py as a user starts it; with `lrs`, once for each."""
        args, output = self.args, self.args.work / "runs" / re.sub(r"\W+", "-", f"{row.get('group', '')}{name}")
        config = str(ROOT / "accelerate_configs" / ("gpu.yaml" if gpu_name() else "cpu.yaml"))
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        start += ["--mixed_precision", "bf16" if bf16 else "no", str(ROOT / "train.py"), *self.job(data, epochs, train)]
        start += [f"--image-size={args.size}", "--optimizer=sgd", "--weight-decay=0", "--warmup=0", *map(str, flags)]
        start += [] if row.get("reference") else shlex.split(args.template_flags)
        commands = [[*start, f"--lr={lr}", f"--output={output / str(lr)}"] for lr in lrs or (args.lr,)]
        log = output / str((lrs or (args.lr,))[0]) / "metrics.jsonl"
        before = row.pop("prepare", lambda: None)
        row["prepare"] = lambda: (shutil.rmtree(output, ignore_errors=True), before())
        return Row(name, commands, ours=True, log=log, env=self.compiler(output, train), **row)

    def peer(self, peer: str, name: str = "", *, tuned: bool, data=None, epochs=None, train="head", **row) -> Row:
        """One of the peer scripts."""
        name = f"{peer}, {'tuned' if tuned else 'as shipped'}{name}"
        output = self.args.work / "runs" / re.sub(r"\W+", "-", f"{row.get('group', '')}{name}")
        every = epochs or self.args.epochs
        some = min(every, self.args.shipped_epochs or every) if not tuned else every
        if some < every:
            name, row["share"] = f"{name}, {some} of {every} epochs", some / every
            note = "as shipped: so many epochs were run; the others are counted as if they had taken as long"
            self.notes += [note] * (note not in self.notes)
        flags = ["--tuned" if tuned else "--as-shipped", *self.job(data, some, train), f"--lr={self.args.lr}"]
        flags += [f"--size={self.args.size}", f"--output={output}"]
        if tuned:
            best = self.probe(train, every)
            flags += ["--bf16"] * best["bf16"] + ["--compile"] * best["compile"]
        self.used += [peer] * (peer not in self.used)
        row["prepare"] = lambda: (shutil.rmtree(output, ignore_errors=True), output.mkdir(parents=True))
        command = [sys.executable, str(HERE / f"peer_{peer}.py"), *flags]
        missing = peer != "plain" and importlib.util.find_spec(peer) is None
        problem = 'not installed: pip install -e ".[bench]"' if missing else ""
        return Row(name, [command], env=self.compiler(output, train), problem=problem, **row)

    def sides(self, *flags: object, **job) -> list[Row]:
        """The template in fp32 and, where it pays, bf16; without a cache; and the peers, as shipped and tuned."""
        rows = [self.template("template", *flags, baseline=True, **job)]
        if self.probe(job.get("train", "head"), job.get("epochs", self.args.epochs))["bf16"]:
            rows.append(self.template("template, bf16", *flags, bf16=True, baseline=True, **job))
        rows.append(self.template("template, uncached", "--cache-memory=0", reference=True, once=True, **job))
        return rows + [self.peer(peer, tuned=tuned, **job) for peer in self.args.peers for tuned in (False, True)]


def head(bench: Bench) -> list[Row]:
    """Head-only training on a folder of JPEGs, whole processes from start to end."""
    return bench.sides()


def first_epoch(bench: Bench) -> list[Row]:
    """One head-only epoch and its evaluation, nothing cached: what images that are augmented anew each time cost."""
    return bench.sides("--cache-memory=0", epochs=1)


def full(bench: Bench) -> list[Row]:
    """Full fine-tuning: all parameters train, and nothing can be cached."""
    return bench.sides(train="all")


def warm(bench: Bench) -> list[Row]:
    """A second run on the same photos; a sweep of 8 learning rates from an empty cache, one process after the other.

    A peer's second run is as its first, and its sweep takes 8 times that: one run is measured and multiplied.
    """
    sys.path.insert(0, str(ROOT))
    from trainer.config import flags

    disk, lr = bench.args.work / "cache", bench.args.lr
    use = [f"--cache-dir={disk}"] if "--cache-dir" in flags() else []
    if not use:
        bench.notes.append("train.py has no --cache-dir: each run of the template computes its features anew")
    bf16 = bench.probe("head", bench.args.epochs)["bf16"]
    clear = {"bf16": bf16, "prepare": lambda: shutil.rmtree(disk, ignore_errors=True)}
    rates = tuple(lr * factor for factor in (1, 0.1, 0.2, 0.5, 2, 5, 10, 20))
    peers = [(peer, tuned) for peer in bench.args.peers[:2] for tuned in (False, True)]
    return [
        bench.template("template, first run", *use, **clear),
        bench.template("template, second run", *use, bf16=bf16, baseline=True),
        bench.template("template, 8 rates", *use, lrs=rates, baseline=True, **clear),
        bench.template("template, uncached", "--cache-memory=0", reference=True, once=True),
        *(bench.peer(peer, tuned=tuned) for peer, tuned in peers),
        *(bench.peer(peer, ", 8 rates", tuned=tuned, factor=8, once=True) for peer, tuned in peers),
    ]


def scaling(bench: Bench) -> list[Row]:
    """Cost against the numbers of images, epochs and classes."""
    images, epochs, classes = bench.args.images, bench.args.epochs, bench.args.classes
    points = [(images // 4, epochs, classes), (images, epochs, classes), (images, epochs * 10, classes)]
    points += [(images, 1, classes), (images, epochs, 2), (images, epochs, min(100, images // 4))]
    rows, bf16 = [], bench.probe("head", epochs)["bf16"]
    for n, e, c in points:
        job = {
            "data": bench.photos(images=n, classes=c),
            "epochs": e,
            "group": f"{n:,} images, {e} epochs, {c} classes",
        }
        rows.append(bench.template("template", bf16=bf16, baseline=True, **job))
        if e <= epochs:  # what is not cached would take hours for more
            rows.append(bench.template("template, uncached", "--cache-memory=0", reference=True, once=True, **job))
            rows.append(bench.peer("plain", tuned=True, **job))
    return rows


def steps(bench: Bench) -> list[Row]:
    """A step of a linear head on ResNet-50 features, [64, 2048] to 10 classes, beyond its arithmetic.

    The usual Accelerate way: TensorDataset, DataLoader, `prepare`, a running sum of losses. The arithmetic alone
    (forward, backward, SGD on one batch) is timed in the same process, in turn, and taken off. Accuracy: of 2,000 rows.
    Unequal: the template also counts the training accuracy and checks each gradient; the order of samples differs.
    """
    bench.unit, quick = "µs", bench.args.quick
    flags = ["--images", 640 if quick else 6400, "--epochs", 5 if quick else 20]
    return [
        bench.part("template", "steps", "template", *flags, ours=True, baseline=True),
        bench.part("accelerate", "steps", "accelerate", *flags, reference=True),
    ]


def decode(bench: Bench) -> list[Row]:
    """From a JPEG to a row of a normalised float batch of 224 px, on one thread, in process.

    "Same": no pixel is further than 1 of 255 from the usual chain: PIL, resize, crop, float, normalise.
    """
    bench.unit, rows = "ms", []
    large = {"images": 6, "width": 4000, "height": 3000}
    for group, images in (("500 × 375", {"images": min(bench.args.images, 200)}), ("12 MP", large)):
        flags = ["--data", bench.photos(val=2, classes=2, **images), "--epochs", 3]
        rows.append(bench.part("template", "decode", "template", *flags, group=group, ours=True, baseline=True))
        rows.append(bench.part("PIL and float", "decode", "pil", *flags, group=group))
    return rows


def checkpoint(bench: Bench) -> list[Row]:
    """How long training waits for a checkpoint of a head-only run with AdamW, and its size: the median of several.

    "Same": a head gives the same logits again, bit for bit, once the file is loaded into it.
    Unequal: the template waits until the file is on the disk (fsync) and hashes it; the others leave it to the system.
    """
    bench.unit, saved = "ms", bench.args.work / "saved"
    flags = ["--model", bench.args.model, "--epochs", 3 if bench.args.quick else 10, "--output", saved]
    row = {"prepare": lambda: shutil.rmtree(saved, ignore_errors=True)}
    return [
        bench.part("template", "checkpoint", "template", *flags, ours=True, baseline=True, **row),
        bench.part("Accelerator.save_state", "checkpoint", "accelerate", *flags, **row),
        bench.part("torch.save of both state dicts", "checkpoint", "torch", *flags, **row),
    ]


def extract(bench: Bench) -> list[Row]:
    """Features of the training photos, one core a process. "ideal", divided by "two processes", is the efficiency.

    Ideal: two independent processes at once, each with all the photos, halved, as two cores are not always twice one.
    Accuracy: of the nearest class mean, on half of the features.
    """
    flags = ["--data", bench.photos(), "--weights", bench.weights(), "--model", bench.args.model]
    flags += ["--size", bench.args.size]
    return [
        bench.part("one process", "extract", "single", *flags, launch="cpu", ours=True, reference=True),
        bench.part("two processes", "extract", "two", *flags, launch="cpu_x2", ours=True, baseline=True),
        bench.part("ideal", "extract", "ideal", *flags, ours=True),
    ]


JOBS = {"head": head, "first-epoch": first_epoch, "warm": warm, "scaling": scaling, "full": full}
JOBS |= {"gpu-head": head, "gpu-full": full}  # skipped without one
CELLS = JOBS | {"steps": steps, "decode": decode, "checkpoint": checkpoint, "extract": extract}
USUAL = {"images": 1000, "val": 500, "classes": 10, "size": 224, "epochs": 10, "batch_size": 64, "repeats": 3}
QUICK = {"images": 48, "val": 24, "classes": 4, "size": 64, "epochs": 2, "batch_size": 16, "repeats": 1}
QUICK["peers"] = PEERS[:2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", choices=CELLS)
    parser.add_argument("--quick", action="store_true", help=f"to see that it runs: {QUICK}")
    for name, value in USUAL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {value}")
    parser.add_argument("--model", default="resnet18", help="one of torchvision's ResNets")
    parser.add_argument("--weights", type=Path, help="state dict of that model; default: one that the suite writes")
    parser.add_argument("--data", type=Path, help="folder with train/ and val/; default: photos that the suite writes")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--augment", choices=("none", "crop"), default="none")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default all; with --quick the first two")
    parser.add_argument("--shipped-epochs", type=int, help="run so many of a peer as shipped, count the rest like them")
    parser.add_argument("--template-flags", default="", help="more flags for train.py, in one string")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="photos, weights, runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the table")
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else USUAL | {"peers": PEERS}).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    for name in ("work", "data", "weights"):
        setattr(args, name, getattr(args, name) and getattr(args, name).absolute())
    if args.cell.startswith("gpu") and not gpu_name():
        print(f"{args.cell}: skipped, it needs a GPU")
        return 0
    load, bench = os.getloadavg()[0], Bench(args)
    rows = CELLS[args.cell](bench)
    measure(rows, args.repeats)
    if args.cell in JOBS:
        validation = sum(1 for _ in bench.photos().glob("val/*/*"))
        for found in (found for row in rows for found in row.found):
            found["samples"] = validation
        words = args.weights or "random weights, their BatchNorm measured on the photos (parts.py), for all sides"
        bench.notes.append(
            f"{args.model} at {args.size} px, {args.images:,} + {validation:,} JPEGs of {args.classes} classes from "
            f"{args.data or 'parts.py'}, {args.epochs} epochs, batch {args.batch_size}, SGD, rate {args.lr} falling "
            f"along a cosine, augmentation {args.augment}; {words}"
        )
    text = report(args.cell, bench, rows, load=load)
    print(text)
    if not args.quick:
        model = f"-{args.model}" if args.cell in JOBS else ""
        path = args.out / f"{args.cell}{model}_{hardware()[0]}_{datetime.date.today()}.md"
        path.write_text(text, encoding="utf-8")
        print(f"kept in {path}", file=sys.stderr)
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
