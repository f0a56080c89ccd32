"""Trackers that Accelerate knows, such as TensorBoard and wandb: start, continue after a resume, show a picture."""

import json
import os
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from trainer.config import flat
from trainer.storage import files
from trainer.trainer import Trainer

# What the run of a tracker calls its id; without one it is found by the name of the folder.
_ID = {"wandb": "id", "mlflow": "info.run_id", "aim": "hash", "comet_ml": "id", "clearml": "id", "swanlab": "id"}


def start(name: str, folder: Path, loop: Trainer) -> GeneralTracker:
    """Start one tracker, or continue what it has of this run, and hand it the settings.

    Args:
        name: of the tracker, as in `accelerate.tracking`.
        folder: of the run; `trackers.json` in it holds the ids of the trackers' own runs.
        loop: of the run; the settings are in its `about`.

    Raises:
        Exception: whatever a tracker raises.
    """
    runs = _known_runs(folder)
    if name == "tensorboard":
        # purge_step hides the points that a killed run logged after its last checkpoint. An epoch that is trained
        # and not finished is evaluated again, and has its points at the step of the checkpoint.
        evaluate_again = loop.samples == (loop.epoch + 1) * loop.plan.samples
        first = loop.step + (0 if evaluate_again else 1)
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=first if loop.step else None)
    else:
        settings = loop.about.get("config", {})
        data = Path(settings.get("data", {}).get("data", folder.name)).name  # no private folders
        place = [folder] if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory else []
        project = os.environ.get(f"{name.upper()}_PROJECT", data)
        options = tracker_options(name, folder, known=runs.get(name))
        tracker = LOGGER_TYPE_TO_CLASS[name](project, *place, **options)
    tracker.start()
    if name != "tensorboard":  # where settings would be a second run
        runs[name] = attrgetter(_ID[name])(tracker.tracker) if name in _ID else folder.name
        files.write_json(folder / "trackers.json", runs)
        tracker.store_init_configuration(_flat(settings))
    return tracker


def tracker_options(name: str, folder: Path, *, known: str | None) -> dict[str, Any]:
    """The `init_kwargs` of a tracker: names its run after the folder, or continues the run that is known there.

    Args:
        name: of the tracker.
        folder: of the run.
        known: id of the tracker's run that an earlier start of this run has written; None: a new one.
    """
    named = {
        "wandb": {"name": folder.name, "dir": folder},
        "mlflow": {"run_name": folder.name},
        "trackio": {"name": folder.name},
        "swanlab": {"name": folder.name, "log_dir": folder / "swanlab"},
        "clearml": {"task_name": folder.name, "reuse_last_task_id": False},
        "dvclive": {"dir": folder / "dvclive"},
    }
    again = {
        "wandb": {"id": known, "resume": "allow"},
        "mlflow": {"run_id": known},
        "trackio": {"resume": "allow"},
        "swanlab": {"id": known, "resume": "allow"},
        "clearml": {"reuse_last_task_id": known, "continue_last_task": 0},  # 0: steps are counted from the beginning
        "dvclive": {"resume": True},
        "comet_ml": {"experiment_key": known},
        "aim": {"run_hash": known},
    }
    return named.get(name, {}) | (again[name] if known else {})


def add_picture(tracker: Any, picture: Tensor, *, step: int) -> None:
    """Show uint8 `[3, H, W]` in a tracker, if Accelerate can show pictures there."""
    if tracker.name == "tensorboard":
        tracker.tracker.add_image("val/predictions", picture, step)
    elif hasattr(tracker, "log_images"):
        image = F.to_pil_image(picture)
        tracker.log_images({"val/predictions": image if tracker.name == "aim" else [image]}, step=step)


def _flat(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings without their groups, in types that all trackers take."""
    return {name: " ".join(value) if isinstance(value, list) else value for name, value in flat(settings).items()}


def _known_runs(folder: Path) -> dict[str, str]:
    """The ids by tracker that an earlier start of the run has written; none where they cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / "trackers.json").read_text(encoding="utf-8")))
    return {}
