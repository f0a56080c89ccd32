"""Read the tensors of a weights file, by the names that torchvision uses today."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from trainer.errors import DataError, first_sentence
from trainer.storage import archive

_WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")  # left in names by DataParallel, DDP and torch.compile
# Keys under which files hold the state dict, the likeliest first.
_NESTED = ("state_dict", "model", "model_state", "model_state_dict", "ema")
_RENAMED = (  # names in torchvision's own files from before it renamed modules
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file, without running code from it.

    Args:
        path: a .safetensors file, or a file of `torch.save` with a state dict, or with a dict that holds one as
            "state_dict", "model", "model_state", "model_state_dict" or "ema".

    Returns:
        The tensors in the order of the file, under the names that torchvision uses today, without the prefixes of
        wrappers (`module.`, `_orig_mod.`).

    Raises:
        DataError: the file is damaged, or holds something other than tensors; says what was found.
    """
    try:
        state: Any = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else archive.load(path)
    except Exception as error:  # damaged and foreign files raise nearly anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"{first_sentence(error)} ({type(error).__name__})"
        if code or isinstance(error, archive.Refused):
            reason = f"it holds {code[1]}, not only tensors" if code else str(error)
        reason = _foreign(path) or reason
        raise DataError(f"cannot read {path} as weights: {reason}") from error
    for _ in range(4):  # limited, because a dict in a file can contain itself
        if isinstance(state, Mapping):
            state = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), state)
    if isinstance(state, Mapping):
        odd = [k for k, value in state.items() if not (isinstance(k, str) and isinstance(value, Tensor))]
        found = ", ".join(f"{k!r} ({type(state[k]).__name__})" for k in odd[:8]) if state else "no entries"
    else:
        found = type(state).__name__
    if found:
        raise DataError(f"{path} is not a state dict, nor holds one as {', '.join(_NESTED)}: found {found}")
    for name, value in state.items():
        if value.layout is not torch.strided or value.is_nested or value.is_meta:
            raise DataError(f"{path}: {name} is a sparse, nested or meta tensor; expected plain ones.")
    # "n_averaged" is a counter of torch.optim.swa_utils.AveragedModel, not a tensor of the model.
    return distinct(((_todays_name(key), value) for key, value in state.items() if key != "n_averaged"), path)


def _foreign(path: Path) -> str:
    """Why a file cannot be read, by its first bytes: empty, or of another kind than its name says; "" if unknown."""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(9)
        kind = ".pt" if start[:2] == b"PK" or start[:1] == b"\x80" else ".safetensors" if start[8:] == b"{" else ""
        if not start:
            return "it is empty"
        if not kind:
            return f"it begins with {start!r}, as neither a file of torch.save nor one of safetensors does"
        if (kind == ".safetensors") != (path.suffix == ".safetensors"):
            return f"by its content it is a {kind} file: rename it"
    return ""


def _todays_name(key: str) -> str:
    """The name of a tensor in torchvision today, without the prefixes of wrappers."""
    key = _WRAPPERS.sub(r"\1", key)
    for pattern, name in _RENAMED:
        key = pattern.sub(name, key)
    return key


def distinct(items: Iterable[tuple[str, Tensor]], file: Path) -> dict[str, Tensor]:
    """A dict of these items.

    Raises:
        DataError: two items have the same name, so one tensor would replace the other.
    """
    result: dict[str, Tensor] = {}
    for name, value in items:
        if name in result:
            raise DataError(f"two tensors of {file} would be called {name} here; choose with --weights-rename.")
        result[name] = value
    return result
