"""A trained model, ready to use: found again from a run, a checkpoint or an exported file.

    birds = trainer.load("runs/birds-resnet50")           # its best checkpoint
    logits = birds.model(birds.transform("tit.jpg")[None])  # [1, C]
    print(birds.classes[logits.argmax()])

A checkpoint holds what was trained. The frozen rest is found by what the checkpoint says of it (a torchvision name, a
file, a URL, a seed), and held against the fingerprint that the checkpoint has of it.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from trainer import checkpoint
from trainer.backbones import Backbone, InputSpec, builder_arguments, fill, rebuild
from trainer.data import Normalize, decode, eval_transform, to_rgb
from trainer.errors import CheckpointError, UsageError, first_sentence
from trainer.freezing import freeze

# The files of an export, see `export`: what it says of itself, and the two that a model can be loaded from.
ABOUT, MERGED, TAIL = "model.json", "model.pt", "tail.safetensors"


@dataclass
class Loaded:
    """A trained classifier.

    Attributes:
        model: images [B, 3, S, S], float, normalised, to logits [B, C]; in eval mode, on the device.
        classes: the name of each logit.
        transform: a path, a Pillow image or a uint8 tensor [3, H, W] to what the model takes, [3, S, S] on the device;
            a batch of such tensors, [B, 3, H, W], to [B, 3, S, S].
        input: the numbers behind `transform`.
        builder: what `torchvision.models.get_model` builds the same module from; None for a module of your own.
        about: what the file says besides: "base", "freeze_plan", "config", "metrics", "epoch", "step" and so on.
        path: the file.
    """

    model: nn.Module
    classes: tuple[str, ...]
    transform: "Transform"
    input: InputSpec
    builder: dict[str, Any] | None
    about: dict[str, Any]
    path: Path


class Transform:
    """An image as the model takes it, bit for bit as in the evaluations of its training. UsageError if it is none.

    Attributes:
        resize: uint8 [3, H, W] to uint8 [3, S, S]. normalize: uint8 [B, 3, S, S] to float32, on the device.
    """

    def __init__(self, spec: InputSpec, device: torch.device):
        self.resize = eval_transform(size=spec.size, resize=spec.resize, interpolation=spec.interpolation)
        self.normalize, self.device = Normalize(spec.mean, spec.std).to(device), device

    def __call__(self, image: str | os.PathLike[str] | Image.Image | Tensor) -> Tensor:
        if isinstance(image, str | os.PathLike):
            image = decode(image)
        elif isinstance(image, Image.Image):
            image = to_rgb(image)
        plain = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim in (3, 4)
        if not plain or image.shape[-3] != 3:
            given = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise UsageError(f"the image is {given}; expected a path, a Pillow image, uint8 [3, H, W] or [B, 3, H, W].")
        image = self.resize(image).to(self.device)
        return self.normalize(image) if image.ndim == 4 else self.normalize(image[None])[0]


def load(
    run_or_file: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    weights: str | None = None,
    backbone: Backbone | None = None,
) -> Loaded:
    """A trained model, its classes and its transform.

    Args:
        run_or_file: a run (its best checkpoint), a checkpoint, or the folder or a file of an export.
        device: where to put the model; None: the GPU if there is one, else the CPU.
        weights: where the frozen weights are, if not where they were in training; see `trainer.weights`.
        backbone: for a module of your own: what `build_model` made of it, for as many classes, before training.

    Raises:
        UsageError: there is no such file, run or device, or it needs `backbone`.
        CheckpointError: damaged, or it does not belong to these frozen weights; names the tensors.
        DataError: the frozen weights cannot be had.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except Exception as error:  # torch has a type of error for each kind of device that is not here
        raise UsageError(f"device {device} cannot be used: {first_sentence(error)}.") from error
    path = find(run_or_file)
    state = read(path)
    tensors = state.pop("model")
    builder = state.get("builder")
    if path.name == MERGED and builder:
        model, spec = stock(builder), InputSpec(**state["input"])
        load_merged(model, tensors)
    else:
        own = backbone is not None
        backbone = backbone or rebuild(state, weights=weights)
        model, spec = backbone.model, backbone.input
        freeze(model, state["freeze_plan"]["train"], head=backbone.head)
        fill(model, tensors, state["fingerprint"])
        state["base"] = backbone.base  # where they are now
        if not own and builder is None:
            name = state["config"]["model"]["name"]
            builder = {"name": name, "num_classes": len(state["classes"])}
            builder |= builder_arguments(name, spec.size, pretrained=getattr(model, "transform_input", False))
            if "init_weights" in builder:
                builder["init_weights"] = False  # values that are replaced at once; left unset it warns
    model.eval().to(device)
    return Loaded(model, tuple(state["classes"]), Transform(spec, device), spec, builder, state, path)


def find(run_or_file: str | os.PathLike[str]) -> Path:
    """The file that is meant: of a run the best or newest checkpoint; of an export the merged model or the tail.

    Raises:
        UsageError: there is none.
        CheckpointError: none of the run's checkpoints can be used.
    """
    path = Path(os.path.expanduser(run_or_file))
    if path.is_file():
        return path
    for name in ("checkpoints/best.pt", "best.pt", MERGED, TAIL):  # the second: in a folder of checkpoints
        if (path / name).is_file():
            return path / name
    newest = checkpoint.newest(path / "checkpoints") or checkpoint.newest(path)
    if newest is None:
        what = "holds neither checkpoints nor an exported model" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}; expected a run such as runs/photos-resnet50, a checkpoint, or an export.")
    return newest


def is_export(path: Path) -> bool:
    """Whether a file is of an export, with its model.json beside it."""
    return path.name in (MERGED, TAIL) and path.with_name(ABOUT).is_file()


def read(path: Path) -> checkpoint.State:
    """What a checkpoint, or an exported file with its model.json, says of itself; its tensors under "model".

    Raises:
        CheckpointError: damaged, incomplete, or neither of the two.
    """
    if not is_export(path):
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is no checkpoint, nor is it {TAIL} of an export with {ABOUT} beside it.")
        return checkpoint.read(path)
    try:
        if path.name == TAIL:
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(f"{path} cannot be read: {first_sentence(error)}.") from error
    return read_about(path.with_name(ABOUT)) | {"model": tensors}


def read_about(path: Path) -> dict[str, Any]:
    """What the model.json of an export says.

    Raises:
        CheckpointError: damaged, or edited.
    """
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON: {error}.") from error
    if not isinstance(about, dict) or about.pop("sha256", None) != digest(about):
        raise CheckpointError(f"{path} was edited, or is damaged: its content does not match its sha256. Export again.")
    return about


def digest(about: dict[str, Any]) -> str:
    """The sha256 of what a model.json says, however it is laid out."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def stock(builder: dict[str, Any]) -> nn.Module:
    """The module that torchvision itself builds, with random values; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return models.get_model(**builder)


def load_merged(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a whole state dict, `strict=True`. Raises CheckpointError with torch's list of what does not fit."""
    state = model.state_dict()  # has the format versions that MNASNet does not load without
    state = {**tensors} if state.keys() != tensors.keys() else (state.update(tensors) or state)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(str(error)) from error


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters, without its middle if need be."""
    half = max(width - 1, 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half]}…{text[-half:] if half else ''}"
