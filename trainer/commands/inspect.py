"""Look at a model, a checkpoint or a run: `python -m trainer inspect`."""

import json
import os
import re
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.commands import loaded as loading
from trainer.commands import tensors
from trainer.commands.arguments import Inspect
from trainer.commands.diff import difference, difference_text
from trainer.commands.text import columns, number, shape, shorten, table
from trainer.config import WeightsConfig, from_dict
from trainer.errors import UsageError, first_sentence
from trainer.model.classifiers import Classifier, build_model, input_spec, model_names
from trainer.model.freezing import freeze
from trainer.model.restoring import NO_BASE
from trainer.model.split import split_model
from trainer.model.weights import find_enum
from trainer.recipes import load_recipe
from trainer.text import counted, listed, short

_SHOWN = ("epoch", "step", "samples", "metrics", "classes", "base", "freeze_plan", "config", "compute")
_OTHER = "not at hand: give --recipe FILE, as in training (trainer/recipe.py builds one with other tensors)"
Row = dict[str, Any]


def inspect(command: Inspect) -> None:
    """Print a model, a checkpoint, a run, or the difference of two. Models take no memory for their values.

    Raises:
        UsageError, CheckpointError, DataError: there is no such thing, or it cannot be read.
    """
    try:
        pattern = re.compile(command.grep or "")
    except re.error as error:
        raise UsageError(f"--grep {command.grep!r} is not a regular expression: {error}.") from None
    target: Any = command.target
    if (target is None) == (command.diff is None):
        raise UsageError("expected either a model, checkpoint or run to show, or --diff A B.")
    if command.diff is not None:
        report = difference(*command.diff, pattern)
        text = difference_text(report)
    else:
        if target not in model_names() and os.path.exists(os.path.expanduser(target)):
            report = _file(loading.find(target), command)
        else:  # a name that is no model's is an error that lists similar ones
            with torch.device("meta"):
                built = build_model(target, command.num_classes, weights="none", image_size=command.image_size)
            report = _model(command, built, target, train=command.train or ("head",))
        text = _text(report, command, pattern)
    for part in ("modules", "parameters"):
        if part in report:
            report[part] = [row for row in report[part] if pattern.search(row["name"])]
    print(json.dumps(report, indent=1, ensure_ascii=False) if command.json else text)


def _file(path: Path, command: Inspect) -> dict[str, Any]:
    """A file; of a checkpoint or an export also its model, if that can be built."""
    held, state = tensors.open_file(path)
    report = {"path": str(path), "bytes": path.stat().st_size, "holds": tensors.rows(held)}
    if state is None:
        return report
    report |= {key: state[key] for key in _SHOWN}
    recipe, own = load_recipe(command.recipe), state["base"].get("source") == "module"
    if not recipe.builds(state):
        return report | {"no_model": NO_BASE}
    config = from_dict(state["config"], str(path))
    name, size = config.model.model, command.image_size or config.data.image_size
    size = size if own else input_spec(name, state["base"].get("weights", "none"), size).size
    try:
        with torch.device("meta"):
            none = WeightsConfig("none")
            built = recipe.model(config.model, none, state["classes"], image_size=size, seed=config.run.seed)
        name = type(built.model).__name__ if own else name
        found = _model(command, built, name, train=command.train or state["freeze_plan"]["train"])
    except (RuntimeError, ValueError) as error:
        if not own and state["classes"]:
            raise
        why = _OTHER if not own else f"{name} does not take a batch of single images: {first_sentence(error)}"
        return report | {"no_model": why}
    held, here = ({row["name"]: row["shape"] for row in rows} for rows in (report["holds"], found["parameters"]))
    same = all(here.get(parameter) == held.get(parameter) for parameter in state["freeze_plan"]["trainable"])
    return report | (found if same else {"no_model": _OTHER})


def _model(command: Inspect, built: Classifier, name: str, *, train: Sequence[str]) -> dict[str, Any]:
    """A model: its modules, its parameters, what trains, and where it would be cut."""
    model, size, head = built.model, built.input.size, built.head
    plan = freeze(model, train, head=head)
    if command.save_plan is not None:
        plan.save(os.path.expanduser(command.save_plan))
    shape = (len(built.input.mean), size, size)
    try:
        modules = _modules(model, shape)
        cut = split_model(model, torch.empty(2, *shape, device="meta"))
    except RuntimeError as error:
        if name not in model_names():
            raise
        default = find_enum(name, "default")
        least = default.meta["min_size"][0] if default else "more"
        raise UsageError(f"image_size is {size}: {name} takes {least} pixels or more ({error}).") from error
    report = {"model": name, "image_size": size, "head": list(head), "train": str(plan), "split": str(cut)}
    report |= {"total": modules[0], "modules": modules}
    return report | {"parameters": tensors.rows(dict(model.named_parameters()))}


def _modules(model: nn.Module, shape: tuple[int, ...]) -> list[Row]:
    """One row per module with everything inside it, the model itself first; multiply-adds are of one image."""
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
            model.eval()(torch.empty(1, *shape, device="meta"))
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
        row["dtype"] = "+".join(sorted({tensors.dtype(parameter) for parameter in parameters}))
        row["bytes"] = sum(tensor.nbytes for tensor in (*parameters, *module.buffers()))
        row["multiply_adds"] = flops.get(f"{type(model).__name__}.{name}" if name else "Global", 0) // 2
        rows.append(row)
    return rows


def _text(report: dict[str, Any], command: Inspect, pattern: re.Pattern[str]) -> str:
    """A report as text, no wider than the terminal."""
    if "epoch" not in report and "path" in report:
        return "\n".join(tensors.line(row) for row in report["holds"] if pattern.search(row["name"]))
    lines = [*_checkpoint(report), ""] if "path" in report else []
    if "no_model" in report:
        lines += [tensors.line(row) for row in report["holds"] if pattern.search(row["name"])]
        return "\n".join([*lines, "", *_wrapped("model", report["no_model"])])
    if command.names:
        lines += [tensors.line(row) for row in report["parameters"] if pattern.search(row["name"])]
    else:
        rows = [row for row in report["modules"] if pattern.search(row["name"])]
        lines += _table(rows, depth=None if command.grep else command.depth)
    total = report["total"]
    lines += ["", *_wrapped("model", f"{report['model']} at {report['image_size']} px, head {listed(report['head'])}")]
    lines += _wrapped("total", f"{counted(total['parameters'], 'parameter')}, {total['bytes']:,} bytes with buffers")
    lines += _wrapped("", f"{total['multiply_adds']:,} multiply-adds an image")
    return "\n".join([*lines, *_wrapped("train", report["train"]), *_wrapped("split", report["split"])])


def _wrapped(title: str, text: str) -> list[str]:
    return textwrap.wrap(f"{title:7} {text}", columns(), subsequent_indent=" " * 8)


def _checkpoint(report: dict[str, Any]) -> list[str]:
    size = short(report["bytes"], "B")
    lines = _wrapped("file", f"{report['path']}: {size}, epoch {report['epoch']}, step {report['step']}")
    values = sum(torch.Size(row["shape"]).numel() for row in report["holds"])
    lines += _wrapped("holds", f"{counted(len(report['holds']), 'tensor')}, {counted(values, 'value')}")
    for part, metrics in report["metrics"].items():
        lines += _wrapped(part, ", ".join(f"{name} {number(value)}" for name, value in metrics.items()))
    lines += _wrapped("classes", f"{len(report['classes'])}: {listed(report['classes'])}")
    for group, settings in [("base", report["base"]), *report["config"].items()]:
        shown = {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in settings.items()}
        lines += _wrapped(group, ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None))
    return lines


def _table(rows: list[Row], *, depth: int | None) -> list[str]:
    """The modules of a model: a tree to some depth, or with whole names."""
    cells, width = [("module", "output", "params", "", "mode", "type", "bytes", "mul-add")], max(columns() - 55, 16)
    for row in rows:
        parts = row["name"].split(".") if row["name"] else []
        if depth is not None and len(parts) > depth:
            continue
        label = row["name"] if depth is None else ("  " * len(parts) + "".join(parts[-1:]))
        label = f"{shorten(label, width)} {row['type']}"[:width].rstrip()
        counts = [short(row[name]) for name in ("parameters", "bytes", "multiply_adds")]
        cells.append(
            (
                label,
                shape(row["output"] or ()),
                counts[0],
                row["state"],
                row["mode"],
                row["dtype"],
                counts[1],
                counts[2],
            )
        )
    return table(cells, "<>><<>>>")
