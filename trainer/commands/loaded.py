"""A trained model, ready to use: found again from a run, a checkpoint or an exported file.

    birds = trainer.load("runs/birds-resnet50")             # its best checkpoint
    birds("tit.jpg")                                        # [{"class": "tit", "probability": 0.98, ...}]
    logits = birds.model(birds.transform("tit.jpg")[None])  # [1, C], needs no .detach()

A checkpoint holds the tensors that were trained; `model.restoring` builds the frozen rest again, and compares it with
the fingerprint in the checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from trainer.config import Config, from_dict
from trainer.data.images import to_rgb
from trainer.data.transforms import InputSpec
from trainer.errors import CheckpointError, UsageError, first_sentence
from trainer.model.classifiers import builder_arguments, model_names
from trainer.model.freezing import freeze
from trainer.model.restoring import NO_BASE
from trainer.processes.together import print_main
from trainer.recipes import Recipe, load_recipe
from trainer.storage import archive, checkpoint
from trainer.storage.state import State

# The files of an export, see `export`: its description, and the two from which a model can be loaded.
ABOUT, MERGED, TAIL = "model.json", "model.pt", "tail.safetensors"
_BATCH = 32  # images per forward of `Loaded.__call__`
AnyImage = str | os.PathLike[str] | Image.Image | Tensor


@dataclass
class Loaded:
    """A trained model. Call it to classify images.

    Attributes:
        model: images [B, C, S, S], float, normalised, to outputs [B, ...]; in eval mode, on the device. After `load` no
            parameter requires a gradient.
        classes: the name of each output; empty if the outputs are no classes.
        transform: an image (see `__call__`) to the model's input.
        input: the numbers behind `transform`.
        builder: arguments of `torchvision.models.get_model` for the same module; None for a module of your own.
        about: the other contents of the file: "base", "freeze_plan", "config", "metrics", "epoch", "step" and so on.
        path: the file.
        recipe: of the run.
    """

    model: nn.Module
    classes: tuple[str, ...]
    transform: "Transform"
    input: InputSpec
    builder: dict[str, Any] | None
    about: dict[str, Any]
    path: Path
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return from_dict(self.about["config"], str(self.path))

    @torch.no_grad()
    def __call__(self, *images: AnyImage | Iterable[AnyImage], top: int = 3) -> list[dict[str, Any]]:
        """Classify images.

        Args:
            images: paths, Pillow images, tensors uint8 [3, H, W], batches of those [B, 3, H, W], or lists of any.
            top: passed to the recipe's `prediction`.

        Returns:
            One dict for each image, from the recipe's `prediction`: by default
            {"class": most probable, "probability": its own, class: probability for each class}.

        Raises:
            DataError: a file cannot be read.
            UsageError: something that is no image.
        """
        single = (str, os.PathLike, Image.Image, Tensor)
        flat = [one for some in images for one in ([some] if isinstance(some, single) else some)]
        inputs = [self.transform(image) for image in flat]
        rows = [row for value in inputs for row in (value[None] if value.ndim == 3 else value)]  # [C, S, S] each
        batches = [torch.stack(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
        outputs = [output for batch in batches for output in self.model(batch).float().cpu()]
        return [self.recipe.prediction(output, self.classes, top=top)[1] for output in outputs]


class Transform:
    """An image as the model takes it, bit for bit as in the evaluations of its training.

    Attributes:
        resize: the evaluation transform of the recipe: uint8 [C, H, W] to uint8 [C, S, S].
        normalize: uint8 [..., C, H, W] to float32, on the device.
        decode: the path of an image to uint8 [C, H, W], or int32 for a model of 12 or 16 bits.
    """

    def __init__(self, spec: InputSpec, resize: Callable[[Tensor], Tensor], device: torch.device):
        self.resize, self.normalize, self.device = resize, spec.normalize(device), device
        self.decode, self._channels, self._bytes = spec.decode, len(spec.mean), spec.max_value == 255

    def __call__(self, image: AnyImage) -> Tensor:
        """One image to [C, S, S], a batch [..., C, H, W] to [..., C, S, S]; UsageError if it is neither."""
        if isinstance(image, str | os.PathLike):
            image = self.decode(image)
        elif isinstance(image, Image.Image):
            image = to_rgb(image)
        fits = isinstance(image, Tensor) and image.ndim > 2 and image.shape[-3] == self._channels
        if not fits or (self._bytes and image.dtype != torch.uint8):
            given = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            shapes = f"[{self._channels}, H, W] or [B, {self._channels}, H, W]"
            kind = "uint8 " if self._bytes else ""
            raise UsageError(f"the image is {given}; expected a path, a Pillow image, {kind}{shapes}.")
        image = self.resize(image).to(self.device)
        return self.normalize(image) if image.ndim > 3 else self.normalize(image[None])[0]


def load(
    run_or_file: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    weights: str | None = None,
    recipe: Recipe | str | None = None,
) -> Loaded:
    """Load a trained model, with its classes and its transform; takes and raises the same as `load_frozen`.

    No parameter requires a gradient: outputs need no `.detach()`. Prints what differs from the recipe of the training.
    """
    loaded = load_frozen(run_or_file, device=device, weights=weights, recipe=recipe)
    print_differences(loaded.recipe, loaded.about)
    loaded.model.requires_grad_(False)
    return loaded


def load_frozen(
    run_or_file: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    weights: str | None = None,
    recipe: Recipe | str | None = None,
) -> Loaded:
    """Load a trained model whose parameters require gradients as in training, so that it can be split again.

    Args:
        run_or_file: a run (its best checkpoint), a checkpoint, or the folder or a file of an export.
        device: where to put the model; None: the GPU if there is one, else the CPU.
        weights: where the frozen weights are, if not where they were in training; see `model.weights`.
        recipe: the recipe of the run, or its file; None: trainer/recipe.py.

    Returns:
        The model in eval mode.

    Raises:
        UsageError: there is no such file, run or device, or the recipe or the weights have to be named.
        CheckpointError: damaged, or it does not belong to these frozen weights; names the tensors.
        DataError: the frozen weights cannot be found.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except Exception as error:  # torch has a type of error for each kind of device that is not here
        raise UsageError(f"device {device} cannot be used: {first_sentence(error)}.") from error
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    path = find(run_or_file)
    state = read(path)
    config, classes = from_dict(state["config"], str(path)), tuple(state["classes"])
    if is_export(path) and path.name == MERGED:
        model, spec, builder = _merged(path, state, recipe)
    else:
        classifier = recipe.restore(state, weights=weights)
        model, spec, builder = classifier.model, classifier.input, None
        state["base"] = classifier.base  # where they are now
        if recipe.model is Recipe().model and classifier.base["source"] != "module":
            transforms_input = getattr(model, "transform_input", False)
            builder = stock_arguments(config.model.model, len(classes), spec.size, transform_input=transforms_input)
            builder = builder if _is_stock(model, builder) else None
    del state["model"]
    model.eval().to(device)
    _, resize = recipe.transforms(config.data, spec)
    return Loaded(model, classes, Transform(spec, resize, device), spec, builder, state, path, recipe)


def stock_arguments(name: str, num_classes: int, size: int, *, transform_input: bool) -> dict[str, Any]:
    """Arguments of `torchvision.models.get_model` for a module that takes the merged state dict of an export.

    Args:
        size: side of the images, pixels.
        transform_input: whether the model (googlenet, inception_v3) changes the normalisation of its input.
    """
    arguments = {"name": name, "num_classes": num_classes}
    arguments |= builder_arguments(name, size, pretrained=transform_input)
    if "init_weights" in arguments:
        arguments["init_weights"] = False  # values that are replaced at once; left unset it warns
    return arguments


def _is_stock(model: nn.Module, builder: dict[str, Any]) -> bool:
    """Whether a model has the tensors of torchvision's: trainer/recipe.py may have been edited."""
    if not builder["num_classes"]:
        return False
    with torch.device("meta"):
        expected = {name: value.shape for name, value in stock(builder).state_dict().items()}
    return expected == {name: value.shape for name, value in model.state_dict().items()}


def _merged(path: Path, about: dict[str, Any], recipe: Recipe) -> tuple[nn.Module, InputSpec, dict[str, Any] | None]:
    """The model of a merged export, frozen as in training, its input, and how torchvision builds it."""
    place, given = path.with_name(ABOUT), about.get("builder")
    try:
        # JSON has lists for tuples
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in about["input"].items()}
        spec = InputSpec(**fields)
        if given is None:
            builder = None
        else:  # only what an export writes: the file may be a stranger's, and torchvision would download `weights`
            transforms_input = given.get("transform_input", False) is True
            name = given["name"] if given["name"] in model_names() else ""
            builder = stock_arguments(name, len(about["classes"]), spec.size, transform_input=transforms_input)
            if not name or json.loads(json.dumps(builder)) != given:
                raise CheckpointError(f"{place}: its builder is {given}; expected {builder}. Export again.")
        trainable = list(about["freeze_plan"]["trainable"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place} does not say how its model is built: {error!r}.") from error
    if builder is not None:
        with torch.device("meta"):  # before memory is taken for sizes that only the description names
            checkpoint.check_tensors(about["model"], stock(builder).state_dict())
        model = stock(builder)
    elif not recipe.builds(about):
        raise UsageError(f"{path}: {NO_BASE}")
    else:
        model = recipe.classifier(from_dict(about["config"], str(place)), about["classes"]).model
    load_merged(model, about["model"])
    freeze(model, trainable)
    return model, spec, builder


def find(run_or_file: str | os.PathLike[str]) -> Path:
    """Find the file to load: the best or newest checkpoint of a run, the merged model or the tail of an export.

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
    newest = checkpoint.newest(path / "checkpoints")[0] or checkpoint.newest(path)[0]
    if newest is None:
        what = "holds neither checkpoints nor an exported model" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}; expected a run such as runs/photos-resnet50, a checkpoint, or an export.")
    return newest


def home_of(path: Path) -> Path:
    """The folder of the run that a checkpoint is of; that of the file itself, if it is in no run."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def is_export(path: Path) -> bool:
    """Whether a file is of an export, with its model.json beside it."""
    return path.name in (MERGED, TAIL) and path.with_name(ABOUT).is_file()


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or an exported file and its model.json, as a dict with the names of `State`.

    Raises:
        CheckpointError: damaged, incomplete, or neither of the two.
    """
    if not is_export(path):
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is no checkpoint, nor is it {TAIL} of an export with {ABOUT} beside it.")
        return checkpoint.read(path).to_dict()
    try:
        tensors = safetensors.torch.load_file(path) if path.name == TAIL else archive.load(path)
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(f"{path} cannot be read: {first_sentence(error)}.") from error
    about = read_about(path.with_name(ABOUT)) | {"model": tensors}
    try:
        State.from_dict({"optimizer": {}, "scaler": None, **about})  # these two are not exported
    except CheckpointError as error:
        raise CheckpointError(f"{path.with_name(ABOUT)} cannot be used: {error}.") from error
    return about


def read_about(path: Path) -> dict[str, Any]:
    """Read the model.json of an export.

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
    """The sha256 of the content of a model.json, whatever its layout."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def stock(builder: dict[str, Any]) -> nn.Module:
    """Build torchvision's own module, with random values; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        return models.get_model(**builder)


def load_merged(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a whole state dict, strictly. Raises CheckpointError with torch's list of the tensors that do not fit."""
    state = model.state_dict()  # has the format versions that MNASNet does not load without
    state = {**tensors} if state.keys() != tensors.keys() else (state.update(tensors) or state)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(str(error)) from error


def print_differences(recipe: Recipe, about: dict[str, Any]) -> None:
    """Print one line for each function of the recipe that is not the one of the training."""
    if lines := recipe.differences(about.get("recipe", {})):
        print_main(*lines)
