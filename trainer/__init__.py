"""Fine-tune torchvision backbones with Accelerate: frozen trunk, live tail, exact resume.

The names below are the public interface. They are imported when first used, so that `import trainer`, and with it
`train.py --help`, does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.backbones import Backbone, InputSpec, build_model, model_names, restore
    from trainer.bad_images import check_images
    from trainer.data import Normalize, eval_transform, load_data, train_transform
    from trainer.errors import CheckpointError, DataError, NumericalError, UsageError
    from trainer.features import Features, Kept, Stream
    from trainer.freezing import FreezePlan, fingerprint, freeze, frozen_tensors, trained_tensors
    from trainer.loading import Loaded, load
    from trainer.logs import Logs
    from trainer.optim import build_optimizer, learning_rate
    from trainer.preemption import Preempted, Preemption
    from trainer.processes import (
        Elsewhere,
        agree,
        cores_per_process,
        fail,
        from_main,
        in_turn,
        run_and_exit,
        say,
        start,
    )
    from trainer.run import RunFolder, open_run
    from trainer.sampling import BatchPlan, KeyedDataset
    from trainer.split import Split, split_model
    from trainer.steps import classification
    from trainer.trainer import Trainer
    from trainer.trunk import FastTrunk
    from trainer.watch import Watch
    from trainer.weights import Match, Report

_HOME = {
    "backbones": ("Backbone", "InputSpec", "build_model", "model_names", "restore"),
    "bad_images": ("check_images",),
    "data": ("Normalize", "eval_transform", "load_data", "train_transform"),
    "errors": ("CheckpointError", "DataError", "NumericalError", "UsageError"),
    "features": ("Features", "Kept", "Stream"),
    "freezing": ("FreezePlan", "fingerprint", "freeze", "frozen_tensors", "trained_tensors"),
    "loading": ("Loaded", "load"),
    "logs": ("Logs",),
    "optim": ("build_optimizer", "learning_rate"),
    "preemption": ("Preempted", "Preemption"),
    "processes": (
        "Elsewhere",
        "agree",
        "run_and_exit",
        "cores_per_process",
        "fail",
        "from_main",
        "in_turn",
        "say",
        "start",
    ),
    "run": ("RunFolder", "open_run"),
    "sampling": ("BatchPlan", "KeyedDataset"),
    "split": ("Split", "split_model"),
    "steps": ("classification",),
    "trainer": ("Trainer",),
    "trunk": ("FastTrunk",),
    "watch": ("Watch",),
    "weights": ("Match", "Report"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
