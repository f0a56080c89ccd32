"""What a run leaves for people to look at."""

import json
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensors import Tensors

from trainer import config as settings
from trainer.data.loader import KeyedDataset
from trainer.errors import UsageError
from trainer.logs import Logs, append_metrics, prediction_grid, rewind_metrics
from trainer.metrics import Totals
from trainer.recipe import prediction
from trainer.trackers import tracker_options
from trainer.trunk.features import CachedFeatures


def _loop(step: int, *, of_epoch: int) -> SimpleNamespace:
    """A Trainer after `step` steps, `of_epoch` an epoch, of 4 samples each; the loss of a step is its number."""
    loop = SimpleNamespace(step=step, epoch=step // of_epoch, epochs=5, rate=0.5, samples=4 * step, metrics={})
    loop.about = {"config": {"data": {"data": "/home/me/photos", "augment": "none"}, "model": {"train": ["head"]}}}
    loop.accelerator, loop.totals = Accelerator(cpu=True), Totals(torch.device("cpu"))
    loop.plan = SimpleNamespace(samples=4 * of_epoch, batch_size=4, steps_per_epoch=of_epoch)
    for number in range(loop.epoch * of_epoch + 1, step + 1):  # the sums come from the checkpoint
        loop.totals.add({"loss": torch.full((4,), float(number))})
    return loop


def _train(logs: Logs, loop: SimpleNamespace, steps: int) -> None:
    of_epoch, first = loop.plan.steps_per_epoch, loop.step
    for step in range(first, steps):
        if step % of_epoch == 0 or step == first:
            loop.epoch = step // of_epoch
            loop.totals = loop.totals if step % of_epoch else Totals(torch.device("cpu"))
            logs.start_epoch(loop)
        loop.totals.add({"loss": torch.full((4,), float(step + 1))})
        loop.step, loop.samples = step + 1, 4 * (step + 1)
        logs.after_step(loop)


def _end_epoch(logs: Logs, loop: SimpleNamespace, *, best: bool = False) -> None:
    loop.epoch += 1
    loop.metrics = {"train": {"loss": 2.0}, "val": {"loss": 1.0, "accuracy": 0.5}}
    logs.end_epoch(loop, best=best)


@pytest.mark.parametrize("saved", [7, 9, 10, 11, 12, 13, 18])
def test_an_interrupted_run_has_the_curve_of_one_that_was_not(tmp_path, saved):
    """Killed after 19 steps, resumed from a checkpoint before: each point once, each of its step alone."""
    loop = _loop(0, of_epoch=12)
    logs = Logs(loop, tmp_path, every=5)
    _train(logs, loop, 19)
    logs.accelerator.get_tracker("tensorboard", unwrap=True).flush()  # and no end: it was killed
    loop = _loop(saved, of_epoch=12)
    with Logs(loop, tmp_path, every=5) as logs:
        _train(logs, loop, 30)
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("step/loss")
    assert [(point.step, point.value) for point in points] == [(step, float(step)) for step in (5, 10, 15, 20, 25, 30)]


def test_an_epoch_that_is_evaluated_again_has_one_point_and_one_line(tmp_path):
    """Killed after the evaluation, and resumed from a checkpoint after the last step of the epoch."""
    loop = _loop(0, of_epoch=4)
    logs = Logs(loop, tmp_path, every=3)
    _train(logs, loop, 4)
    _end_epoch(logs, loop)
    logs.accelerator.get_tracker("tensorboard", unwrap=True).flush()
    loop = _loop(4, of_epoch=4)
    loop.epoch = 0
    with Logs(loop, tmp_path, every=3) as logs:
        logs.start_epoch(loop)
        _end_epoch(logs, loop)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("val/loss")] == [4]
    assert [point.step for point in events.Scalars("step/loss")] == [3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_epoch_is_one_line_on_the_console_and_one_in_a_file(tmp_path, capsys):
    loop = _loop(0, of_epoch=4)
    with Logs(loop, tmp_path) as logs:
        _train(logs, loop, 4)
        _end_epoch(logs, loop, best=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch 1/5  train loss 2.0000  val loss 1.0000 accuracy 0.5000  lr 5.00e-01  ")
    assert line.endswith(" s  best")
    entry = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert entry.pop("images_per_second") > 0
    assert entry == {"epoch": 1, "step": 4, "lr": 0.5, **loop.metrics}


def test_each_kind_of_error_is_reported_once_and_changes_nothing(tmp_path, caplog):
    loop = _loop(0, of_epoch=12)
    logs = Logs(loop, tmp_path, every=1)

    def full(*_, step, **__):
        raise OSError(28, "No space left on device") if step % 2 else RuntimeError("no tracker")

    logs.accelerator.trackers[0].log = full
    _train(logs, loop, 6)
    assert [record.message for record in caplog.records] == [
        f"cannot write logs to {tmp_path}, training goes on: OSError: [Errno 28] No space left on device",
        f"cannot write logs to {tmp_path}, training goes on: RuntimeError: no tracker",
    ]


def test_metrics_are_rewound_to_an_epoch(tmp_path):
    rewind_metrics(tmp_path, epoch=1)
    assert list(tmp_path.iterdir()) == [], "nothing to rewind"
    for epoch in (1, 2, 3):
        append_metrics(tmp_path, {"epoch": epoch, "lr": 0.1})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text('{"lr": 1}\n[1]\nnull\n\n{"epoch": "x"}\n' + "".join(lines) + '{"epoch": 1')  # torn by a kill
    rewind_metrics(tmp_path, epoch=2)
    assert path.read_text() == "".join(lines[:2])
    rewind_metrics(tmp_path, epoch=0)
    assert path.read_text() == ""


def test_a_grid_frames_each_image_and_says_what_it_is_taken_for():
    images = torch.full((10, 3, 20, 30), 128, dtype=torch.uint8)
    captions = [("cat 99.9%", True, "cat")] * 9 + [("cat 99.9%", False, "a very long name of a class")]
    grid = prediction_grid(images, captions)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * (128 + 36 + 4) + 4, 8 * (128 + 4) + 4)  # two rows of at most eight
    green, red = (26, 127, 55), (207, 34, 46)
    assert tuple(grid[:, 5, 5].tolist()) == green
    assert tuple(grid[:, 168 + 5, 132 + 5].tolist()) == red
    below = grid[:, 168 + 4 + 128 : 168 + 4 + 164]  # the captions of the second row
    assert (below[:, 18:, 4:132] == 255).all(), "a right one has no truth"
    assert (below[:, 18:, 136:264] == 0).any()


def test_of_several_views_the_first_is_shown():
    views = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (200, 0)])  # [V, 3, S, S]
    grid = prediction_grid(views[None], [("one", True, "")])
    assert torch.equal(grid, prediction_grid(views[None, 0], [("one", True, "")]))


def _shown(folder, images, labels, outputs, classes, monkeypatch) -> list[list[tuple[str, bool, str]]]:
    """The captions of the pictures that `show_predictions` makes."""
    captions = []
    grid = lambda pixels, some: captions.append(some) or prediction_grid(pixels, some)  # noqa: E731
    monkeypatch.setattr("trainer.logs.prediction_grid", grid)
    loop, source = _loop(0, of_epoch=4), CachedFeatures((outputs,), torch.tensor(labels))
    loop.outputs = lambda source, some: next(source.batches([some], epoch=0))["inputs"][0]
    with Logs(loop, folder) as logs:
        dataset = KeyedDataset(Tensors(images, labels), lambda image: image, seed=0)
        logs.show_predictions(loop, source, dataset, classes, prediction)
    return captions


def test_predictions_are_shown_with_the_truth(tmp_path, monkeypatch):
    images, labels = torch.zeros(40, 3, 8, 8, dtype=torch.uint8), [index % 2 for index in range(40)]
    outputs = torch.tensor([[9.0, 0.0]] * 40)
    (captions,) = _shown(tmp_path, images, labels, outputs, ["cat", "dog"], monkeypatch)
    assert len(captions) == 32, "spread over the whole set"
    assert captions[:2] == [("cat 100.0%", True, "cat"), ("cat 100.0%", False, "dog")]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["val/predictions"]


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 5, 8, 8), (4, 2, 3, 8, 8)])
def test_images_of_any_shape_are_shown(tmp_path, monkeypatch, shape):
    images = torch.randint(0, 65535, shape, dtype=torch.int32)
    (captions,) = _shown(tmp_path, images, [0, 1] * 2, torch.rand(4, 2), ["cat", "dog"], monkeypatch)
    assert len(captions) == 4


def _tracked_twice(folder, name: str) -> list[str]:
    """A run of 12 steps with a picture, and its continuation to step 24; the ids of the tracker's run."""
    loop, ids = _loop(0, of_epoch=12), []
    for steps in (12, 24):
        with Logs(loop, folder, track=("tensorboard", name), every=5) as logs:
            assert [tracker.name for tracker in logs.accelerator.trackers] == ["tensorboard", name]
            _train(logs, loop, steps)
            loop.outputs = lambda source, some: torch.tensor([[9.0, 0.0]] * len(some))
            images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
            dataset = KeyedDataset(Tensors(images, [0, 1] * 2), lambda image: image, seed=0)
            logs.show_predictions(loop, [0] * 4, dataset, ["cat", "dog"], prediction)
            assert not logs._broken
        ids.append(json.loads((folder / "trackers.json").read_text())[name])
        loop = _loop(12, of_epoch=12)
    return ids


def test_a_run_in_wandb_is_continued(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second = _tracked_twice(tmp_path, "wandb")
    assert first == second
    parts = sorted(path.name for path in tmp_path.glob(f"wandb/offline-run-*-{first}/*.wandb"))
    assert parts == [f"run-{first}.wandb"] * 2, "the two parts of one run, for `wandb sync`"
    assert len(list(tmp_path.glob("wandb/offline*/files/media/images/val/predictions_*.png"))) == 2


def test_a_run_in_mlflow_is_continued(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    first, second = _tracked_twice(tmp_path, "mlflow")
    assert first == second
    (run,) = tmp_path.glob(f"store/*/{first}")
    points = [line.split() for line in (run / "metrics/step/loss").read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step in points] == [(step, step) for step in (5, 10, 15, 20)]
    assert (run / "params/data").read_text() == "/home/me/photos"
    assert (run / "params/train").read_text() == "head"


def test_every_tracker_of_accelerate_can_be_named_and_continued(tmp_path):
    names = set(get_args(settings.Tracker)) - {"none"}
    assert names == set(LOGGER_TYPE_TO_CLASS)
    for name in names - {"tensorboard"}:
        assert tracker_options(name, tmp_path, known="7") != tracker_options(name, tmp_path, known=None)


def test_an_overwritten_run_is_a_new_one_for_trackers(tmp_path):
    (tmp_path / "trackers.json").write_text('{"wandb": "old"}')
    Logs(_loop(0, of_epoch=4), tmp_path, track=("none",))
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_whose_package_is_missing_is_an_error_before_any_work(program, tmp_path):
    done = program("--track", "comet_ml", "--output", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "--track comet_ml needs a package that is not installed: pip install comet_ml" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_none_is_no_tracker_beside_others():
    both = settings.replace(settings.Config(), track=("none", "tensorboard"))
    with pytest.raises(UsageError, match="--track none tensorboard: expected none alone"):
        settings.check(both)


def test_without_a_terminal_progress_is_a_line_a_minute(tmp_path, monkeypatch, capsys):
    loop, clock = _loop(0, of_epoch=12), iter(range(0, 10_000, 7))
    monkeypatch.setattr("trainer.logs.time", SimpleNamespace(perf_counter=lambda: next(clock)))  # 7 s a step
    with Logs(loop, tmp_path, track=("none",)) as logs:
        _train(logs, loop, 12)
    printed = capsys.readouterr()
    assert printed.out == "epoch 1/5  step 9 of 12  loss 5.0000  images/s 1\n"
    assert printed.err == ""


def test_a_terminal_and_a_notebook_have_a_bar(tmp_path, monkeypatch, capsys):
    for terminal, notebook in ((True, False), (False, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr("trainer.logs._IN_NOTEBOOK", notebook)
        loop = _loop(0, of_epoch=12)
        with Logs(loop, tmp_path, track=("none",)) as logs:
            _train(logs, loop, 2)
            assert not logs._bar.disable
            logs._bar.close()
        assert "\r" in capsys.readouterr().err
