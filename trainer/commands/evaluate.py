"""Evaluate a trained model, on its own validation images or on others: `python -m trainer evaluate`."""

import json
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainer import evaluation
from trainer.commands import loaded as loading
from trainer.commands.arguments import Evaluate
from trainer.commands.text import columns, shorten, table
from trainer.config import SpeedConfig, from_dict
from trainer.data.files import Decoded
from trainer.data.images import Images
from trainer.data.loader import KeyedDataset, Workers
from trainer.data.open import load_test
from trainer.data.sampling import BatchPlan
from trainer.errors import DataError, check_least
from trainer.metrics import Totals, means
from trainer.model.split import split_model
from trainer.processes.startup import start
from trainer.processes.together import gather, main_first, print_main
from trainer.recipes import Recipe, load_recipe
from trainer.steps import Batch
from trainer.storage import checkpoint
from trainer.trunk.features import Features


def validation_images(state: checkpoint.State | dict[str, Any], recipe: Recipe) -> Images:
    """The validation images of the run that a checkpoint is from. Raises what `images` of the recipe raises."""
    config = from_dict(state["config"], "the settings in the checkpoint")
    _, images = recipe.images(config.data, seed=config.run.seed)
    if list(images.classes) != list(state["classes"]):
        found, expected = (", ".join(classes) for classes in (images.classes, state["classes"]))
        raise DataError(f"{config.data.data} has the classes {found} now; the model was trained on {expected}.")
    return images


def evaluate(command: Evaluate) -> dict[str, Any]:
    """Evaluate a run's best checkpoint, on any number of processes, and print the result (a collective).

    On the run's own validation images the numbers are those of training to the last digit: the same split of the model,
    the same micro-batch and the same precision are used, whatever the launcher says.

    Returns:
        {"checkpoint", "data", "samples", "all": {"loss": ..., "accuracy": ...}, "classes": {name: {"samples", ...}}}

    Raises:
        UsageError, CheckpointError, DataError: the run or the images cannot be used; as `load_frozen`, `load_test` and
            the recipe's `images` raise them.
    """
    check_least(0, workers=command.workers)
    path, functions = loading.find(command.run), load_recipe(command.recipe)
    state = loading.read(path)
    compute, config = state["compute"], from_dict(state["config"], str(path))
    # fp16 needs a GPU; without one its numbers cannot be reproduced, and fp32 is closest.
    fits = compute["precision"] != "fp16" or torch.cuda.is_available()
    os.environ["ACCELERATE_MIXED_PRECISION"] = compute["precision"] if fits else "no"
    accelerator = start(exact=config.run.exact)
    if not command.json:
        loading.print_differences(functions, state)
    loaded = main_first(
        accelerator,
        partial(loading.load_frozen, path, device=accelerator.device, weights=command.weights, recipe=functions),
    )
    root, own = config.data.data_root, partial(validation_images, state, functions)
    images = main_first(
        accelerator, partial(load_test, command.data, state["classes"], root=root) if command.data else own
    )

    if command.data and images.path(0) and (len(loaded.input.mean), loaded.input.max_value) != (3, 255):
        images = Decoded(images, loaded.input.decode)
    if config.speed.fast_decode:
        images.shrink(2 * loaded.input.resize)
    _, transform = functions.transforms(config.data, loaded.input)
    dataset, normalize = KeyedDataset(images, transform, seed=0), loaded.transform.normalize
    sample = normalize(dataset.some(8).to(accelerator.device))
    parts = split_model(loaded.model, sample[:1])
    if config.speed.compile_tail:
        parts.tail.compile(dynamic=False)
    ranks, micro = accelerator.num_processes, compute["micro_batch"]
    plan = BatchPlan(max(len(dataset), ranks), micro * ranks, micro, ranks)
    compiled = state.get("decided", {}).get("compiled", state["config"].get("model", {}).get("compile") == "on")
    features = Features(
        accelerator,
        parts.trunk,
        normalize,
        sample,
        {"val": dataset},
        config=SpeedConfig(compile="on" if compiled else "off"),
        plan=plan,
        batch=compute.get("trunk_batch", micro),
        workers=Workers.of(accelerator, command.workers, minutes=config.run.timeout),
    )
    tail = accelerator.unwrap_model(accelerator.prepare_model(parts.tail, evaluation_mode=True))  # in its precision
    plain, seen = functions.step(config.optim), []

    def step(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        values = plain(model, batch)
        numbers = {name: value.cpu() for name, value in values.items() if name != "outputs"}
        seen.append({"label": batch["label"].cpu(), **numbers})
        return values

    quiet = None if accelerator.is_main_process else True  # None: quiet unless on a terminal
    with tqdm(total=len(plan.eval_batches(len(dataset), rank=0)), leave=False, disable=quiet) as bar:
        source = features.open("val")
        found = evaluation.evaluate(
            accelerator, tail, source, plan=plan, step=step, metrics=functions.metrics, between=bar.update
        )
    every = [batch for batches in gather(accelerator, seen) for batch in batches]
    rows = {name: torch.cat([values[name] for values in every]) for name in every[0]}
    result = {"checkpoint": str(path), "data": command.data or config.data.data, "samples": len(dataset)}
    result |= {"all": found, "classes": _per_class(rows.pop("label"), rows, loaded.classes)}
    as_json = json.dumps(result, indent=1, ensure_ascii=False)
    print_main(as_json if command.json else _table(result, state, command.data is None, fits))
    return result


def _per_class(label: Tensor, rows: dict[str, Tensor], classes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The means of each class; empty if labels are no classes."""
    found: dict[str, dict[str, float]] = {}
    for index, name in enumerate(classes if label.ndim == 1 and not label.is_floating_point() else ()):
        totals, mine = Totals(torch.device("cpu")), label == index
        totals.add({metric: values[mine] for metric, values in rows.items()})
        found[name] = {"samples": int(mine.sum()), **means(totals.sums())}
    return found


def _table(result: dict[str, Any], state: dict[str, Any], own: bool, fits: bool) -> str:
    metrics = sorted(result["all"])
    width = max(columns() - 9 - 12 * len(metrics), 16)
    rows = [("class", "  images", *(f"{name:>11}" for name in metrics))]
    for name, values in result["classes"].items():
        numbers = (f"{values[metric]:.4f}" if metric in values else "–" for metric in metrics)
        rows.append((shorten(name, width), f"{values['samples']:,}", *numbers))
    lines = [f"{result['checkpoint']}: epoch {state['epoch']}, step {state['step']}"]
    lines += [f"{result['data']}: {result['samples']:,} image{'s' * (result['samples'] > 1)}", ""]
    lines += table(rows, "<" + ">" * (len(rows[0]) - 1)) if result["classes"] else []
    lines += ["", "all     " + ", ".join(f"{name} {result['all'][name]!r}" for name in metrics)]
    # In mid-epoch a checkpoint's metrics are those of the epoch before.
    trained = state["metrics"].get("val") if own and not state["totals"] else None
    if trained == result["all"]:
        lines.append("        the same as in training, to the last digit")
    elif trained:
        lines.append("trained " + ", ".join(f"{name} {trained[name]!r}" for name in sorted(trained)))
        here = "cuda" if torch.cuda.is_available() else "cpu"
        why = "another precision (fp16 needs a GPU)" if not fits else f"trained on {state['compute']['device']}"
        lines.append(
            f"        differs: {why}, evaluated on {here}; other images, threads or versions change digits too"
        )
    return "\n".join(lines)
