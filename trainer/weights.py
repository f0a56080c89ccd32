"""Where pretrained weights come from, and how they are matched to the model.

What `weights` (`--weights`) may be:

    default                           torchvision's recommended weights of the model
    IMAGENET1K_V2                     other torchvision weights of it; ResNet50_Weights.IMAGENET1K_V2 does as well
    path/to/file.pth                  a state dict in a file: .pt, .pth or .safetensors
    https://host/name-0123abcd.pth    the same behind an http, https or file URL; a hash in the name is verified
    none                              none: random features, for tests and for training from scratch

Weights are found, or it is an error: nothing falls back to random values.
"""

import argparse
import hashlib
import http.client
import re
import socket
import sys
import tempfile
import urllib.error
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from trainer.archive import check_members
from trainer.errors import DataError, UsageError

__all__ = ["Source", "fetch_weights", "find_enum", "load_backbone_state"]

_TIMEOUT = 60.0  # seconds without a byte after which a download is given up
_HASH = re.compile(r"-([0-9a-f]{8,})\.")  # torch.hub's convention, name-<sha256 prefix>.pth, without its near misses
_WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")  # left in names by DataParallel, DDP and torch.compile
_RENAMED = (  # files of torchvision's own that carry the names of older code
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)


@dataclass(frozen=True)
class Source:
    """Where the weights of a backbone are.

    path: local file, its hash verified where one is known; None for random features.
    base: plain values to find the same weights again, see `trainer.backbones.Backbone`.
    enum: torchvision's description of the weights; None if they are not its own.
    """

    path: Path | None
    base: dict[str, str | int]
    enum: WeightsEnum | None = None


def find_enum(model: str, weights: str) -> WeightsEnum | None:
    """Torchvision's description of `weights`, or None if they are not its own. Reads no file, downloads nothing.

    model: name of a torchvision builder. weights: see the top of this file; case is ignored.
    """
    kind = models.get_model_weights(model)
    return _by_name(kind).get(weights.lower().removeprefix(f"{kind.__name__}.".lower()))


def fetch_weights(model: str, weights: str) -> Source:
    """Resolve `weights` (see the top of this file) for the torchvision builder `model`; download what is not here yet.

    Downloads are kept in torch.hub's checkpoint folder (so TORCH_HOME moves them). Processes that share that folder
    should not fetch the same weights at once: let one go first, and the others find its file.

    Raises UsageError if `weights` is none of those, DataError if it cannot be fetched or is not what it should be.
    """
    if weights.lower() == "none":
        return Source(None, {"source": "random"})
    if enum := find_enum(model, weights):
        path, sha256 = _fetch_url(enum.url)
        return Source(path, {"source": "torchvision", "weights": str(enum), "url": enum.url, "sha256": sha256}, enum)
    if re.match(r"(https?|file)://", weights, re.IGNORECASE):
        path, sha256 = _fetch_url(weights)
        return Source(path, {"source": "url", "url": weights, "sha256": sha256})
    path = Path(weights).expanduser().absolute()  # absolute: a resumed run may start in another folder
    if path.is_file():
        return Source(path, {"source": "file", "path": str(path), "sha256": _sha256(path)})
    names = ", ".join(enum.name for enum in dict.fromkeys(_by_name(models.get_model_weights(model)).values()))
    raise UsageError(
        f"weights {weights!r}: neither a file here, nor an http, https or file URL, nor one of the weights of {model}:"
        f" default, none, {names}"
    )


def load_backbone_state(model: nn.Module, source: Source, *, heads: tuple[str, ...] = ()) -> None:
    """Copy the weights of `source` into `model`, exactly: no name missing, none left over, every shape the same.

    model: on the CPU; parameters on the meta device are given memory here.
    heads: names of modules to leave alone, whether or not the file has values for them.

    Names of old torchvision files, and of wrapped models (`module.`, `_orig_mod.`), are translated. Only
    `num_batches_tracked` may be missing: a count that files from before PyTorch 0.4.1 lack and these models never read.
    Raises DataError, with the names, and then `model` is as it was.
    """
    assert source.path is not None, "random features have nothing to load"
    skip = tuple(f"{name}." for name in heads)
    given = {k: v for k, v in _read_state(source.path).items() if not k.startswith(skip)}
    # Filled in and handed back whole, because it carries the format versions that MNASNet refuses to load without.
    state = model.state_dict()
    wanted = {k: v for k, v in state.items() if not k.startswith(skip)}
    both = wanted.keys() & given.keys()
    reshaped = [k for k in wanted if k in both and given[k].shape != wanted[k].shape]
    problems = {
        "missing": [k for k in wanted if k not in both and not k.endswith(".num_batches_tracked")],
        "unexpected": [k for k in given if k not in both],
        "of another shape": [f"{k} {list(given[k].shape)}, not {list(wanted[k].shape)}" for k in reshaped],
        "not finite": [k for k in wanted if k in both and k not in reshaped and not given[k].isfinite().all()],
    }
    if any(problems.values()):
        report = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
            for what, names in problems.items()
            if names
        )
        hint = ", made for another image size?" if any("pos_embedding" in k for k in reshaped) else ""
        raise DataError(f"{source.path} does not fit {type(model).__name__}{hint}: {report}")
    for k in both:  # copied: tensors of a file can be half precision, or views of one memory
        state[k] = given[k].detach().to(wanted[k].dtype, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(state, assign=True)


def _by_name(kind: type[WeightsEnum]) -> dict[str, WeightsEnum]:
    """Weights by lower-case name, "default" too. Not vgg16's IMAGENET1K_FEATURES: without a classifier."""
    return {name.lower(): enum for name, enum in kind.__members__.items() if enum.meta["categories"]}


def _fetch_url(url: str) -> tuple[Path, str]:
    """Local copy of `url` and its sha256, which is checked against the one in the name each time, cached or not."""
    name = re.split(r"[?#]", url)[0].rpartition("/")[2]
    expected = match[1] if (match := _HASH.search(name)) else None
    if expected is None:  # one site's model.pth must not be taken for another's
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        _download(url, path, expected)
    sha256 = _sha256(path)
    if expected is not None and not sha256.startswith(expected):
        raise DataError(
            f"{path} is not the file that was downloaded: expected a sha256 of {expected}..., got {sha256};"
            " delete it to download it again"
        )
    return path, sha256


def _download(url: str, path: Path, expected: str | None) -> None:
    """Download `url` to `path`, where nothing appears before it is complete. Raises DataError."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torch.hub sets none: a silent server would hold the run forever
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
            part = Path(folder, path.name)
            torch.hub.download_url_to_file(url, str(part), expected, progress=sys.stderr.isatty())
            if expected is None:  # torch.hub takes a connection that broke for the end: without a hash, only this tells
                _read_state(part)
            part.replace(path)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the open connection, too
        raise DataError(
            f"cannot download {url}: {error}. Three ways on: --weights FILE (a copy of it), --weights URL (another"
            " place to get it from), --weights none (random features)"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in `path` under the names of today's torchvision; runs no code of the file. Raises DataError."""
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as members:
                    check_members(members.infolist(), path.stat().st_size)
            # torchvision's training scripts save their arguments beside the model: a Namespace, which is plain data.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign files raise nearly anything
        # Of torch's answer only the first sentence: the next ones advise to load the file with weights_only=False.
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {code[1]}, not only tensors" if code else re.split(r"\. |\n", str(error))[0]
        raise DataError(f"cannot read {path} as weights: {reason} ({type(error).__name__})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"keys {', '.join(map(str, list(state)[:8]))}" if isinstance(state, Mapping) else type(state).__name__
        raise DataError(f"{path} is not a state dict, nor holds one as 'state_dict' or 'model': found {found}")
    return {_todays_name(key): value for key, value in state.items()}


def _todays_name(key: str) -> str:
    key = _WRAPPERS.sub(r"\1", key)
    for pattern, name in _RENAMED:
        key = pattern.sub(name, key)
    return key
