"""Build any torchvision classifier, find and replace its head.

    backbone = build_model("resnet50", 10)  # torchvision's recommended weights, a new head of 10 classes
    backbone.head  # ("fc",)
    backbone.input  # InputSpec(size=224, resize=232, ...): what its images must look like

There is no table of heads: the head is the layer with as many outputs as the model has classes. A module of your own
gets its new head in the same way: `build_model(MyNet(), 10, head="classifier")`.
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

from trainer import checkpoint
from trainer.errors import CheckpointError, DataError, UsageError
from trainer.freezing import Fingerprint, check_fingerprint, fingerprint, freeze, trained_tensors
from trainer.weights import Match, Report, fetch_weights, find_enum, load_backbone_state

__all__ = [
    "Backbone",
    "InputSpec",
    "build_model",
    "builder_arguments",
    "fill",
    "input_spec",
    "model_names",
    "rebuild",
    "restore",
]

_BUILT_CLASSES = 1000  # what every torchvision builder gives unasked: the layer with so many outputs is the head
_NAMED = {"torchvision": "weights", "file": "path", "url": "url"}  # where a base of that source says what it is
_AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}  # second classifiers, halfway up


@dataclass(frozen=True)
class InputSpec:
    """What the images must look like before the model sees them.

    size: side of the square crop, pixels.
    resize: shorter side before the centre crop, pixels.
    mean, std: per channel (RGB), of values in [0, 1].
    interpolation: "bilinear" or "bicubic".
    """

    size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


@dataclass
class Backbone:
    """A classifier: pretrained (or random) features under a head for the classes at hand.

    model: images [B, 3, size, size] to logits [B, num_classes], in train mode as in eval mode.
    head: names of the head's modules, for example ("fc",).
    input: what the images must look like.
    base: plain values that say where the frozen weights come from and find them again, one of
        {"source": "torchvision", "weights": "ResNet18_Weights.IMAGENET1K_V1", "url": ..., "sha256": ...}
        {"source": "file", "path": ..., "sha256": ...}
        {"source": "url", "url": ..., "sha256": ...}
        {"source": "random", "seed": ...}
        {"source": "module"}: they came with the module that was passed in
        and with them, if the weights were not simply the model: "match": `Match.to_dict()`, "seed" of what they lack.
    report: what became of the tensors of the file; None if there was none.
    """

    model: nn.Module
    head: tuple[str, ...]
    input: InputSpec
    base: dict[str, Any]
    report: Report | None = None

    @property
    def origin(self) -> str:
        """Where the frozen weights come from, for people."""
        if self.base["source"] == "random":
            return f"random weights from seed {self.base['seed']}: its frozen features are random, not learned"
        named = _NAMED.get(self.base["source"])
        return f"weights {self.base[named]}: {self.report}" if named else "weights as they came with the module"


def model_names() -> list[str]:
    """Names of torchvision's classification models, sorted; nothing else is ever built from a name."""
    return models.list_models(module=models)


def build_model(
    model: str | nn.Module,
    num_classes: int,
    *,
    weights: str = "default",
    match: Match | None = None,
    head: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Build a classifier of `num_classes` classes on pretrained features.

    model: a name from `model_names()`, or a module that maps images [B, 3, H, W] to logits.
    weights: where the features come from, see `trainer.weights`. A module is taken as it is.
    match: which tensors of the weights are meant, and where they go; None: all, and each where its name says. The
        weights' head is taken too if it is one of `num_classes` classes.
    head: name of the last layer, a Linear or an ungrouped Conv2d. Needed for a module, known for a name.
    image_size: crop side, pixels. Default: what the weights were evaluated at (for a module 224); the side before the
        crop keeps its ratio to it. vit and maxvit have it built in, and with pretrained weights take only theirs.
    seed: of the head's values and of random features: the same on any device, whatever else is built or loaded.

    The new head has torch's default initialisation in every family (torchvision's own differ: zeros in vit, narrow
    normals in others). A module's head stays as it is if it has `num_classes` outputs already. The model ends up on
    torch's default device, a module where it was; under `torch.device("meta")` even the largest costs next to nothing.
    The global random state is left as it was.

    Raises UsageError for an argument that cannot be, DataError for weights that cannot be used.
    """
    if num_classes < 2:
        raise UsageError(f"num_classes is {num_classes}: a classifier needs at least 2 classes")
    match = match or Match()
    if match != Match() and (isinstance(model, nn.Module) or weights.lower() == "none"):
        raise UsageError("--weights-match and its like say how the tensors of a file are taken: give --weights a file")
    if isinstance(model, nn.Module):
        return _adapt_module(model, num_classes, weights=weights, head=head, image_size=image_size, seed=seed)
    if model not in model_names():
        close = ", ".join(difflib.get_close_matches(str(model).lower(), model_names(), n=5, cutoff=0))
        raise UsageError(f"there is no model {model!r} among torchvision's classifiers; closest: {close}")

    spec = input_spec(model, weights, image_size)  # before the download: a wrong size should not cost one
    source = fetch_weights(model, weights)
    pretrained = source.path is not None
    before = restore(source.path) if pretrained and checkpoint.is_checkpoint(source.path) else None
    if before and image_size is None:
        spec = before.input

    device = torch.get_default_device()
    # Random values that the file overwrites, or that a meta tensor cannot hold, are not drawn: it would take seconds.
    unset = (pretrained and not match.to_dict()) or device.type == "meta"
    with _seeded(seed, "base"), init_empty_weights(include_buffers=False) if unset else nullcontext():
        net = _construct(model, spec.size, getattr(before.model, "transform_input", True) if before else pretrained)
    (found,) = (name for name, layer in net.named_modules() if _outputs(layer) == _BUILT_CLASSES)
    if head not in (None, found):
        raise UsageError(f"the head of {model} is {found!r}, not {head!r}")
    with _seeded(seed, "head"):
        _replace(net, found, num_classes, "cpu")
    base, report = source.base, None
    if pretrained:
        state = before.model.state_dict() if before else None
        auxiliary = _AUXILIARY.get(model, ())
        report = load_backbone_state(net, source, heads=auxiliary, own_head=found, match=match, state=state)
    if options := match.to_dict():
        base = base | {"match": options}
    if not report or options:
        base = base | {"seed": seed}
    return Backbone(net.to(device), (found,), spec, base, report)


def restore(path: str | Path) -> Backbone:
    """The whole model of a checkpoint: its base found again, its plan applied, its trained tensors laid over.

    The model is in train mode, frozen as it was in training; its outputs are `checkpoint.read(path)["classes"]`.

    Raises CheckpointError if the file is damaged, if its base is not there any more, or is another one than it was.
    """
    state = checkpoint.read(Path(path))
    try:
        backbone = rebuild(state)
        freeze(backbone.model, state["freeze_plan"]["train"], head=backbone.head)
    except (DataError, UsageError) as error:
        raise CheckpointError(f"the model that {path} was trained on cannot be built again: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not say how its model is built: {error!r}") from error
    fill(backbone.model, state["model"], state["fingerprint"])
    return backbone


def rebuild(state: checkpoint.State, *, weights: str | None = None) -> Backbone:
    """The model that a checkpoint was trained from, as it was before training.

    weights: where the frozen weights are, if not where they were; see `build_model`, whose errors it raises, and
        UsageError for a module that came from the user's own code.
    """
    base, config = state["base"], state["config"]
    kind, model = base.get("source"), config["model"]["name"]
    if kind not in (*_NAMED, "random"):
        raise UsageError(
            "this was trained from a module of your own. In Python: trainer.load(..., backbone=trainer.build_model("
            f'MyNet(), {len(state["classes"])}, head="...")), with the frozen weights it had.'
        )
    if kind == "file" and weights is None and not Path(base["path"]).is_file():
        raise DataError(f"the weights it was trained on are not at {base['path']} any more: say where, with --weights.")
    weights = weights or ("none" if kind == "random" else base[_NAMED[kind]])
    source = fetch_weights(model, weights)
    if source.path and checkpoint.is_checkpoint(source.path) and source.base["sha256"] != base.get("sha256"):
        raise DataError(f"{source.path} is another checkpoint now")  # which could go on like this without an end
    return build_model(
        model,
        len(state["classes"]),
        weights=weights,
        match=Match.from_dict(base.get("match", {})),
        image_size=config["data"]["image_size"],
        seed=config["run"]["seed"],
    )


@torch.no_grad()
def fill(model: nn.Module, tensors: dict[str, torch.Tensor], expected: Fingerprint) -> None:
    """Put a checkpoint's tensors into a model that is frozen as it was then; `expected` is of the frozen ones.

    Raises CheckpointError if the frozen tensors are others, or `tensors` not exactly the trained ones; names them.
    """
    check_fingerprint(fingerprint(model), expected)
    live = trained_tensors(model)
    checkpoint.check_tensors(tensors, live)
    for name, tensor in live.items():
        tensor.copy_(tensors[name])


def input_spec(model: str, weights: str, image_size: int | None = None) -> InputSpec:
    """What torchvision's preset for the weights says; for weights not its own, the preset of its recommended ones.

    Takes what `build_model` takes; reads no file, downloads nothing. Raises UsageError for a size that cannot be.
    """
    enum = find_enum(model, weights)
    preset = (enum or models.get_model_weights(model).DEFAULT).transforms()
    native = preset.crop_size[0]
    size = native if image_size is None else image_size
    _check_size(size)
    if enum and size != native and _has_built_in_size(model):
        raise UsageError(f"image_size is {size}, but {enum} takes images of {native} pixels and no others")
    resize = round(size * preset.resize_size[0] / native)
    return InputSpec(size, resize, tuple(preset.mean), tuple(preset.std), preset.interpolation.value)


def _check_size(size: int) -> None:
    # No other limit: the `min_size` of torchvision's metadata is the size trained at for swin, and 33 too much for
    # efficientnet_v2. What a convolution cannot take, it says when it is first run.
    if size < 1:
        raise UsageError(f"image_size is {size}: expected at least 1 pixel")


def _has_built_in_size(model: str) -> bool:
    return model.startswith(("vit_", "maxvit_"))


def builder_arguments(model: str, size: int, *, pretrained: bool) -> dict[str, Any]:
    """What `torchvision.models.get_model(model, ...)` takes besides the classes, to build what `build_model` builds."""
    if model in _AUXILIARY:
        # Without the second classifiers: in train mode they are run whatever `aux_logits` says, their BatchNorm moves,
        # inception_v3's fails below 299 pixels, and over frozen features they would train nothing but themselves.
        # The weights want inputs in [-1, 1], which the model sees to. init_weights: the default, but unset it warns.
        return {"aux_logits": False, "transform_input": pretrained, "init_weights": True}
    if _has_built_in_size(model):
        return {"image_size": size} if model.startswith("vit_") else {"input_size": (size, size)}
    return {}


def _construct(model: str, size: int, pretrained: bool) -> nn.Module:
    """The model as torchvision's own builder makes it before it loads pretrained weights, or without any."""
    try:
        return models.get_model(model, weights=None, **builder_arguments(model, size, pretrained=pretrained))
    except (AssertionError, ValueError) as error:
        if not _has_built_in_size(model):
            raise
        raise UsageError(f"{model} cannot be built for images of {size} pixels: {error}") from error


def _adapt_module(
    model: nn.Module, num_classes: int, *, weights: str, head: str | None, image_size: int | None, seed: int
) -> Backbone:
    if weights not in ("default", "none"):
        raise UsageError(f"weights {weights!r}: a module is used as it is; load them into it first")
    modules = dict(model.named_modules())
    outputs = _outputs(modules.get(head))
    if not head or outputs is None:
        found = type(modules[head]).__name__ if head in modules else "no module of that name"
        names = ", ".join([name for name, layer in modules.items() if name and _outputs(layer)][-8:])
        raise UsageError(
            f"head {head!r} of {type(model).__name__}: expected a Linear or ungrouped Conv2d layer, found {found};"
            f" candidates, the last ones: {names or 'none'}"
        )
    size = 224 if image_size is None else image_size
    _check_size(size)
    if outputs != num_classes:
        with _seeded(seed, "head"):
            _replace(model, head, num_classes, modules[head].weight.device)
    spec = InputSpec(size, round(size * 256 / 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    return Backbone(model, (head,), spec, {"source": "module"})


@contextmanager
def _seeded(seed: int, purpose: str) -> Iterator[None]:
    """Draw on the CPU, from a stream of its own for each `seed` and `purpose`; then put the global generator back.

    Only the CPU's generator is seeded: `torch.manual_seed` would reseed every GPU's, and nothing would put those back.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))
        yield


def _outputs(layer: nn.Module | None) -> int | None:
    """Outputs of a layer that could be a head; None if it could not."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.Conv2d) and layer.groups == 1 else None


def _replace(model: nn.Module, name: str, num_classes: int, device: torch.device | str) -> None:
    """Put a new layer of `num_classes` outputs in the place of `name`: same kind, kernel, dtype, bias or no bias."""
    old = model.get_submodule(name)
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=bias)
    else:  # squeezenet classifies every position, then averages
        shape = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        new = nn.Conv2d(old.in_channels, num_classes, bias=bias, **shape)
    if getattr(model, "num_classes", None) == _outputs(old):  # kept by squeezenet, vit, swin and mnasnet
        model.num_classes = num_classes
    model.set_submodule(name, new.to(device, old.weight.dtype))
