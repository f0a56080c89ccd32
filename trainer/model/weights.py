"""Where pretrained weights come from, and how they are matched to the model.

What `weights` (`--weights`) may be:

    default                           torchvision's recommended weights of the model
    IMAGENET1K_V2                     other torchvision weights of it; ResNet50_Weights.IMAGENET1K_V2 does as well
    path/to/file.pth                  a state dict in a file: .pt, .pth or .safetensors; or a checkpoint of a run
    https://host/name-0123abcd.pth    the same behind an http, https or file URL; a hash in the name is verified
    none                              none: random features, for tests and for training from scratch

Weights that cannot be found or do not fit are an error: nothing falls back to random values. The settings
`--weights-*` choose the tensors that are taken from a file and rename them; a `Report` lists the result.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from trainer.config import WeightsConfig
from trainer.errors import DataError, UsageError
from trainer.model.download import fetch_url, place_of
from trainer.model.weights_file import distinct, read_state
from trainer.model.weights_filter import check_choice, chosen, renamed
from trainer.storage import files


@dataclass(frozen=True)
class Source:
    """Where the weights of a backbone are.

    Attributes:
        path: local file, its sha256 checked if one is known; None for random features.
        base: plain values with which the same weights are found again, see `Classifier`.
    """

    path: Path | None
    base: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Which tensors of a file were loaded into a model, by their names in the model.

    Attributes:
        file: path of the file.
        loaded: tensors that were copied into the model.
        missing: tensors of the model, outside the head, that the file or the choice from it lacks: they are random.
        unexpected: tensors of the file that the model does not have.
        shape_differs: tensors of both with different shapes, as text.
        left_out: tensors of the file that the settings did not choose.
        set_aside: chosen tensors of a head for other classes.
        parameters: number of values in the parameters outside the head: from the file, and in all.
    """

    file: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    shape_differs: list[str]
    left_out: list[str]
    set_aside: list[str]
    parameters: tuple[int, int]

    @property
    def coverage(self) -> float:
        """Share of the parameter values outside the head that came from the file, 0 to 1."""
        return self.parameters[0] / max(self.parameters[1], 1)

    def __str__(self) -> str:
        lists = {name.replace("_", " "): value for name, value in asdict(self).items() if isinstance(value, list)}
        counts = ", ".join(f"{len(value)} {name}" for name, value in lists.items() if value)
        share = int(1000 * self.coverage) / 10  # rounded down: 100 means all
        return f"{share:g}% of the parameters outside the head; tensors: {counts or 'none'}"

    def to_dict(self) -> dict[str, Any]:
        """The content of `weights_report.json`, in plain types."""
        return {"coverage": self.coverage, **asdict(self), "parameters": list(self.parameters)}


def find_enum(model: str, weights: str) -> WeightsEnum | None:
    """Torchvision's own weights of a model, by name; None if `weights` does not name any. Downloads nothing.

    Args:
        model: name of a torchvision model.
        weights: see the top of this file; upper and lower case are the same.
    """
    kind = models.get_model_weights(model)
    return _by_name(kind).get(weights.lower().removeprefix(f"{kind.__name__}.".lower()))


def fetch_weights(model: str, weights: str, *, sha256: str | None = None) -> Source:
    """Find the weights of a torchvision model, and download them if they are not on this machine.

    Downloads are kept in torch.hub's folder of checkpoints, which the environment variable TORCH_HOME moves.

    Args:
        model: name of a torchvision model.
        weights: see the top of this file.
        sha256: of the file, if it is known, as from a checkpoint; checked before the file is used.

    Raises:
        UsageError: `weights` is none of the forms at the top of this file.
        DataError: the file cannot be downloaded or read, or has another sha256.
    """
    if weights.lower() == "none":
        return Source(None, {"source": "random"})
    if enum := find_enum(model, weights):
        path, found = fetch_url(enum.url, sha256=sha256)
        return Source(path, {"source": "torchvision", "weights": str(enum), "url": enum.url, "sha256": found})
    if re.match(r"(https?|file)://", weights, re.IGNORECASE):
        path, found = fetch_url(weights, sha256=sha256)
        return Source(path, {"source": "url", "url": weights, "sha256": found})
    path = Path(os.path.expanduser(weights)).absolute()  # absolute: a resumed run may start in another folder
    if path.is_file():
        try:
            found = files.sha256_of(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if sha256 is not None and found != sha256:
            raise DataError(f"{path} is not the file that was meant: expected a sha256 of {sha256}, got {found}.")
        return Source(path, {"source": "file", "path": str(path), "sha256": found})
    names = ", ".join(enum.name for enum in dict.fromkeys(_by_name(models.get_model_weights(model)).values()))
    if path.is_dir():
        raise UsageError(f"weights {weights!r} is a folder; expected a file, such as checkpoints/best.pt in a run.")
    raise UsageError(
        f"weights {weights!r}: neither a file here, nor an http, https or file URL, nor one of the weights of {model}:"
        f" default, none, {names}"
    )


def base_weights(model: str, base: Mapping[str, Any]) -> tuple[str, str | None]:
    """The weights that a checkpoint was trained from, if it is safe to use them.

    A checkpoint may come from a stranger. Torchvision's own weights are downloaded from torchvision's address. A file,
    or the copy of a URL, is used if it is on this machine and has the sha256 in the checkpoint. Everything else has to
    be named by the user.

    Args:
        model: name of a torchvision model.
        base: from the checkpoint, see `Classifier.base`.

    Returns:
        `weights` and `sha256` for `fetch_weights`.

    Raises:
        UsageError: the checkpoint names a place that only the user may name, or no weights at all.
        DataError: the file is not there any more, or is empty.
    """
    kind, sha256 = base.get("source"), base.get("sha256")
    if kind == "random":
        return "none", None
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError("the checkpoint does not record the sha256 of its weights: say where, with --weights.")
    if kind == "torchvision" and isinstance(name := base.get("weights"), str) and find_enum(model, name):
        return name, sha256
    if kind == "url" and isinstance(url := base.get("url"), str):
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise UsageError(f"the checkpoint names weights at {url!r}; if you trust that, repeat it with --weights.")
        if not place_of(url).is_file():
            raise UsageError(
                f"the checkpoint names weights that are not on this machine: to download them, --weights {url}"
            )
        return url, sha256
    if kind == "file" and isinstance(place := base.get("path"), str):
        if not Path(place).is_file():
            raise DataError(f"the weights it was trained on are not at {place} any more: say where, with --weights.")
        if not Path(place).stat().st_size:  # such as those of /proc, some of which never end
            raise DataError(f"the weights it was trained on are at {place}, which is empty: say where, with --weights.")
        return place, sha256
    raise UsageError(f"the checkpoint does not say where its weights are ({dict(base)}): say where, with --weights.")


def load_backbone_state(
    model: nn.Module,
    source: Source,
    *,
    heads: tuple[str, ...] = (),
    own_head: str = "",
    match: WeightsConfig | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Report:
    """Copy the weights of a file into a model.

    Names in old files of torchvision, and of wrapped models (`module.`, `_orig_mod.`), are translated. By default the
    file must hold each tensor of the model in its shape, and no other. Only `num_batches_tracked` may be missing:
    files from before PyTorch 0.4.1 lack this count, and these models never read it.

    Args:
        model: on the CPU; parameters on the meta device are given memory here.
        source: where the file is.
        heads: names of modules that keep their values, whether or not the file has tensors for them.
        own_head: name of the module that takes the file's values if their shapes fit, and keeps its own otherwise.
        match: which tensors are taken, and under which names; None: all, under their own.
        state: the tensors, if they are not the content of the file itself.

    Raises:
        DataError: the file does not fit, names the tensors; the model is then unchanged.
        UsageError: a pattern fits no tensor, or the settings contradict the file; the model is then unchanged.
    """
    assert source.path is not None, "random features have nothing to load"
    match, file = match or WeightsConfig(), source.path
    check_choice(match, file)
    given = dict(read_state(file) if state is None else state)
    if match.weights_rename:
        given = distinct(zip(renamed(list(given), match.weights_rename, file), given.values(), strict=True), file)
    taken = {name: given[name] for name in chosen(list(given), match, model, own_head, file)}

    # Filled in and loaded as a whole, because it has the format version that MNASNet refuses to load without.
    full = model.state_dict()
    parameters = {k: p.numel() for k, p in model.named_parameters() if not _below(k, (*heads, own_head))}
    if any(k not in taken or taken[k].shape != v.shape for k, v in full.items() if _below(k, (own_head,))):
        heads = (*heads, own_head)
    wanted = {k: v for k, v in full.items() if not _below(k, heads)}
    found = {k: v for k, v in taken.items() if not _below(k, heads)}
    fits = [k for k in wanted if k in found and found[k].shape == wanted[k].shape]
    report = Report(
        str(file),
        loaded=fits,
        missing=[k for k in wanted if k not in found and not k.endswith(".num_batches_tracked")],
        unexpected=[k for k in found if k not in wanted],
        shape_differs=[
            f"{k} {list(found[k].shape)}, not {list(v.shape)}"
            for k, v in wanted.items()
            if k in found and found[k].shape != v.shape
        ],
        left_out=[k for k in given if k not in taken],
        set_aside=[k for k in taken if _below(k, heads)],
        parameters=(sum(parameters.get(k, 0) for k in fits), sum(parameters.values())),
    )
    # Integers in the place of floats are quantised values, whose scale is stored elsewhere.
    kinds = [k for k in fits if found[k].is_complex() or found[k].is_floating_point() < wanted[k].is_floating_point()]
    values = {k: found[k].detach().to(wanted[k].dtype) for k in fits if k not in kinds}
    bad = {
        "of another type": [f"{k} {found[k].dtype}, not {wanted[k].dtype}" for k in kinds],
        "not finite": [k for k, v in values.items() if not v.isfinite().all()],
    }
    _check_report(report, bad, match, given, type(model).__name__)
    # Cloned: tensors of a file can share memory. Assigned only where there is no memory yet to copy into, because
    # copying keeps tied parameters tied.
    full |= {k: v.clone(memory_format=torch.contiguous_format) for k, v in values.items()}
    model.load_state_dict(full, assign=any(tensor.is_meta for tensor in model.state_dict().values()))
    return report


def _check_report(
    report: Report, bad: dict[str, list[str]], match: WeightsConfig, given: Mapping[str, Tensor], model: str
) -> None:
    """Raise DataError if tensors are `bad`, or differ more than the settings allow."""
    exact, differ = (
        match.weights_match == "exact",
        {
            "missing": [k for k in report.missing if k not in given],
            "unexpected": report.unexpected,
            "of another shape": report.shape_differs,
        },
    )
    rename = "" if report.loaded else ". Names that differ in their beginning are mapped with --weights-rename OLD NEW"
    if any(bad.values()) or (exact and any(differ.values())):
        hint = ", made for another image size?" if any("pos_embedding" in k for k in report.shape_differs) else ""
        advice = rename or ". To take what fits, and leave the rest random: --weights-match shape"
        advice = "" if any(bad.values()) else advice
        raise DataError(f"{report.file} does not fit {model}{hint}: {_listed((differ if exact else {}) | bad)}{advice}")
    if rename or report.coverage < match.weights_coverage:
        raise DataError(
            f"{report.file} gives {model} only {report}; expected at least {match.weights_coverage:.0%} "
            f"(--weights-coverage): {_listed(differ | {'missing': report.missing})}{rename}"
        )


def _below(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a tensor belongs to one of the modules."""
    return name.startswith(tuple(f"{module}." for module in modules if module))


def _listed(problems: Mapping[str, list[str]]) -> str:
    """The number of tensors with each problem, and the first names."""
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for what, names in problems.items()
        if names
    )


def _by_name(kind: type[WeightsEnum]) -> dict[str, WeightsEnum]:
    """Weights by lower-case name, "default" too; without vgg16's IMAGENET1K_FEATURES, which have no classifier."""
    return {name.lower(): enum for name, enum in kind.__members__.items() if enum.meta["categories"]}
