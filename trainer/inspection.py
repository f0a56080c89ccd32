"""Look at models and checkpoints, compare them, check them: what `python -m trainer inspect` and `verify` print."""

import hashlib
import json as json_module
import os
import re
import shutil
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model_weights

from trainer import checkpoint, loading
from trainer.backbones import build_model, input_spec, model_names
from trainer.errors import CheckpointError, UsageError
from trainer.freezing import freeze
from trainer.split import split_model
from trainer.weights import read_state

_SHOWN = ("epoch", "step", "samples", "metrics", "classes", "base", "freeze_plan", "config", "compute")
_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int64": "i64"}
Row = dict[str, Any]


def inspect(
    target: str | None = None,
    *,
    train: tuple[str, ...] = (),
    names: bool = False,
    grep: str | None = None,
    depth: int = 2,
    json: bool = False,
    diff: tuple[str, str] | None = None,
    save_plan: str | None = None,
    image_size: int | None = None,
    num_classes: int = 1000,
) -> None:
    """Print what a model, a checkpoint or a run is; see `__main__.Inspect`. Models take no memory for their values.

    Raises UsageError, CheckpointError or DataError: there is no such thing, or it cannot be read.
    """
    try:
        pattern = re.compile(grep or "")
    except re.error as error:
        raise UsageError(f"--grep {grep!r} is not a regular expression: {error}.") from None
    if (target is None) == (diff is None):
        raise UsageError("expected either a model, checkpoint or run to show, or --diff A B.")
    if diff is not None:
        report = _difference(*diff, pattern)
        print(json_module.dumps(report, indent=1) if json else _difference_text(report))
        return
    name, size, plan, report = target, image_size, None, {}
    if target not in model_names():
        if not os.path.exists(os.path.expanduser(target)):
            build_model(target, num_classes)  # says which names are close
        path = loading.find(target)
        tensors, state = _open(path)
        held = _rows(tensors)
        report = {"path": str(path), "bytes": path.stat().st_size, "holds": held}
        if state is None:  # weights of whatever model
            shown = [_name_line(row) for row in held if pattern.search(row["name"])]
            print(json_module.dumps(report, indent=1) if json else "\n".join(shown))
            return
        if state["base"].get("source") == "module":
            raise UsageError(f"{path} is of a module of your own, which cannot be built by name; --diff works.")
        report |= {key: state[key] for key in _SHOWN}
        name, num_classes, plan = state["config"]["model"]["name"], len(state["classes"]), state["freeze_plan"]
        wanted = image_size or state["config"]["data"]["image_size"]
        size = input_spec(name, state["base"].get("weights", "none"), wanted).size

    with torch.device("meta"):
        backbone = build_model(name, num_classes, weights="none", image_size=size)
    model, size, head = backbone.model, backbone.input.size, backbone.head
    stored = plan is not None and not train
    plan = freeze(model, plan["train"] if stored else train or ("head",), head=head)
    if save_plan is not None:
        plan.save(os.path.expanduser(save_plan))
    try:
        modules = _modules(model, size)
        cut = split_model(model, torch.empty(2, 3, size, size, device="meta"))
    except RuntimeError as error:
        least = get_model_weights(name).DEFAULT.meta["min_size"][0]
        raise UsageError(f"image_size is {size}: {name} takes {least} pixels or more ({error}).") from error
    report |= {"model": name, "image_size": size, "head": list(head), "train": str(plan), "split": str(cut)}
    report |= {"total": modules[0], "modules": [row for row in modules if pattern.search(row["name"])]}
    report["parameters"] = [row for row in _rows(dict(model.named_parameters())) if pattern.search(row["name"])]
    if json:
        print(json_module.dumps(report, indent=1, ensure_ascii=False))
    else:
        print(_text(report, names=names, depth=depth, flat=grep is not None))


def _open(path: Path) -> tuple[dict[str, Tensor], checkpoint.State | None]:
    """The tensors of a file; and what a checkpoint or an export says of itself."""
    if not (path.parent.name == "checkpoints" or checkpoint.is_checkpoint(path) or loading.is_export(path)):
        return read_state(path), None
    state = loading.read(path)
    return state["model"], state


# ------------------------------------------------------------------------------------------------------------ models


def _modules(model: nn.Module, size: int) -> list[Row]:
    """One row per module, the model itself first, each with all that is in it; multiply-adds are those of one image."""
    modules = dict(model.named_modules())
    modes = {name: "train" if module.training else "eval" for name, module in modules.items()}
    shapes: dict[str, list[int]] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes[name] = list(output.shape[1:])

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it makes one operation of an attention, which is not counted
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, 3, size, size, device="meta"))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
        model.train()
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    rows = []
    for name, module in modules.items():
        parameters = list(module.parameters())
        total, some = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
        row = {"name": name, "type": type(module).__name__, "output": shapes.get(name)}
        row |= {"parameters": total, "trainable": some, "mode": modes[name]}
        row["state"] = "" if not total else "frozen" if not some else "trains" if some == total else "part"
        row["dtype"] = "+".join(sorted({_dtype(parameter) for parameter in parameters}))
        row["bytes"] = sum(tensor.nbytes for tensor in (*parameters, *module.buffers()))
        row["multiply_adds"] = flops.get(f"{type(model).__name__}.{name}" if name else "Global", 0) // 2
        rows.append(row)
    return rows


def _rows(tensors: dict[str, Tensor]) -> list[Row]:
    return [
        {"name": name, "shape": list(value.shape), "dtype": _dtype(value)}
        | ({"trains": value.requires_grad} if isinstance(value, nn.Parameter) else {})
        for name, value in tensors.items()
    ]


def _dtype(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


# -------------------------------------------------------------------------------------------------------------- text


def _text(report: dict[str, Any], *, names: bool, depth: int, flat: bool) -> str:
    lines, columns = [], shutil.get_terminal_size().columns

    def add(title: str, text: str) -> None:
        lines.extend(textwrap.wrap(f"{title:7} {text}", columns, subsequent_indent=" " * 8))

    if "path" in report:
        add("file", f"{report['path']}: {_short(report['bytes'])}B, epoch {report['epoch']}, step {report['step']}")
        values = sum(torch.Size(row["shape"]).numel() for row in report["holds"])
        add("holds", f"{len(report['holds'])} tensors, {values:,} values")
        for part, means in report["metrics"].items():
            add(part, ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        more = ", …" if len(report["classes"]) > 20 else ""
        add("classes", f"{len(report['classes'])}: {', '.join(report['classes'][:20])}{more}")
        for group, settings in [("base", report["base"]), *report["config"].items()]:
            said = {key: " ".join(value) if isinstance(value, list) else value for key, value in settings.items()}
            add(group, ", ".join(f"{key} {value}" for key, value in said.items() if value is not None))
        lines.append("")
    if names:
        lines += map(_name_line, report["parameters"])
    else:
        width = max(columns - 55, 16)
        titles = ("output", "params", "", "mode", "type", "bytes", "mul-add")
        lines.append("{:{}} {:>12} {:>7} {:6} {:5} {:>4} {:>6} {:>7}".format("module", width, *titles))
        for row in report["modules"]:
            parts = row["name"].split(".") if row["name"] else []
            if len(parts) > depth and not flat:
                continue
            label = row["name"] if flat else ("  " * len(parts) + "".join(parts[-1:]))
            label = f"{loading.shorten(label, width)} {row['type']}"[:width]
            shape = "×".join(map(str, row["output"] or ()))
            numbers = f"{shape:>12} {_short(row['parameters']):>7} {row['state']:6} {row['mode']:5} {row['dtype']:>4}"
            lines.append(f"{label:{width}} {numbers} {_short(row['bytes']):>6} {_short(row['multiply_adds']):>7}")
    total = report["total"]
    lines.append("")
    add("model", f"{report['model']} at {report['image_size']} px, head {', '.join(report['head'])}")
    add("total", f"{total['parameters']:,} parameters, {total['bytes']:,} bytes with buffers")
    add("", f"{total['multiply_adds']:,} multiply-adds an image")
    add("train", report["train"])
    add("split", report["split"])
    return "\n".join(lines)


def _name_line(row: Row) -> str:
    flag = {True: "trains  ", False: "frozen  "}.get(row.get("trains"), "")
    return f"{flag}{row['dtype']:4} {'×'.join(map(str, row['shape'])):>14}  {row['name']}"


def _short(number: float) -> str:
    """Three digits and a unit: 11.2M."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


# -------------------------------------------------------------------------------------------------------------- diff


def _difference(a: str, b: str, pattern: re.Pattern[str]) -> dict[str, Any]:
    """Two checkpoints by parameter: the 2-norm of b - a, and of a; and what else differs between them."""
    paths = [loading.find(target) for target in (a, b)]
    (left, first), (right, second) = (_open(path) for path in paths)
    report: dict[str, Any] = {"a": str(paths[0]), "b": str(paths[1]), "tensors": []}
    for name in (name for name in left | right if pattern.search(name)):
        row = {"name": name, "shapes": [list(side[name].shape) if name in side else None for side in (left, right)]}
        if row["shapes"][0] == row["shapes"][1]:
            here, there = left[name].double(), right[name].double()
            row |= {"norm": here.norm().item(), "change": (there - here).norm().item()}
        report["tensors"].append(row)
    frozen = [(state or {}).get("fingerprint", {}) for state in (first, second)]
    report["frozen_differ"] = sorted(n for n in frozen[0].keys() & frozen[1].keys() if frozen[0][n] != frozen[1][n])
    settings = [_settings(state or {}) for state in (first, second)]
    names = sorted(settings[0].keys() | settings[1].keys())
    pairs = {name: [values.get(name) for values in settings] for name in names}
    report["settings"] = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return report


def _settings(state: checkpoint.State) -> dict[str, Any]:
    found = {f"{group}.{name}": v for group, some in state.get("config", {}).items() for name, v in some.items()}
    return found | {name: state[name] for name in ("epoch", "step", "classes") if name in state}


def _difference_text(report: dict[str, Any]) -> str:
    lines = [f"a  {report['a']}", f"b  {report['b']}", "", f"{'|b - a|':>10} {'|a|':>10} {'share':>8}  parameter"]
    for row in report["tensors"]:
        if "change" in row:
            share = f"{row['change'] / row['norm']:.2%}" if row["norm"] else ""
            lines.append(f"{row['change']:10.4g} {row['norm']:10.4g} {share:>8}  {row['name']}")
        else:
            shapes = ["none" if shape is None else "×".join(map(str, shape)) for shape in row["shapes"]]
            lines.append(f"{' → '.join(shapes):>30}  {row['name']}")
    changed = sum(row.get("change") != 0 for row in report["tensors"])
    lines += ["", f"{changed} of {len(report['tensors'])} tensors differ"]
    if names := report["frozen_differ"]:
        lines.append(f"{len(names)} frozen tensors differ, such as {names[0]}")
    return "\n".join([*lines, *(f"{name}: {a} → {b}" for name, (a, b) in report["settings"].items())])


# ------------------------------------------------------------------------------------------------------------ verify


def verify(path: str, *, weights: str | None = None) -> None:
    """Check a checkpoint, each one of a run, or an export: checksum, contract, fingerprint; see `__main__.Verify`.

    Raises CheckpointError: some are bad; each with its reason.
    """
    place = Path(os.path.expanduser(path))
    place = place.parent if loading.is_export(place) else place
    folder = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    files = [place] if place.is_file() else [*checkpoint.steps(folder), *folder.glob("best.pt")]
    files += [place / loading.ABOUT] if (place / loading.ABOUT).is_file() else []
    if not files:
        raise CheckpointError(f"{path}: there is no checkpoint and no export here.")
    problems = []
    for file in files:
        try:
            print(f"ok   {file}: {_verified(file, weights)}", flush=True)
        except (ValueError, OSError, KeyError) as error:
            problems.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            print(f"bad  {file}", flush=True)
    if problems:
        raise CheckpointError("\n  ".join([f"{len(problems)} of {len(files)} cannot be used:", *problems]))


def _verified(file: Path, weights: str | None) -> str:
    """What was found right; raises what is wrong."""
    if file.name == loading.ABOUT:  # of an export: all its files
        files = loading.read_about(file)["files"]
        for name, facts in files.items():
            if hashlib.sha256(file.with_name(name).read_bytes()).hexdigest() != facts["sha256"]:
                raise CheckpointError(f"{file.with_name(name)} is damaged: its content does not match its sha256.")
            if loading.is_export(file.with_name(name)):
                loading.load(file.with_name(name), device="cpu", weights=weights)
        return ", ".join(files)
    about = loading.load(file, device="cpu", weights=weights).about
    trained, frozen = about["freeze_plan"]["trainable"], len(about["fingerprint"])
    if (state := about["optimizer"]["state"]) and state.keys() != set(trained):
        raise CheckpointError(f"{file}: its optimizer state is not of the parameters that train.")
    return f"epoch {about['epoch']}, step {about['step']}; {len(trained)} parameters; base as fingerprinted ({frozen})"
