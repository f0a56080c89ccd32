"""Evaluate a trained model, on its own validation images or on others: `python -m trainer evaluate`."""

import json
import math
import os
import platform
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from trainer import evaluation, measures
from trainer.commands import loaded as loading
from trainer.commands import output
from trainer.commands.arguments import Evaluate
from trainer.commands.opened import Opened, dataset_of, open_images, trained_on
from trainer.commands.summary import summary
from trainer.config import SpeedConfig, from_dict
from trainer.data.images import Images
from trainer.data.loader import KeyedDataset, Workers
from trainer.data.sampling import BatchPlan
from trainer.errors import UsageError, check_least, check_probability
from trainer.metrics import Totals, means
from trainer.model.split import split_model
from trainer.processes.startup import precision, start
from trainer.processes.together import gather, main_first, on_main, print_main, versions
from trainer.recipes import Recipe, load_recipe
from trainer.steps import Batch
from trainer.trunk.features import Features


@dataclass
class _Evaluated:
    """A run on a set of images.

    Attributes:
        metrics: those of the recipe, by its names.
        rows: "label", "outputs" [N, ...] and each metric of the step [N], in the order of the images.
        answers: of a classifier; None where outputs are no logits of classes.
    """

    loaded: loading.Loaded
    metrics: dict[str, float]
    rows: dict[str, Tensor]
    answers: measures.Answers | None


def evaluate(command: Evaluate) -> dict[str, Any]:
    """Evaluate a run's best checkpoint, on any number of processes, and print the result (a collective).

    On the run's own validation images the numbers are those of training to the last digit: the same split of the model,
    the same micro-batch and the same precision are used, whatever the launcher says.

    Returns:
        What `--json` writes: "run", "checkpoint", "data", "samples", "all" (the recipe's metrics by their names),
        "classes" (by name), and for a classifier "scores", "confusion", ..., each only where it applies.

    Raises:
        UsageError, CheckpointError, DataError: a run or the images cannot be used, as `load_frozen` and `open_images`
            raise them; or an option needs what the recipe does not have.
        OSError: a file cannot be written; before the work, if that can be known then.
    """
    check_least(0, workers=command.workers)
    check_probability(threshold=command.threshold)
    path, recipe = loading.find(command.run), load_recipe(command.recipe)
    about = loading.read(path)
    compute, config = about["compute"], from_dict(about["config"], str(path))
    # fp16 needs a GPU; without one its numbers cannot be reproduced, and fp32 is closest.
    fits = compute["precision"] != "fp16" or torch.cuda.is_available()
    os.environ["ACCELERATE_MIXED_PRECISION"] = compute["precision"] if fits else "no"
    accelerator = start(exact=config.run.exact)
    json_file, csv_file = on_main(accelerator, lambda: [output.target(command.json), output.target(command.csv)])
    quiet = command.json == "-"
    if not quiet:
        loading.print_differences(recipe, about)
    load = partial(loading.load_frozen, device=accelerator.device, recipe=recipe)
    loaded = main_first(accelerator, load, path, weights=command.weights)
    given = main_first(accelerator, open_images, loaded, command.data)
    first = _evaluated(accelerator, loaded, given.dataset, workers=command.workers)
    other = seen = None
    if command.compare:
        if first.answers is None:
            raise UsageError("--compare needs a classifier: one class for each image, and the default prediction().")
        second = main_first(accelerator, load, loading.find(command.compare))
        if set(second.classes) != set(loaded.classes):
            names = [", ".join(sorted(some.classes)) for some in (loaded, second)]
            raise UsageError(f"{command.run} has the classes {names[0]}, {command.compare} has {names[1]}.")
        same = second.about.get("data") == about.get("data")
        seen = 0 if same and given.own else main_first(accelerator, trained_on, second, given.images)
        number = {name: index for index, name in enumerate(second.classes)}
        dataset = dataset_of(second, given.images)
        assert isinstance(given.images.labels, list)
        dataset.labels = [number[loaded.classes[label]] for label in given.images.labels]
        other = _evaluated(accelerator, second, dataset, workers=command.workers)

    def finish() -> dict[str, Any]:
        result = _result(command, first, given, accelerator)
        if command.compare and other is not None:
            result["compare"] = _compared(command.compare, first, other, given.images) | {"seen_in_training": seen}
        text = json.dumps(_plain(result), indent=1, ensure_ascii=False)
        lines = [text] if quiet else [summary(result, about, note=given.note, fits=fits)]
        if json_file:
            lines.append(f"{command.json}{output.write(json_file, text.encode())}")
        if csv_file:
            rows = _rows(first, given.images)
            lines.append(f"{command.csv}: {len(rows):,} rows{output.write(csv_file, output.as_csv(rows))}")
        print_main(*lines)
        return result

    return on_main(accelerator, finish)


def _evaluated(
    accelerator: Accelerator, loaded: loading.Loaded, dataset: KeyedDataset, *, workers: int | None
) -> _Evaluated:
    """Evaluate a model as in its training (a collective)."""
    about, recipe = loaded.about, loaded.recipe
    compute, config = about["compute"], loaded.config
    normalize = loaded.transform.normalize
    sample = normalize(dataset.some(8).to(accelerator.device))
    parts = split_model(loaded.model, sample[:1])
    if config.speed.compile_tail:
        parts.tail.compile(dynamic=False)
    ranks, micro = accelerator.num_processes, compute["micro_batch"]
    plan = BatchPlan(max(len(dataset), ranks), micro * ranks, micro, ranks)
    compiled = about.get("decided", {}).get("compiled", about["config"].get("model", {}).get("compile") == "on")
    features = Features(
        accelerator,
        parts.trunk,
        normalize,
        sample,
        {"val": dataset},
        config=SpeedConfig(compile="on" if compiled else "off"),
        plan=plan,
        batch=compute.get("trunk_batch", micro),
        workers=Workers.of(accelerator, workers, minutes=config.run.timeout),
    )
    tail = accelerator.unwrap_model(accelerator.prepare_model(parts.tail, evaluation_mode=True))  # in its precision
    plain, seen = recipe.step(config.optim), []

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        values = plain(model, batch)
        seen.append({name: value.cpu() for name, value in {**batch, **values}.items() if name != "inputs"})
        return values

    quiet = None if accelerator.is_main_process else True  # None: quiet unless on a terminal
    with tqdm(total=len(plan.eval_batches(len(dataset), rank=0)), leave=False, disable=quiet) as bar:
        source = features.open("val")
        found = evaluation.evaluate(
            accelerator, tail, source, plan=plan, step=step, metrics=recipe.metrics, between=bar.update
        )
    every = [batch for batches in gather(accelerator, seen) for batch in batches]
    rows = {name: torch.cat([values[name] for values in every]) for name in every[0]}
    order = rows.pop("index").argsort()  # the same on any number of processes
    rows = {name: values[order] for name, values in rows.items()}
    label, outputs, answers = rows["label"], rows.get("outputs"), None
    # Where prediction() is the recipe's own, only it knows what outputs mean.
    if outputs is not None and _is_class(label, loaded.classes) and recipe.prediction is Recipe().prediction:
        outputs = outputs.float()
        if outputs.shape == (len(label), len(loaded.classes)) and bool(torch.isfinite(outputs).all()):
            answers = measures.answers(outputs.numpy(), label.numpy())
    return _Evaluated(loaded, found, rows, answers)


def _is_class(label: Tensor, classes: tuple[str, ...]) -> bool:
    return label.ndim == 1 and not label.is_floating_point() and bool(classes)


def _result(command: Evaluate, given: _Evaluated, on: Opened, accelerator: Accelerator) -> dict[str, Any]:
    """What was evaluated, and all numbers that apply."""
    loaded, rows, answers = given.loaded, given.rows, given.answers
    about, label, outputs = loaded.about, rows["label"], rows.get("outputs")
    result: dict[str, Any] = {
        "run": command.run,
        "checkpoint": str(loaded.path),
        "epoch": about["epoch"],
        "step": about["step"],
        "data": command.data or about["config"]["data"]["data"],
        "own_validation_images": on.own,
        "seen_in_training": on.seen,
        "samples": len(label),
        "device": accelerator.device.type,
        "precision": precision(accelerator),
        "processes": accelerator.num_processes,
        "versions": {"python": platform.python_version(), **versions()},
        "all": given.metrics,
        "classes": _per_class(rows, loaded.classes),
    }
    if answers is not None:
        found = measures.scores(answers)
        for at, name in enumerate(loaded.classes):
            some = ("predicted", "precision", "recall", "f1") if found.per_class.images[at] else ("predicted",)
            result["classes"][name] |= {key: getattr(found.per_class, key)[at].item() for key in some}
        result |= {"scores": measures.as_numbers(found), "confusion": found.confusion.tolist()}
        if command.threshold is not None:
            sure, right = measures.coverage(answers, threshold=command.threshold)
            share = {"coverage": sure / found.images} | ({"accuracy": right / sure} if sure else {})
            result["above_threshold"] = {"threshold": command.threshold, "images": sure, **share}
    elif command.threshold is not None:
        raise UsageError("--threshold needs a classifier: one class for each image, and the default prediction().")
    several = label.ndim == 2 and label.shape[1] == len(loaded.classes) and bool(((label == 0) | (label == 1)).all())
    if several and outputs is not None and outputs.shape == label.shape:
        result["scores"], per = measures.several_labels(outputs.float().numpy(), label.numpy())
        for at, name in enumerate(loaded.classes):
            numbers = {key: values[at].item() for key, values in per.items()}
            result["classes"][name] = {"samples": int(label[:, at].sum()), **numbers}
    return result


def _per_class(given: dict[str, Tensor], classes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The means of each class; empty if labels are no classes."""
    found: dict[str, dict[str, Any]] = {}
    label = given["label"]
    rows = {name: values for name, values in given.items() if name not in ("label", "outputs")}
    for index, name in enumerate(classes if _is_class(label, classes) else ()):
        totals, mine = Totals(torch.device("cpu")), label == index
        totals.add({metric: values[mine] for metric, values in rows.items()})
        found[name] = {"samples": int(mine.sum()), **means(totals.sums())}
    return found


def _compared(run: str, first: _Evaluated, second: _Evaluated, images: Images) -> dict[str, Any]:
    """How two runs differ on the same images."""
    assert first.answers is not None
    if second.answers is None:
        raise UsageError(f"--compare {run}: it is no classifier with finite outputs and the default prediction().")
    names = [
        [some.loaded.classes[index] for index in some.answers.predicted] for some in (first, second) if some.answers
    ]
    labels = [first.loaded.classes[index] for index in first.answers.labels]
    hits = first.answers.hits, second.answers.hits
    lost, gained, p = measures.mcnemar(*hits)
    changed = [
        {"path": images.name(at), "label": labels[at], "run": names[0][at], "compared": names[1][at]}
        for at in np.flatnonzero(hits[0] != hits[1]).tolist()
    ]
    shares = {"accuracy": float(hits[0].mean()), "compared_accuracy": float(hits[1].mean())}
    counts = {"only_run_right": lost, "only_compared_right": gained, "mcnemar_p": p}
    return {"run": run, "checkpoint": str(second.loaded.path), **shares, **counts, "changed": changed}


def _rows(given: _Evaluated, images: Images) -> list[dict[str, Any]]:
    """For each image its path, its label, and what the recipe's `prediction` says."""
    if "outputs" not in given.rows:
        raise UsageError('--csv needs the outputs of the model: let step() of the recipe return them as "outputs".')
    rows, classes, recipe = [], given.loaded.classes, given.loaded.recipe
    labels, outputs = given.rows["label"], given.rows["outputs"].float()
    for index, (label, values) in enumerate(zip(labels.tolist(), outputs, strict=True)):
        label = classes[label] if _is_class(labels, classes) else label
        if given.answers is not None:
            shares = zip(classes, values.softmax(dim=0).tolist(), strict=True)
            said = {"prediction": classes[given.answers.predicted[index]], **dict(shares)}
        else:
            said = recipe.prediction(values, classes)[1]
        rows.append({"path": images.name(index), "label": label, **said})
    return rows


def _plain(value: Any) -> Any:
    """Values for JSON, which knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
