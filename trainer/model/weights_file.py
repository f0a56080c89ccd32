"""Read a file of weights: the tensors in it, by the names of today's torchvision."""

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
_NESTED = ("state_dict", "model", "model_state", "model_state_dict", "ema")  # where files keep it; the first counts
_RENAMED = (  # files of torchvision's own that carry the names of older code
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file; runs no code of it.

    Args:
        path: a .safetensors file, or one of `torch.save`: the state dict itself, or a dict with it as "model".

    Returns:
        The tensors under the names of today's torchvision, without prefixes of wrappers; in the order of the file.

    Raises:
        DataError: damaged, or something else than tensors; says what was found.
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
    for _ in range(4):  # not for ever: a dict in a file can hold itself
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
    # An average of weights (torch.optim.swa_utils.AveragedModel) counts how many it is of.
    return distinct(((_todays_name(key), value) for key, value in state.items() if key != "n_averaged"), path)


def _foreign(path: Path) -> str:
    """What a file that cannot be read is instead of what its name says; empty if its beginning does not tell."""
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
    key = _WRAPPERS.sub(r"\1", key)
    for pattern, name in _RENAMED:
        key = pattern.sub(name, key)
    return key


def distinct(items: Iterable[tuple[str, Tensor]], file: Path) -> dict[str, Tensor]:
    """A dict, once no name is found to appear twice: one tensor would silently take another's place."""
    result: dict[str, Tensor] = {}
    for name, value in items:
        if name in result:
            raise DataError(f"two tensors of {file} would be called {name} here; choose with --weights-rename.")
        result[name] = value
    return result
