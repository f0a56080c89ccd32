"""Where pretrained weights come from, and how they are matched to the model.

What `weights` (`--weights`) may be:

    default                           torchvision's recommended weights of the model
    IMAGENET1K_V2                     other torchvision weights of it; ResNet50_Weights.IMAGENET1K_V2 does as well
    path/to/file.pth                  a state dict in a file: .pt, .pth or .safetensors; or a checkpoint of a run
    https://host/name-0123abcd.pth    the same behind an http, https or file URL; a hash in the name is verified
    none                              none: random features, for tests and for training from scratch

Weights are found, or it is an error: nothing falls back to random values unasked. A `WeightsFilter` says which tensors
of a file are taken, and where they go; a `Report` says the result.
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

from trainer.errors import DataError, UsageError
from trainer.model.download import fetch_url, place_of
from trainer.model.weights_file import distinct, read_state
from trainer.model.weights_filter import WeightsFilter, chosen, renamed
from trainer.storage import files

__all__ = [
    "BaseWeights",
    "Report",
    "Source",
    "WeightsFilter",
    "base_weights",
    "fetch_weights",
    "find_enum",
    "load_backbone_state",
    "read_state",
]
_RENAME = ". Names that differ in their beginning are mapped with --weights-rename OLD NEW"


@dataclass(frozen=True)
class Source:
    """Where the weights of a backbone are.

    path: local file, its hash verified where one is known; None for random features.
    base: plain values to find the same weights again, see `Classifier`.
    enum: torchvision's description of the weights; None if they are not its own.
    """

    path: Path | None
    base: dict[str, Any]
    enum: WeightsEnum | None = None


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a file, by the names they have in the model.

    loaded: in the model now.
    missing: of the model, outside the head, and not among those chosen from the file: random.
    unexpected: of the file, without a place in the model.
    shape_differs: of both, in two shapes.
    left_out: of the file, not chosen.
    set_aside: of the file, chosen, but of a head for other classes.
    parameters: how many numbers the parameters outside the head have: from the file, and in all.
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
        """Share of the parameters outside the head that came from the file, 0 to 1."""
        return self.parameters[0] / max(self.parameters[1], 1)

    def __str__(self) -> str:
        lists = {name.replace("_", " "): value for name, value in asdict(self).items() if isinstance(value, list)}
        counts = ", ".join(f"{len(value)} {name}" for name, value in lists.items() if value)
        share = int(1000 * self.coverage) / 10  # rounded down: 100 means all
        return f"{share:g}% of the parameters outside the head; tensors: {counts or 'none'}"

    def to_dict(self) -> dict[str, Any]:
        """All of it, in plain types: what `weights_report.json` holds."""
        return {"coverage": self.coverage, **asdict(self), "parameters": list(self.parameters)}


def find_enum(model: str, weights: str) -> WeightsEnum | None:
    """Torchvision's description of `weights`, or None if they are not its own. Reads no file, downloads nothing.

    model: name of a torchvision builder. weights: see the top of this file; case is ignored.
    """
    kind = models.get_model_weights(model)
    return _by_name(kind).get(weights.lower().removeprefix(f"{kind.__name__}.".lower()))


def fetch_weights(model: str, weights: str, *, sha256: str | None = None) -> Source:
    """Resolve weights for a torchvision model; download what is not here yet.

    Downloads are kept in torch.hub's checkpoint folder (so TORCH_HOME moves them).

    Args:
        model: name of a torchvision builder.
        weights: see the top of this file.
        sha256: of the file, where it is known, such as in a checkpoint; checked before anything reads the file.

    Raises:
        UsageError: `weights` is none of those.
        DataError: it cannot be downloaded, or is not the file that was meant.
    """
    if weights.lower() == "none":
        return Source(None, {"source": "random"})
    if enum := find_enum(model, weights):
        path, found = fetch_url(enum.url, sha256=sha256)
        return Source(path, {"source": "torchvision", "weights": str(enum), "url": enum.url, "sha256": found}, enum)
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


@dataclass(frozen=True)
class BaseWeights:
    """The weights that a checkpoint was trained from.

    weights, sha256: for `fetch_weights`; no hash if the user named other weights.
    download: the URL that `fetch_weights` would download from; None if it would download nothing.
    """

    weights: str
    sha256: str | None = None
    download: str | None = None


def base_weights(model: str, base: Mapping[str, Any], *, weights: str | None = None) -> BaseWeights:
    """Find the weights that a checkpoint names, without trusting it: a file from elsewhere may name anything.

    Torchvision's own weights are downloaded from where torchvision says. A file, or the copy of a URL, is used if it is
    on this machine and has the sha256 in the checkpoint. Nothing else is read or downloaded unless the user names it.

    Args:
        model: name of a torchvision builder.
        base: of the checkpoint; see `Classifier.base`.
        weights: named by the user; used instead, as it is.

    Raises:
        UsageError: the checkpoint names a place that only the user may name, or no weights at all.
        DataError: the file is not there any more, or is another one.
    """
    if weights is not None:
        return _to_fetch(model, weights, None)
    kind, sha256 = base.get("source"), base.get("sha256")
    if kind == "random":
        return BaseWeights("none")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError("the checkpoint does not record the sha256 of its weights: say where, with --weights.")
    if kind == "torchvision" and isinstance(base.get("weights"), str) and find_enum(model, base["weights"]):
        return _to_fetch(model, base["weights"], sha256)
    if kind == "url" and isinstance(url := base.get("url"), str):
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise UsageError(f"the checkpoint names weights at {url!r}; if you trust that, repeat it with --weights.")
        if not place_of(url).is_file():
            raise UsageError(
                f"the checkpoint names weights that are not on this machine: to download them, --weights {url}"
            )
        return BaseWeights(url, sha256)
    if kind == "file" and isinstance(base.get("path"), str):
        path = Path(base["path"])
        if not path.is_file():
            raise DataError(f"the weights it was trained on are not at {path} any more: say where, with --weights.")
        if not path.stat().st_size:  # such as those of /proc, some of which never end
            raise DataError(f"the weights it was trained on are at {path}, which is empty: say where, with --weights.")
        return BaseWeights(str(path), sha256)
    raise UsageError(f"the checkpoint does not say where its weights are ({dict(base)}): say where, with --weights.")


def _to_fetch(model: str, weights: str, sha256: str | None) -> BaseWeights:
    """`weights`, and from where it would be downloaded."""
    enum = find_enum(model, weights)
    url = enum.url if enum else weights if re.match(r"https?://", weights, re.IGNORECASE) else None
    return BaseWeights(weights, sha256, url if url and not place_of(url).exists() else None)


def load_backbone_state(
    model: nn.Module,
    source: Source,
    *,
    heads: tuple[str, ...] = (),
    own_head: str = "",
    match: Any = None,
    state: Mapping[str, Tensor] | None = None,
) -> Report:
    """Copy the weights of `source` into `model`; without `match` exactly: no name missing, none left over, every shape
    the same.

    model: on the CPU; parameters on the meta device are given memory here.
    heads: names of modules to leave alone, whether or not the file has values for them.
    own_head: name of a module that takes the file's values if their shapes are its own, and else is left alone.
    match: which tensors of the file are meant, and what they are called here: a `WeightsFilter`, or any object with its
        fields.
    state: the tensors, if they are not those in the file itself.

    Names of old torchvision files, and of wrapped models (`module.`, `_orig_mod.`), are translated. Only
    `num_batches_tracked` may be missing: a count that files from before PyTorch 0.4.1 lack and these models never read.
    Raises DataError, with the names, or UsageError for a pattern that fits nothing, and then `model` is as it was.
    """
    assert source.path is not None, "random features have nothing to load"
    match, file = WeightsFilter() if match is None else WeightsFilter.of(match), source.path
    if match.weights_first is not None and file.suffix == ".safetensors":
        raise UsageError(f"--weights-first: {file} keeps its tensors by name, in no order; use --weights-only instead.")
    given = dict(read_state(file) if state is None else state)
    if match.weights_rename:
        given = distinct(zip(renamed(list(given), match.weights_rename, file), given.values(), strict=True), file)
    taken = {name: given[name] for name in chosen(list(given), match, model, own_head, file)}

    # Filled in and handed back whole, because it carries the format versions that MNASNet refuses to load without.
    full = model.state_dict()
    parameters = {k: p.numel() for k, p in model.named_parameters() if not _below(k, (*heads, own_head))}
    own = [k for k in full if _below(k, (own_head,))]
    if any(k not in taken or taken[k].shape != full[k].shape for k in own):
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
    differ = {
        "missing": [k for k in report.missing if k not in given],
        "unexpected": report.unexpected,
        "of another shape": report.shape_differs,
    }
    # Whole numbers in the place of others are quantised ones, whose scale is somewhere else.
    kinds = [k for k in fits if found[k].is_complex() or found[k].is_floating_point() < wanted[k].is_floating_point()]
    values = {k: found[k].detach().to(wanted[k].dtype) for k in fits if k not in kinds}
    bad = {
        "of another type": [f"{k} {found[k].dtype}, not {wanted[k].dtype}" for k in kinds],
        "not finite": [k for k, v in values.items() if not v.isfinite().all()],
    }
    if any(bad.values()) or (match.weights_match == "exact" and any(differ.values())):
        hint = ", made for another image size?" if any("pos_embedding" in k for k in report.shape_differs) else ""
        way_on = ". To take what fits, and leave the rest random: --weights-match shape" if fits else _RENAME
        way_on = "" if any(bad.values()) else way_on
        problems = _listed((differ if match.weights_match == "exact" else {}) | bad)
        raise DataError(f"{file} does not fit {type(model).__name__}{hint}: {problems}{way_on}")
    if not fits or report.coverage < match.weights_coverage:
        raise DataError(
            f"{file} gives {type(model).__name__} only {report}; expected at least {match.weights_coverage:.0%} "
            f"(--weights-coverage): {_listed(differ | {'missing': report.missing})}{'' if fits else _RENAME}"
        )
    # Copied: tensors of a file can be views of one memory. Assigned where there is no memory yet to copy into; copying
    # leaves tied parameters tied.
    full |= {k: v.clone(memory_format=torch.contiguous_format) for k, v in values.items()}
    model.load_state_dict(full, assign=any(tensor.is_meta for tensor in model.state_dict().values()))
    return report


def _below(name: str, modules: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{module}." for module in modules if module))


def _listed(problems: Mapping[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for what, names in problems.items()
        if names
    )


def _by_name(kind: type[WeightsEnum]) -> dict[str, WeightsEnum]:
    """Weights by lower-case name, "default" too. Not vgg16's IMAGENET1K_FEATURES: without a classifier."""
    return {name.lower(): enum for name, enum in kind.__members__.items() if enum.meta["categories"]}
