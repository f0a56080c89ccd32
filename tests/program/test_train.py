"""The program as people run it: real processes, real files."""

import json
import os
import shutil

import pytest
import torch
import yaml
from launching import ROOT, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import models

from trainer.storage import checkpoint

TRAIN = ROOT / "train.py"
SMALL = ["--model", "resnet18", "--weights", "none", "--image-size", "32", "--batch-size", "16", "--micro-batch", "4"]
SMALL += ["--augment", "crop", "--lr", "1e-3"]  # nothing is searched for


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The first command of the README; gives the folder it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = launch(TRAIN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_demo_reaches_97_percent_and_says_what_it_does(demo):
    folder, output = demo
    run = folder / "runs" / "digits-resnet18"
    assert "random weights" in output
    assert "head: 5,130 of 11,181,642 parameters train (0.05%)" in output
    assert "cut before fc" in output
    assert "batch 64 = micro-batch 64 × 1 process × accumulation 1; 1,438 images = 23 steps" in output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val"]["accuracy"] >= 0.97
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"]["model"], config["data"]["augment"]) == ("resnet18", "none")
    chosen = json.loads((run / "search.json").read_text())["chosen"]
    assert {name: config["optim"][name] for name in chosen} == chosen
    assert [line["epoch"] for line in lines] == list(range(1, chosen["epochs"] + 1))
    assert f"search  lr {chosen['lr']:.3g}, weight decay {chosen['weight_decay']:.3g}, " in output


def test_the_demo_leaves_small_checkpoints_that_torch_reads(demo):
    checkpoints = demo[0] / "runs" / "digits-resnet18" / "checkpoints"
    epochs = yaml.safe_load((checkpoints.parent / "config.yaml").read_text())["optim"]["epochs"]
    steps = [f"step-{23 * epoch:08}.pt" for epoch in (epochs - 1, epochs)]
    assert sorted(os.listdir(checkpoints)) == ["best.pt", *steps]
    for path in checkpoints.iterdir():
        assert path.stat().st_size < 200_000
        state = torch.load(path, weights_only=True)
        assert state["model"].keys() == {"fc.weight", "fc.bias"}
        assert state["optimizer"]["state"].keys() == {"fc.weight", "fc.bias"}
    state = checkpoint.read(checkpoints / steps[1])
    assert (state["epoch"], state["step"], state["samples"]) == (epochs, 23 * epochs, 1438 * epochs)
    assert state["classes"] == [str(digit) for digit in range(10)]
    best = torch.load(checkpoints / "best.pt", weights_only=True)["metrics"]["val"]["accuracy"]
    assert best == state["metrics"]["best"]["accuracy"] >= state["metrics"]["val"]["accuracy"]


def test_the_demo_can_be_watched_in_tensorboard(demo):
    events = EventAccumulator(str(demo[0] / "runs" / "digits-resnet18" / "tensorboard")).Reload()
    tags = {
        "train/loss",
        "train/accuracy",
        "val/loss",
        "val/accuracy",
        "lr",
        "images_per_second",
        "step/loss",
        "step/lr",
    }
    assert tags <= set(events.Tags()["scalars"])
    lines = (demo[0] / "runs" / "digits-resnet18" / "metrics.jsonl").read_text().splitlines()
    assert len(events.Scalars("val/accuracy")) == len(lines)
    assert events.Tags()["images"] == ["val/predictions"]


def test_resuming_a_finished_run_trains_nothing_and_says_so(demo, program):
    folder, _ = demo
    run = folder / "runs" / "digits-resnet18"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = program("--resume", "auto", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "finished already: nothing to train" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_folder_that_holds_a_run_is_refused(demo, program):
    folder, _ = demo
    done = program("--output", "runs/digits-resnet18", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/digits-resnet18 holds a run. Continue it with --resume auto")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def four_epochs(photos, program, tmp_path_factory):
    """Four epochs on a folder of JPEGs, with augmentation, in worker processes; two updates of 16 = 4 × 4 an epoch."""
    folder = tmp_path_factory.mktemp("four")
    options = ["--data", photos, *SMALL, "--epochs", "4", "--keep", "4", "--workers", "2", "--output", "run"]
    done = program(*options, "--train", "layer4.1", "fc", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_changed_seed_has_other_images_or_another_base_and_is_refused(demo, four_epochs, program, tmp_path):
    split = demo[0] / "runs" / "digits-resnet18"
    for run, says in ((split, "have other names or labels"), (four_epochs, "conv1.weight: expected sha256")):
        shutil.copytree(run, tmp_path / run.name)
        again = ["--resume", tmp_path / run.name, "--epochs", "50", "--seed", "1"]
        done = program(*again, cwd=tmp_path)
        assert done.returncode == 2
        assert "the run has seed 0, and --seed is 1" in done.stderr
        done = program(*again, "--override", cwd=tmp_path)
        assert done.returncode == 65
        assert says in done.stderr
    assert "the frozen part of this model is not the one the checkpoint was trained on" in done.stderr


def _tensors(path):
    state = checkpoint.read(path)
    tensors = dict(state["model"])
    for name, values in state["optimizer"]["state"].items():
        tensors |= {f"{name}:{key}": value for key, value in values.items()}
    return tensors


def test_two_and_two_epochs_are_four_to_the_bit(four_epochs, program, tmp_path):
    second = checkpoint.steps(four_epochs / "checkpoints")[1]
    done = program("--resume", second, "--output", tmp_path / "again", "--workers", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 2 of 4 done, step 8" in done.stdout
    assert "workers: 2 → 0" in done.stdout
    last = checkpoint.steps(four_epochs / "checkpoints")[-1].name
    left, right = (_tensors(run / "checkpoints" / last) for run in (four_epochs, tmp_path / "again"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    lines = [json.loads(line) for line in (four_epochs / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    for line in (*lines, *again):
        del line["images_per_second"]
    assert again == lines[2:]


def test_kept_features_train_the_weights_of_streamed_ones_to_the_bit(photos, program, tmp_path):
    """All forwards have 10 images here; a forward of another size can have other last bits."""
    options = ["--data", photos, *SMALL, "--augment", "none", "--exact", "--epochs", "3", "--batch-size", "20"]
    options += ["--micro-batch", "10", "--workers", "0"]
    kept = {"none": ["--cache-memory", "0"], "memory": [], "file": ["--cache-memory", "1e-9"]}
    kept |= {name: ["--cache-dir", tmp_path / "cache"] for name in ("written", "found")}
    found, lines = {}, {}
    for name, more in kept.items():
        done = program(*options, *more, "--output", name, processes=2 if name == "found" else 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("features found in") == (2 if name == "found" else 0)
        assert not (tmp_path / name / "features").exists()
        found[name] = _tensors(checkpoint.newest(tmp_path / name / "checkpoints")[0])
        lines[name] = (tmp_path / name / "metrics.jsonl").read_text()
        lines[name] = [line.partition('"images_per_second"')[0] for line in lines[name].splitlines()]
    for name in kept:
        assert lines[name] == lines["none"]
        assert all(torch.equal(tensor, found["none"][key]) for key, tensor in found[name].items())


def test_a_run_can_be_lengthened_in_place(four_epochs, program, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(four_epochs, run)
    done = program("--resume", "auto", "--output", run, "--epochs", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resume: epochs: 4 → 5" in done.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [4, 8, 12, 16, 20]


@pytest.mark.slow
def test_a_run_that_does_not_get_better_stops_early_and_stays_stopped(photos, program, tmp_path):
    options = ["--data", photos, *SMALL, "--epochs", "50", "--lr", "1e-9", "--patience", "2", "--workers", "0"]
    done = program(*options, "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = checkpoint.read(tmp_path / "run" / "checkpoints" / "best.pt")["epoch"]
    assert f"done: best validation epoch {best} (stopped early: no better one since): accuracy " in done.stdout
    assert best == 1 + max(range(len(lines)), key=lambda number: lines[number]["val"]["accuracy"])
    assert len(lines) == best + 2
    again = program("--resume", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout


@pytest.mark.slow
def test_the_best_checkpoint_goes_with_the_run(four_epochs, program, tmp_path):
    """Continued elsewhere it is copied; continued from before the best epoch, another one is the best."""
    first, *_, last = checkpoint.steps(four_epochs / "checkpoints")
    before = four_epochs / "checkpoints" / "best.pt"
    assert checkpoint.read(before)["epoch"] > 1
    for source, kept in ((last, True), (first, False)):
        run = tmp_path / source.stem
        done = program("--resume", source, "--output", run, "--epochs", "5", "--lr", "1e-12", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        state = checkpoint.read(run / "checkpoints" / "best.pt")
        assert state["epoch"] == checkpoint.newest(run / "checkpoints")[1]["metrics"]["best"]["epoch"]
        assert (before.read_bytes() == (run / "checkpoints" / "best.pt").read_bytes()) == kept
        best = f"best validation epoch {state['epoch']}: accuracy {state['metrics']['val']['accuracy']:.4f}, loss "
        assert f"done: {best}" in done.stdout


def test_config_yaml_repeats_the_run(four_epochs, program, tmp_path):
    done = program(
        "--config", four_epochs / "config.yaml", "--epochs", "1", "--output", tmp_path / "again", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    settings, again = (yaml.safe_load((run / "config.yaml").read_text()) for run in (four_epochs, tmp_path / "again"))
    assert again == {**settings, "optim": {**settings["optim"], "epochs": 1}}


def test_two_processes_train_to_the_same_result_and_write_one_checkpoint(photos, program, tmp_path):
    """The head alone: a BatchNorm that trains sees other batches on another number of processes."""
    options = ["--data", photos, *SMALL, "--epochs", "2", "--optimizer", "sgd"]  # AdamW would hide a wrong scale
    one = program(*options, "--output", "one", cwd=tmp_path)
    two = launch(TRAIN, *options, "--output", "two", cwd=tmp_path, config="cpu_x2")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert "micro-batch 4 × 2 processes × accumulation 2" in two.stdout
    assert two.stdout.count("epoch 1/2") == 1, "one process speaks"
    assert sorted(os.listdir(tmp_path / "two" / "checkpoints")) == sorted(os.listdir(tmp_path / "one" / "checkpoints"))
    left, right = (_tensors(tmp_path / run / "checkpoints" / "step-00000008.pt") for run in ("one", "two"))
    for name, value in left.items():
        assert ((value - right[name]).norm() / value.norm().clamp(min=1e-12)).item() < 1e-5, name
    metrics = [
        checkpoint.read(tmp_path / run / "checkpoints" / "step-00000008.pt")["metrics"] for run in ("one", "two")
    ]
    assert metrics[0]["val"]["accuracy"] == metrics[1]["val"]["accuracy"]

    on = program("--resume", "auto", "--output", "two", "--epochs", "3", cwd=tmp_path, processes=2)
    assert on.returncode == 0, on.stderr
    assert "epoch 2 of 3 done, step 8" in on.stdout


@pytest.fixture(scope="module")
def from_a_file(photos, program, tmp_path_factory):
    """Two epochs over half of a file, by a plan in a file; gives the folder."""
    folder = tmp_path_factory.mktemp("file")
    stock = models.squeezenet1_1().state_dict()
    torch.save({"ema": {f"module.{k}": v for k, v in stock.items() if "features.1" not in k}}, folder / "part.pt")
    (folder / "plan.yaml").write_text("rules: [{freeze: '*.bias'}, {train: ['features[-1:]', head]}]")
    options = ["--data", photos, *SMALL, "--model", "squeezenet1_1", "--epochs", "2", "--workers", "0"]
    options += ["--weights", "part.pt", "--weights-match", "shape", "--weights-coverage", "0.3"]
    done = program(*options, "--train", "@plan.yaml", "--output", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_from_part_of_a_file_by_a_plan_says_so(from_a_file):
    folder, output = from_a_file
    report = json.loads((folder / "run" / "weights_report.json").read_text())
    assert f"weights {folder / 'part.pt'}: {int(1000 * report['coverage']) / 10:g}% of the parameters" in output
    assert f"{len(report['loaded'])} loaded, {len(report['missing'])} missing, 2 set aside" in output
    assert "train   freeze:*.bias features[-1:] head:" in output
    settings = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert settings["model"]["train"] == ["freeze:*.bias", "features[-1:]", "head"]
    assert (settings["weights"]["weights"], settings["weights"]["weights_match"]) == (str(folder / "part.pt"), "shape")


def test_it_goes_on_to_the_bit_without_the_plan_file(from_a_file, program, tmp_path):
    folder, _ = from_a_file
    (folder / "plan.yaml").unlink(missing_ok=True)
    first, last = checkpoint.steps(folder / "run" / "checkpoints")
    done = program("--resume", first, "--output", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    left, right = _tensors(last), _tensors(tmp_path / "again" / "checkpoints" / last.name)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert "classifier.1.bias" not in left


def test_its_frozen_names_and_its_checkpoint_serve_another_run(from_a_file, photos, program, tmp_path):
    run = from_a_file[0] / "run"
    edited = json.loads((run / "freeze_plan.json").read_text())
    edited["rules"][0]["freeze"].remove("classifier.1.bias")
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    options = ["--data", photos, *SMALL, "--model", "squeezenet1_1", "--epochs", "1", "--seed", "9", "--workers", "0"]
    options += ["--weights", run / "checkpoints" / "best.pt", "--train", "@plan.json", "--output", "next"]
    done = program(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best.pt: 100% of the parameters outside the head; tensors: 52 loaded\n" in done.stdout
    state = checkpoint.read(tmp_path / "next" / "checkpoints" / "best.pt")
    before = checkpoint.read(run / "checkpoints" / "best.pt")
    assert set(state["freeze_plan"]["trainable"]) == {*before["freeze_plan"]["trainable"], "classifier.1.bias"}
    assert state["fingerprint"].items() <= before["fingerprint"].items()


MISTAKES = [
    (["--data", "no/such/folder"], 2, "no/such/folder"),
    (["--model", "resnet19"], 2, "resnet18"),
    (["--train", "layer9"], 2, "--train 'layer9' matches no parameter of ResNet"),
    (["--weights", "no/such/file.pt"], 2, "no/such/file.pt"),
    (["--batch-size", "60", "--micro-batch", "16"], 2, "batch_size can be 48 or 64"),
    (["--image-size", "8", "--model", "vgg11"], 2, "pixels"),
    (["--output", "/proc/nothing"], 74, "/proc/nothing"),
    (["--weights", str(ROOT / "README.md")], 65, "as weights"),
    (["--train", f"@{ROOT / 'README.md'}"], 2, "README.md"),
    (["--train", "freeze:all"], 2, "nothing to train"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), MISTAKES, ids=lambda value: str(value))
def test_a_mistake_is_one_message_and_nothing_else(program, tmp_path, arguments, code, says):
    done = program(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [["--check-frozen", "1"], []])
def test_a_frozen_weight_that_moves_ends_the_run(program, tmp_path, options):
    """The program with one line of the kind that people add by mistake."""
    code = TRAIN.read_text().replace("logs.after_step(loop)", "logs.after_step(loop); model.bn1.running_var += 1")
    (tmp_path / "train.py").write_text(code)
    options += ["--epochs", "1", "--image-size", "32", "--output", "run"]
    done = program(*options, target=tmp_path / "train.py", cwd=tmp_path)
    assert done.returncode != 0
    step = 1 if "--check-frozen" in options else 23
    assert f"error: after step {step} the frozen bn1.running_var is not what it was at the start" in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", step)


def test_an_image_that_cannot_be_read_is_named(photos, program, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "train" / "down" / "000.jpg").write_bytes(b"not an image")
    done = program("--data", tmp_path / "photos", *SMALL, "--workers", "1", cwd=tmp_path)
    assert done.returncode == 65
    assert "down/000.jpg" in done.stderr
    assert "Traceback" not in done.stderr


def test_fp16_on_a_cpu_is_refused_with_the_alternatives(program, tmp_path):
    done = program(cwd=tmp_path, env={"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: mixed_precision fp16 needs a GPU")
    assert "bf16" in done.stderr


def test_a_failed_start_keeps_the_run_that_was_to_be_overwritten(demo, program, tmp_path):
    shutil.copytree(demo[0] / "runs", tmp_path / "runs")
    before = sorted(path.name for path in (tmp_path / "runs").rglob("*"))
    done = program("--output", "runs/digits-resnet18", "--overwrite", "--train", "layer9", cwd=tmp_path)
    assert done.returncode == 2
    assert sorted(path.name for path in (tmp_path / "runs").rglob("*")) == before


IN_ONE_PROCESS = """
import os, signal, train, trainer
from trainer.cli import parse
def call(*arguments):
    try:
        train.main(parse(train.__doc__, ["--epochs", "1", "--output", *arguments]))
    except trainer.UsageError as error:
        print("refused:", error)
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return handlers, sorted(os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")[:-1])
first = [call("a"), call("b"), call("a"), call("a", "--resume", "auto")]
assert all(one == first[0] for one in first), first
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print("all as before", flush=True)
os._exit(0)
"""


def test_a_run_leaves_no_file_open_and_no_handler_in_its_process(program, tmp_path):
    """Two runs, one that is refused, and one that is finished already."""
    done = program(cwd=tmp_path, setup=IN_ONE_PROCESS)
    assert done.stdout.endswith("all as before\n"), done.stderr
    assert "refused: a holds a run" in done.stdout
    assert "finished already" in done.stdout


def test_the_plan_of_a_resumed_run_counts_the_epochs_to_come(four_epochs, program, tmp_path):
    second = checkpoint.steps(four_epochs / "checkpoints")[1]
    setup = "import trainer\nold = trainer.Features.__init__\ndef told(self, *a, **k):\n"
    setup += "    print('epochs:', k['epochs'])\n    old(self, *a, **k)\ntrainer.Features.__init__ = told"
    done = program("--resume", second, "--output", "again", cwd=tmp_path, setup=setup)
    assert "epochs: 2\n" in done.stdout, done.stderr
