"""The tensors in a file: a checkpoint, an export or a file of weights."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.commands import loaded as loading
from trainer.commands.text import shape
from trainer.model.weights_file import read_state
from trainer.storage import checkpoint

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int64": "i64"}


def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read the tensors of a file, and the rest of a checkpoint or export; None for a file of weights.

    Raises:
        CheckpointError, DataError: it cannot be read.
    """
    if not (path.parent.name == "checkpoints" or checkpoint.is_checkpoint(path) or loading.is_export(path)):
        return read_state(path), None
    state = loading.read(path)
    return state["model"], state


def rows(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Name, shape and dtype of each; of parameters also whether they train."""
    return [
        {"name": name, "shape": list(value.shape), "dtype": dtype(value)}
        | ({"trains": value.requires_grad} if isinstance(value, nn.Parameter) else {})
        for name, value in tensors.items()
    ]


def dtype(tensor: Tensor) -> str:
    """A short name, such as f32."""
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def line(row: dict[str, Any]) -> str:
    """One of `rows` as text."""
    flag = ("trains  " if row["trains"] else "frozen  ") if "trains" in row else ""
    return f"{flag}{row['dtype']:4} {shape(row['shape']):>14}  {row['name']}"
