"""Where pretrained weights come from, and how they are matched to the model.

What `weights` (`--weights`) may be:

    default                           torchvision's recommended weights of the model
    IMAGENET1K_V2                     other torchvision weights of it; ResNet50_Weights.IMAGENET1K_V2 does as well
    path/to/file.pth                  a state dict in a file: .pt, .pth or .safetensors; or a checkpoint of a run
    https://host/name-0123abcd.pth    the same behind an http, https or file URL; a hash in the name is verified
    none                              none: random features, for tests and for training from scratch

Weights are found, or it is an error: nothing falls back to random values unasked. Which tensors of a file are taken,
and where they go, is a `Match`; what came of it is a `Report`.
"""

import argparse
import hashlib
import http.client
import os
import re
import socket
import sys
import tempfile
import urllib.error
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from trainer import rules
from trainer.archive import check_members
from trainer.errors import DataError, UsageError, first_sentence
from trainer.freezing import children

__all__ = ["Match", "Report", "Source", "fetch_weights", "find_enum", "load_backbone_state", "read_state"]

_TIMEOUT = 60.0  # seconds without a byte after which a download is given up
_HASH = re.compile(r"-([0-9a-f]{8,})\.")  # torch.hub's convention, name-<sha256 prefix>.pth, without its near misses
_WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")  # left in names by DataParallel, DDP and torch.compile
_NESTED = ("state_dict", "model", "model_state", "model_state_dict", "ema")  # where files keep it; the first counts
_RENAME = ". Names that differ in their beginning are mapped with --weights-rename OLD NEW"
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
    base: dict[str, Any]
    enum: WeightsEnum | None = None


@dataclass(frozen=True)
class Match:
    """Which tensors of a file are meant, and where they go. By default the file is the model.

    by: "exact": every tensor chosen below has a place of its shape in the model, and every place outside the head has
        its tensor in the file, or it is an error. "shape": what has a place of its shape is taken, and nothing else.
    rename: OLD, NEW, OLD, NEW, ...: beginnings of names, in whole parts ("encoder.body"; "" is the empty one), or
        `re:EXPRESSION` and what `re.sub` puts in its place. The first OLD that fits a name is used.
    first: choose among the first so many entries of the file.
    only, but: choose the names that one of these patterns means (see `rules`), and none that one of those means.
    coverage: least share of the parameters outside the head that must come from the file, 0 to 1.

    Raises UsageError for values that cannot be.
    """

    by: str = "exact"
    rename: tuple[str, ...] = ()
    first: int | None = None
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    coverage: float = 0.9

    def __post_init__(self) -> None:
        if self.by not in ("exact", "shape"):
            raise UsageError(f"--weights-match is {self.by!r}; expected exact or shape.")
        if len(self.rename) % 2:
            raise UsageError(f"--weights-rename has {len(self.rename)} names; expected pairs: OLD NEW, OLD NEW, ...")

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, in plain types; `from_dict` takes it back."""
        values = {name: value for name, value in asdict(self).items() if value != getattr(Match, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Match":
        """The inverse of `to_dict`."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


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
    path = Path(os.path.expanduser(weights)).absolute()  # absolute: a resumed run may start in another folder
    if path.is_file():
        return Source(path, {"source": "file", "path": str(path), "sha256": _sha256(path)})
    names = ", ".join(enum.name for enum in dict.fromkeys(_by_name(models.get_model_weights(model)).values()))
    if path.is_dir():
        raise UsageError(f"weights {weights!r} is a folder; expected a file, such as checkpoints/best.pt in a run.")
    raise UsageError(
        f"weights {weights!r}: neither a file here, nor an http, https or file URL, nor one of the weights of {model}:"
        f" default, none, {names}"
    )


def load_backbone_state(
    model: nn.Module,
    source: Source,
    *,
    heads: tuple[str, ...] = (),
    own_head: str = "",
    match: Match | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Report:
    """Copy the weights of `source` into `model`; without `match` exactly: no name missing, none left over, every shape
    the same.

    model: on the CPU; parameters on the meta device are given memory here.
    heads: names of modules to leave alone, whether or not the file has values for them.
    own_head: name of a module that takes the file's values if their shapes are its own, and else is left alone.
    match: which tensors of the file are meant, and what they are called here.
    state: the tensors, if they are not those in the file itself.

    Names of old torchvision files, and of wrapped models (`module.`, `_orig_mod.`), are translated. Only
    `num_batches_tracked` may be missing: a count that files from before PyTorch 0.4.1 lack and these models never read.
    Raises DataError, with the names, or UsageError for a pattern that fits nothing, and then `model` is as it was.
    """
    assert source.path is not None, "random features have nothing to load"
    match, file = match or Match(), source.path
    if match.first is not None and file.suffix == ".safetensors":
        raise UsageError(f"--weights-first: {file} keeps its tensors by name, in no order; use --weights-only instead.")
    given = dict(read_state(file) if state is None else state)
    if match.rename:
        given = _distinct(zip(_renamed(list(given), match.rename, file), given.values(), strict=True), file)
    chosen = {name: given[name] for name in _chosen(list(given), match, model, own_head, file)}

    # Filled in and handed back whole, because it carries the format versions that MNASNet refuses to load without.
    full = model.state_dict()
    parameters = {k: p.numel() for k, p in model.named_parameters() if not _below(k, (*heads, own_head))}
    own = [k for k in full if _below(k, (own_head,))]
    if any(k not in chosen or chosen[k].shape != full[k].shape for k in own):
        heads = (*heads, own_head)
    wanted = {k: v for k, v in full.items() if not _below(k, heads)}
    found = {k: v for k, v in chosen.items() if not _below(k, heads)}
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
        left_out=[k for k in given if k not in chosen],
        set_aside=[k for k in chosen if _below(k, heads)],
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
    if any(bad.values()) or (match.by == "exact" and any(differ.values())):
        hint = ", made for another image size?" if any("pos_embedding" in k for k in report.shape_differs) else ""
        way_on = ". To take what fits, and leave the rest random: --weights-match shape" if fits else _RENAME
        way_on = "" if any(bad.values()) else way_on
        problems = _listed((differ if match.by == "exact" else {}) | bad)
        raise DataError(f"{file} does not fit {type(model).__name__}{hint}: {problems}{way_on}")
    if not fits or report.coverage < match.coverage:
        raise DataError(
            f"{file} gives {type(model).__name__} only {report}; expected at least {match.coverage:.0%} "
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


def _renamed(names: list[str], pairs: tuple[str, ...], file: Path) -> list[str]:
    """The names after `Match.rename`."""
    todo, used, result = list(zip(pairs[::2], pairs[1::2], strict=True)), set(), []
    for name in names:
        options = ((old, _substituted(name, old, new)) for old, new in todo)
        old, new = next(((old, new) for old, new in options if new is not None), (None, name))
        used.add(old)
        result.append(new)
    for old, _ in todo:
        if old not in used:
            raise UsageError(f"--weights-rename {old!r} fits no name in {file}; there are {_tops(names)}.")
    return result


def _substituted(name: str, old: str, new: str) -> str | None:
    """`name` with `new` for `old`, or None if it has no `old`."""
    if old.startswith("re:"):
        try:
            changed, count = re.subn(old[3:], new, name)
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            raise UsageError(f"--weights-rename {old!r} {new!r}: {error}.") from None
        return changed if count else None
    old, new = old.rstrip("."), new.rstrip(".")
    if old and not f"{name}.".startswith(f"{old}."):
        return None
    return ".".join(filter(None, (new, name[len(old) :].lstrip("."))))


def _chosen(names: list[str], match: Match, model: nn.Module, head: str, file: Path) -> list[str]:
    """Those of the file's names that `match` chooses."""

    def meant(patterns: tuple[str, ...], flag: str) -> set[str]:
        found = set()
        for pattern in patterns:
            some = rules.named(pattern, names, children=below, head=filter(None, [head]))
            if not some:
                raise UsageError(f"{flag} {pattern!r} fits no name in {file}; there are {_tops(names)}.")
            found.update(some)
        return found

    below = children(model)
    only, but = meant(match.only, "--weights-only"), meant(match.but, "--weights-except")
    return [name for name in names[: match.first] if name not in but and (name in only or not match.only)]


def _tops(names: list[str]) -> str:
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return ", ".join(tops[:12]) + (", ..." if len(tops) > 12 else "")


def _distinct(items: Iterable[tuple[str, Tensor]], file: Path) -> dict[str, Tensor]:
    """A dict, once no name is found to appear twice: one tensor would silently take another's place."""
    result: dict[str, Tensor] = {}
    for name, value in items:
        if name in result:
            raise DataError(f"two tensors of {file} would be called {name} here; choose with --weights-rename.")
        result[name] = value
    return result


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
                read_state(part)
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


def read_state(path: Path) -> dict[str, Tensor]:
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
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {code[1]}, not only tensors" if code else first_sentence(error)
        reason = _foreign(path) or f"{reason} ({type(error).__name__})"
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
    return _distinct(((_todays_name(key), value) for key, value in state.items() if key != "n_averaged"), path)


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
