"""Build any torchvision classifier, and replace its head.

    backbone = build_model("resnet50", 10)  # torchvision's recommended weights, a new head for 10 classes
    backbone.head  # ("fc",)
    backbone.input  # InputSpec(size=224, resize=232, ...): how its images are prepared

There is no table of heads: the head is the layer with as many outputs as the model has classes. A module of your own
gets its new head by name: `build_model(MyNet(), 10, head="classifier")`.
"""

import difflib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torchvision import models

from trainer.config import Config, WeightsConfig, flag
from trainer.data.transforms import InputSpec
from trainer.errors import CheckpointError, DataError, UsageError
from trainer.model.restoring import restore
from trainer.model.weights import Report, fetch_weights, find_enum, load_backbone_state
from trainer.model.weights_filter import to_stored
from trainer.storage import checkpoint
from trainer.text import counted

_BUILT_CLASSES = 1000  # outputs of every torchvision model by default; the layer with so many outputs is its head
_NAMED = {
    "torchvision": "weights",
    "file": "path",
    "url": "url",
}  # "source" of `Classifier.base` → the key that names the place
_AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}  # second classifiers, halfway up


@dataclass
class Classifier:
    """A model for the classes of a run: pretrained or random features, and a head.

    Attributes:
        model: images `[B, 3, size, size]` to logits `[B, num_classes]`, in train mode and in eval mode.
        head: names of the modules of the head, for example ("fc",).
        input: how images are prepared.
        base: plain values with which the frozen weights are found again, one of
            {"source": "torchvision", "weights": "ResNet18_Weights.IMAGENET1K_V1", "url": ..., "sha256": ...}
            {"source": "file", "path": ..., "sha256": ...}
            {"source": "url", "url": ..., "sha256": ...}
            {"source": "random", "seed": ...}
            {"source": "module"}: the weights that the given module had;
            with "match", the settings that chose tensors of a file (`weights_filter.to_stored`), if there were any, and
            "seed" of the random values beside those of a file.
        report: which tensors of the file were loaded; None without a file.
    """

    model: nn.Module
    head: tuple[str, ...]
    input: InputSpec
    base: dict[str, Any]
    report: Report | None = None

    def report_content(self) -> dict[str, Any] | None:
        """The content of `weights_report.json`; None if no weights were loaded from a file."""
        return None if self.report is None else self.report.to_dict()

    @property
    def origin(self) -> str:
        """Where the weights come from, as text."""
        if self.base["source"] == "random":
            return f"random weights from seed {self.base['seed']}: its frozen features are random, not learned"
        named, kind = _NAMED.get(self.base["source"]), type(self.model).__name__
        return f"weights {self.base[named]}: {self.report}" if named else f"by the recipe: {kind}, with its own weights"


def model_names() -> list[str]:
    """Names of torchvision's classification models, sorted: the models that can be built by name."""
    return models.list_models(module=models)


def build_model(
    model: str | nn.Module,
    num_classes: int,
    *,
    weights: str | WeightsConfig = "default",
    head: str | None = None,
    image_size: int | None = None,
    input: InputSpec | None = None,
    seed: int = 0,
) -> Classifier:
    """Build a classifier of `num_classes` classes on pretrained features.

    A new head has small weights, from a normal distribution of standard deviation 0.01, and a bias of zero, in every
    family (torchvision's own differ). The global random state does not change. Under `torch.device("meta")` even the
    largest model takes next to no time or memory.

    Args:
        model: a name from `model_names()`, or a module that maps images `[B, 3, H, W]` to logits.
        num_classes: number of outputs.
        weights: where the weights are, see the top of `trainer.model.weights`, or the settings that also choose and
            rename the tensors of a file. Their head is used if it has `num_classes` outputs. A module keeps its own
            weights, and its head if that has `num_classes` outputs.
        head: name of the last layer, a Linear or an ungrouped Conv2d. Required for a module; found in a named model.
        image_size: side of the images in pixels; None: the size that the weights were evaluated at (224 for a module).
            The side before the crop keeps its ratio to it. vit and maxvit accept no other size with pretrained weights.
        input: how images are prepared, number of channels included; None: as for the weights, or as a timm model says.
        seed: seed of a new head and of random features, which are the same on any device.

    Returns:
        The model in train mode, not frozen, on torch's default device; a module stays on its own device.

    Raises:
        UsageError: an argument is impossible.
        DataError: the weights cannot be used.
        CheckpointError: `weights` is a checkpoint whose model cannot be built again.
    """
    if num_classes < 1:
        raise UsageError(f"num_classes is {num_classes}: a model needs at least 1 output")
    settings = weights if isinstance(weights, WeightsConfig) else WeightsConfig(weights)
    weights, match = settings.weights, to_stored(settings)
    if match and (isinstance(model, nn.Module) or weights.lower() == "none"):
        flags = ", ".join(flag(name) for name in match)
        raise UsageError(f"{flags} chooses among the tensors of a file, and there is none: give --weights a file.")
    if isinstance(model, nn.Module):
        spec = input or _module_input(model, image_size)
        return _adapt_module(model, num_classes, weights=weights, head=head, spec=spec, seed=seed)
    if model not in model_names():
        close = ", ".join(difflib.get_close_matches(str(model).lower(), model_names(), n=5, cutoff=0))
        raise UsageError(f"there is no model {model!r} among torchvision's classifiers; closest: {close}")

    spec = input or input_spec(model, weights, image_size)  # before the download, so that a wrong size is found at once
    source = fetch_weights(model, weights)
    pretrained = source.path is not None
    before = _trained_model(source.path) if source.path and checkpoint.is_checkpoint(source.path) else None
    if before and image_size is None:
        spec = before.input

    device = torch.get_default_device()
    # To draw random values takes seconds; not done where the file replaces them or meta tensors cannot hold them.
    unset = (pretrained and not match) or device.type == "meta"
    with seeded(seed, "base"), init_empty_weights(include_buffers=False) if unset else nullcontext():
        net = _construct(model, spec.size, getattr(before.model, "transform_input", True) if before else pretrained)
    (found,) = (name for name, layer in net.named_modules() if _outputs(layer) == _BUILT_CLASSES)
    if head not in (None, found):
        raise UsageError(f"the head of {model} is {found!r}, not {head!r}")
    with seeded(seed, "head"):
        _replace(net, found, num_classes, torch.device("cpu"))
    base, report = source.base, None
    if pretrained:
        state = before.model.state_dict() if before else None
        auxiliary = _AUXILIARY.get(model, ())
        report = load_backbone_state(net, source, heads=auxiliary, own_head=found, match=settings, state=state)
    if match:
        base = base | {"match": match}
    if not report or match:
        base = base | {"seed": seed}
    return Classifier(net.to(device), (found,), spec, base, report)


def _trained_model(path: Path) -> Classifier:
    """The model of a checkpoint that another training starts from; it may itself have started from a checkpoint.

    This recursion ends: a checkpoint has the sha256 of the file that it started from, so files cannot form a circle.
    """
    state = checkpoint.read(path)

    def build(config: Config) -> Classifier:
        size, seed = config.data.image_size, config.run.seed
        return build_model(config.model.model, len(state.classes), weights=config.weights, image_size=size, seed=seed)

    try:
        return restore(state, build=None if state.base.get("source") == "module" else build)
    except (CheckpointError, DataError, UsageError) as error:
        raise CheckpointError(f"the model that {path} was trained on cannot be built again: {error}") from error


def input_spec(model: str, weights: str, image_size: int | None = None) -> InputSpec:
    """How images are prepared for a torchvision model, from torchvision's preset for the weights. Downloads nothing.

    Args:
        model: a name from `model_names()`.
        weights: as for `build_model`; for a file, a URL or "none", the preset of the recommended weights is used.
        image_size: side of the images in pixels; None: that of the preset.

    Raises:
        UsageError: the image size is impossible.
    """
    enum, default = find_enum(model, weights), find_enum(model, "default")
    assert default is not None, model
    preset = (enum or default).transforms()
    native = preset.crop_size[0]
    size = native if image_size is None else image_size
    _check_size(size)
    if enum and size != native and _has_built_in_size(model):
        raise UsageError(f"image_size is {size}, but {enum} takes images of {native} pixels and no others")
    resize = round(size * preset.resize_size[0] / native)
    return InputSpec(size, resize, tuple(preset.mean), tuple(preset.std), preset.interpolation.value)


def _check_size(size: int) -> None:
    # There is no other limit: `min_size` in torchvision's metadata is the training size for swin, and 33 pixels too
    # large for efficientnet_v2. A size that a layer cannot take is reported by `split_model`.
    if size < 1:
        raise UsageError(f"image_size is {size}: expected at least 1 pixel")


def _has_built_in_size(model: str) -> bool:
    """Whether the model is built for one image size."""
    return model.startswith(("vit_", "maxvit_"))


def builder_arguments(model: str, size: int, *, pretrained: bool) -> dict[str, Any]:
    """Arguments of `torchvision.models.get_model` with which it builds the same module as `build_model`.

    Args:
        model: a name from `model_names()`.
        size: side of the images, pixels.
        pretrained: whether the module has torchvision's weights, or weights made from them.
    """
    if model in _AUXILIARY:
        # Without the auxiliary classifiers: in train mode they run even if their output is not used, their BatchNorms
        # change, inception_v3's fails below 299 pixels, and over frozen features they would train only themselves.
        # transform_input: these weights take inputs in [-1, 1]. init_weights: without it torchvision warns.
        return {"aux_logits": False, "transform_input": pretrained, "init_weights": True}
    if _has_built_in_size(model):
        return {"image_size": size} if model.startswith("vit_") else {"input_size": (size, size)}
    return {}


def _construct(model: str, size: int, pretrained: bool) -> nn.Module:
    """The model as torchvision builds it, with random values."""
    try:
        return models.get_model(model, weights=None, **builder_arguments(model, size, pretrained=pretrained))
    except (AssertionError, ValueError) as error:
        if not _has_built_in_size(model):
            raise
        raise UsageError(f"{model} cannot be built for images of {counted(size, 'pixel')}: {error}") from error


def _module_input(model: nn.Module, image_size: int | None) -> InputSpec:
    """How images are prepared for a module of one's own: as a timm model says, or normalised as for ImageNet."""
    about = getattr(model, "pretrained_cfg", None) or {}  # https://huggingface.co/docs/timm/reference/data
    size = about.get("input_size", (3, 224, 224))[-1] if image_size is None else image_size
    _check_size(size)
    if not about:
        return InputSpec.square(size)
    values: dict[str, Any] = {name: tuple(about[name]) for name in ("mean", "std") if name in about}
    interpolation = about.get("interpolation", "bilinear")
    interpolation = interpolation if interpolation in ("bilinear", "bicubic") else "bilinear"
    return InputSpec(size, round(size / about.get("crop_pct", 0.875)), **values, interpolation=interpolation)


def _adapt_module(
    model: nn.Module, num_classes: int, *, weights: str, head: str | None, spec: InputSpec, seed: int
) -> Classifier:
    """A module of the user's own with a head of `num_classes` outputs."""
    if weights not in ("default", "none"):
        raise UsageError(f"weights is {weights!r}: a module is used as it is; load the weights into it first")
    modules = dict(model.named_modules())
    outputs = _outputs(modules.get(head or ""))
    if not head or outputs is None:
        found = type(modules[head]).__name__ if head in modules else "no module of that name"
        names = ", ".join([name for name, layer in modules.items() if name and _outputs(layer)][-8:])
        raise UsageError(
            f"head {head!r} of {type(model).__name__}: expected a Linear or ungrouped Conv2d layer, found {found};"
            f" candidates, the last ones: {names or 'none'}"
        )
    if outputs != num_classes:
        with seeded(seed, "head"):
            _replace(model, head, num_classes, next(modules[head].parameters()).device)
    return Classifier(model, (head,), spec, {"source": "module"})


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seed torch's CPU generator from `seed` and `purpose`, draw on the CPU, and restore the generator at the end.

    Only the CPU's generator: `torch.manual_seed` would also seed those of GPUs, which are not restored.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))
        yield


def _outputs(layer: nn.Module | None) -> int | None:
    """The number of outputs of a layer that can be a head; None for any other."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.Conv2d) and layer.groups == 1 else None


def _replace(model: nn.Module, name: str, num_classes: int, device: torch.device) -> None:
    """Replace a layer by a new one with `num_classes` outputs and the same kind, kernel, dtype and bias."""
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:  # squeezenet classifies every position, then averages
        assert isinstance(old, nn.Conv2d)
        shape = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        new = nn.Conv2d(old.in_channels, num_classes, bias=old.bias is not None, **shape)
    # Small: of pretrained features, whose norm is in the hundreds, torch's default makes confident random logits, which
    # short runs do not unlearn.
    nn.init.normal_(new.weight, std=0.01)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    if getattr(model, "num_classes", None) == _outputs(old):  # kept by squeezenet, vit, swin and mnasnet
        model.num_classes = num_classes  # pyright: ignore[reportArgumentType]
    model.set_submodule(name, new.to(device, old.weight.dtype))
