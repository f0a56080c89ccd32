"""The contents of a checkpoint: one `State`, for the writer, the reader, the verifier and the tests."""

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.errors import CheckpointError

FORMAT = 1


@dataclass(kw_only=True)
class State:
    """Everything that a checkpoint holds: plain types and tensors. The file is a dict with the names of these fields.

    A field with a default may be missing in a file, because earlier versions did not write it.
    """

    model: dict[str, Tensor]
    """Trainable parameters, and buffers that training can change, by the model's own names."""
    optimizer: dict[str, Any]
    """{"kind": "AdamW", "state": {parameter name: {"exp_avg": tensor, ...}}}; see `optimizer_state`."""
    scaler: dict[str, Any] | None
    """The state of the GradScaler; None without one."""
    epoch: int
    """Finished epochs."""
    step: int
    """Optimizer updates."""
    samples: int
    """Training samples used, counted over all epochs."""
    skipped_samples: int
    """Those of `samples` whose update was skipped by the GradScaler."""
    training_samples: int
    """Samples in one epoch, the unit in which progress is counted."""
    totals: dict[str, Any]
    """Sums of the metrics over the samples used in the unfinished epoch; empty between two epochs."""
    metrics: dict[str, Any]
    """{"train": {...}, "val": {...}, "best": {...}} of the last finished epoch."""
    fingerprint: dict[str, str]
    """{name: sha256} of the frozen tensors, which the file does not hold."""
    freeze_plan: dict[str, Any]
    """{"train": rules, "trainable": parameter names}."""
    classes: list[Any]
    """Names of the classes, in the order of the model's outputs; empty if there are none."""
    data: dict[str, Any]
    """{"training": digest, "validation": digest, "skipped": [keys of omitted training images, validation images]}."""
    base: dict[str, Any]
    """Where the pretrained weights come from; see `Classifier.base`."""
    config: dict[str, Any]
    """The settings of the run, by group."""
    compute: dict[str, Any]
    """What decides the last digits: {"device": type, "precision": of autocast, "micro_batch": images, "trunk_batch":
    images in one forward of the trunk in evaluations, ...}."""
    recipe: dict[str, list[str]] = field(default_factory=dict)
    """{name of a recipe function: [its qualified name, sha256 of its source]}."""
    decided: dict[str, Any] = field(default_factory=dict)
    """What the run decided itself, such as the name of the default weights, or whether the trunk was compiled."""
    format: int = FORMAT
    """Version of the file format; writing always uses the present one."""

    def __getitem__(self, name: str) -> Any:
        """The field of that name, as in the dict of the file (and of an export, which has the same names)."""
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """The dict in the file; its values are not copied."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "State":
        """The inverse of `to_dict`; names that are no field are ignored.

        Raises:
            CheckpointError: a field is missing, or has a value of another type; the message starts with "it".
        """
        fields = dataclasses.fields(cls)
        required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
        if missing := required - values.keys():
            raise CheckpointError(f"it lacks {', '.join(sorted(missing))}")
        known = {f.name: values[f.name] for f in fields if f.name in values}
        for name, expected in typing.get_type_hints(cls).items():
            if name in known and not _fits(known[name], expected):
                shown = str(expected).removeprefix("<class '").removesuffix("'>").replace("typing.", "")
                raise CheckpointError(f"it has {type(known[name]).__name__} as {name}; expected {shown}")
        return cls(**known)


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value has the type of an annotation that `State` uses."""
    if expected is Any:
        return True
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        return any(_fits(value, one) for one in arguments)
    if origin is dict:
        key_type, value_type = arguments
        return isinstance(value, dict) and all(_fits(k, key_type) and _fits(v, value_type) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_fits(content, arguments[0]) for content in value)
    return isinstance(value, expected) and not (expected is int and isinstance(value, bool))


def plain(value: Any, name: str = "state") -> Any:
    """The same value in the types that a checkpoint may hold, so that each file that is written can be read.

    NumPy numbers become numbers, paths become text, NumPy arrays and parameters become tensors, subclasses of dict,
    list, tuple, str, int and float become those.

    Args:
        name: of the value, for the error.

    Raises:
        CheckpointError: names the entry that holds something else, and its type.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str, Tensor):
        return value
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, dict):
        return {plain(key, f"a key of {name}"): plain(content, f"{name}.{key}") for key, content in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(content, f"{name}.{place}") for place, content in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic) and isinstance(value.item(), bool | int | float | str):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, PurePath):
        return str(value)
    raise CheckpointError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: expected tensors, "
        "numbers, text, None, and lists and dicts of them. Convert it first."
    )


def difference(found: Collection[str], expected: Collection[str]) -> str:
    """Two sets of names, as the names that are missing and those that are unexpected."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    parts = [f"missing {', '.join(missing)}" * bool(missing), f"unexpected {', '.join(unexpected)}" * bool(unexpected)]
    return "; ".join(filter(None, parts))
