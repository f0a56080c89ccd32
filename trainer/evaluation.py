"""Evaluate a model: while it trains, and afterwards from its checkpoint, to the same numbers."""

import json as json_module
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from trainer import loading
from trainer.data import Images, load_data, load_test
from trainer.errors import DataError, check_least
from trainer.features import Features, Source
from trainer.metrics import Totals, means
from trainer.processes import cores_per_process, in_turn, say, start
from trainer.sampling import BatchPlan, KeyedDataset
from trainer.split import split_model
from trainer.steps import Step, classification


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    tail: nn.Module,
    source: Source,
    *,
    plan: BatchPlan,
    step: Step,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The means of the step's values over every sample of `source`, each counted once (a collective).

    Args:
        tail: as the accelerator prepared it, without the wrapper that reduces gradients; put in eval mode.
        source: features of the images.
        plan: its micro-batch and processes are used.
        between: called after each batch, the same number of times on every process.
    """
    tail.eval()
    totals = Totals(accelerator.device)
    batches = source.batches(plan.eval_batches(len(source), rank=accelerator.process_index), epoch=0)
    for _ in plan.eval_batches(len(source), rank=0):  # no process has more
        if batch := next(batches, None):
            totals.add(step(tail, batch))
        between()
    sums = totals.over_processes(accelerator)
    assert sums["samples"] == len(source), f"evaluated {sums['samples']} samples of {len(source)}"
    return means(sums)


def validation_images(state: dict[str, Any]) -> Images:
    """The validation images of the run that a checkpoint is from. Raises what `load_data` raises."""
    config = state["config"]
    data = config["data"]
    _, images = load_data(
        data["data"], val_fraction=data["val_fraction"], seed=config["run"]["seed"], root=data["data_root"]
    )
    if list(images.classes) != list(state["classes"]):
        found, expected = (", ".join(classes) for classes in (images.classes, state["classes"]))
        raise DataError(f"{data['data']} has the classes {found} now; the model was trained on {expected}.")
    return images


def evaluate_run(
    run: str, *, data: str | None = None, weights: str | None = None, workers: int | None = None, json: bool = False
) -> dict[str, Any]:
    """Evaluate a run's best checkpoint, on any number of processes; prints what it finds (a collective).

    On the run's own validation images the numbers are those of training to the last digit: the same split of the model,
    the same micro-batch and the same precision are used, whatever the launcher says of it.

    Args:
        run: a run, a checkpoint or an exported file.
        data: other images, as in `data.load_test`; None: the run's validation images.
        weights: where the frozen weights are, if they have moved.
        workers: processes that load images, per process; None: one per core.
        json: print JSON instead of a table.

    Returns:
        {"checkpoint", "data", "samples", "all": {"loss": ..., "accuracy": ...}, "classes": {name: {"samples", ...}}}
    """
    check_least(0, workers=workers)
    path = loading.find(run)
    state = loading.read(path)
    compute, config = state["compute"], state["config"]
    # fp16 needs a GPU; without one its numbers cannot be had again, and fp32 is what is nearest.
    fits = compute["precision"] != "fp16" or torch.cuda.is_available()
    os.environ["ACCELERATE_MIXED_PRECISION"] = compute["precision"] if fits else "no"
    accelerator = start(exact=config["run"]["exact"])
    loaded = in_turn(accelerator, partial(loading.load, path, device=accelerator.device, weights=weights))
    root = config["data"]["data_root"]
    own = partial(validation_images, state)
    images = in_turn(accelerator, partial(load_test, data, state["classes"], root=root) if data else own)

    if config["data"].get("fast_decode"):
        images.shrink(2 * loaded.input.resize)
    dataset = KeyedDataset(images, images.labels, loaded.transform.resize, seed=0)
    normalize = loaded.transform.normalize
    sample = normalize(dataset.some(8).to(accelerator.device))
    parts = split_model(loaded.model, sample[:1])
    if config["model"].get("compile_tail"):
        parts.tail.compile(dynamic=False)
    workers = cores_per_process(accelerator) if workers is None else workers
    ranks, micro = accelerator.num_processes, compute["micro_batch"]
    batch = compute.get("trunk_batch", micro)
    features = Features(accelerator, parts.trunk, normalize, sample, batch=batch, workers=workers)
    stream = features.stream(dataset, views=1)
    features.plan(val=stream, epochs=1, micro=micro, compile=config["model"].get("compile", "off"))
    plan = BatchPlan(max(len(dataset), ranks), micro * ranks, micro, ranks)
    tail = accelerator.unwrap_model(accelerator.prepare_model(parts.tail, evaluation_mode=True))  # in its precision
    plain, seen = classification(), []

    def step(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        values = plain(model, batch)
        seen.append({"label": batch["label"].cpu(), **{name: value.cpu() for name, value in values.items()}})
        return values

    quiet = None if accelerator.is_main_process else True  # None: quiet unless on a terminal
    with tqdm(total=len(plan.eval_batches(len(dataset), rank=0)), leave=False, disable=quiet) as bar:
        found = evaluate(
            accelerator, tail, features.keep(stream), plan=plan, step=step, between=lambda: bar.update() and None
        )
    seen = gather_object(seen) if ranks > 1 else seen
    rows = {name: torch.cat([values[name] for values in seen]) for name in seen[0]}
    label = rows.pop("label")
    classes = {}
    for index, name in enumerate(loaded.classes):
        totals, mine = Totals(torch.device("cpu")), label == index
        totals.add({metric: values[mine] for metric, values in rows.items()})
        classes[name] = {"samples": int(mine.sum()), **means(totals.sums())}
    result = {"checkpoint": str(path), "data": data or config["data"]["data"], "samples": len(dataset)}
    result |= {"all": found, "classes": classes}
    say(json_module.dumps(result, indent=1, ensure_ascii=False) if json else _table(result, state, data is None, fits))
    return result


def _table(result: dict[str, Any], state: dict[str, Any], own: bool, fits: bool) -> str:
    metrics = sorted(result["all"])
    width = min(
        max(map(len, ["class", *result["classes"]])), shutil.get_terminal_size().columns - 9 - 12 * len(metrics)
    )
    lines = [f"{result['checkpoint']}: epoch {state['epoch']}, step {state['step']}"]
    lines += [f"{result['data']}: {result['samples']:,} image{'s' * (result['samples'] > 1)}", ""]
    lines += [f"{'class':{width}} {'images':>8}" + "".join(f"{name:>12}" for name in metrics)]
    for name, values in result["classes"].items():
        numbers = "".join(f"{values[metric]:12.4f}" if metric in values else f"{'–':>12}" for metric in metrics)
        lines.append(f"{loading.shorten(name, width):{width}} {values['samples']:8,}{numbers}")
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
