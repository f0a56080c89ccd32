"""What a run leaves for people to look at."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.logs import Logs, prediction_grid
from trainer.metrics import Totals


def _train(logs: Logs, steps: range, *, of_epoch: int) -> None:
    """As a Trainer would: `of_epoch` steps an epoch of 4 samples each, the loss of a step is its number."""
    loop = SimpleNamespace(step=steps.start, epoch=0, rate=0.5, totals=Totals(torch.device("cpu")))
    loop.plan = SimpleNamespace(samples=4 * of_epoch, batch_size=4, steps_per_epoch=of_epoch)
    for step in range(steps.start // of_epoch * of_epoch + 1, steps.start + 1):  # the sums come from the checkpoint
        loop.totals.add({"loss": torch.full((4,), float(step))})
    loop.samples = 4 * loop.step
    for step in steps:
        if step % of_epoch == 0 or step == steps.start:
            loop.epoch = step // of_epoch
            loop.totals = loop.totals if step % of_epoch else Totals(torch.device("cpu"))
            logs.start_epoch(loop)
        loop.totals.add({"loss": torch.full((4,), float(step + 1))})
        loop.step, loop.samples = step + 1, 4 * (step + 1)
        logs.after_step(loop)


@pytest.mark.parametrize("saved", [7, 9, 10, 11, 12, 13, 18])
def test_an_interrupted_run_has_the_curve_of_one_that_was_not(tmp_path, saved):
    """Killed after 19 steps, resumed from a checkpoint before: each point once, each of its step alone."""
    logs = Logs(Accelerator(cpu=True), tmp_path, epochs=5, step=0, every=5)
    _train(logs, range(19), of_epoch=12)
    logs.accelerator.get_tracker("tensorboard", unwrap=True).flush()  # and no end: it was killed
    logs = Logs(Accelerator(cpu=True), tmp_path, epochs=5, step=saved, every=5)
    _train(logs, range(saved, 30), of_epoch=12)
    logs.close()
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("step/loss")
    assert [(point.step, point.value) for point in points] == [(step, float(step)) for step in (5, 10, 15, 20, 25, 30)]


def test_logs_that_cannot_be_written_are_reported_once_and_change_nothing(tmp_path, caplog):
    logs = Logs(Accelerator(cpu=True), tmp_path, epochs=1, step=0, every=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    logs.accelerator.log = full
    _train(logs, range(5), of_epoch=12)
    assert [record.message for record in caplog.records if "No space" in record.message] == [
        f"cannot write logs to {tmp_path}, training goes on: OSError: [Errno 28] No space left on device"
    ]


def test_a_grid_frames_each_image_and_says_what_it_is_taken_for():
    images = torch.full((10, 3, 20, 30), 128, dtype=torch.uint8)
    logits = torch.tensor([[9.0, 0.0]] * 10)
    grid = prediction_grid(images, [0] * 9 + [1], logits, ["cat", "a very long name of a class"])
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * (128 + 36 + 4) + 4, 8 * (128 + 4) + 4)  # two rows of at most eight
    green, red = (26, 127, 55), (207, 34, 46)
    assert tuple(grid[:, 5, 5].tolist()) == green
    assert tuple(grid[:, 168 + 5, 132 + 5].tolist()) == red
