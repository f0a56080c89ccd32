"""A page about a run: `python -m trainer report`."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.commands import loaded as loading
from trainer.commands.arguments import Report
from trainer.commands.opened import open_images
from trainer.data.loader import BatchLoader, KeyedDataset
from trainer.data.transforms import visible
from trainer.processes.cores import cores_here
from trainer.processes.together import versions
from trainer.report import Facts, compare, render
from trainer.report.heatmap import cam
from trainer.storage import files

_BATCH = 32  # images in a forward


def report(command: Report) -> Path:
    """Write a page about a run's best checkpoint on its validation images; of several runs, one that compares them.

    Returns:
        The file.

    Raises:
        UsageError, CheckpointError, DataError: a run or its images cannot be used, or cannot be compared.
        OSError: the file cannot be written.
    """
    facts = [_facts(run, command) for run in command.runs]
    page = render(facts[0]) if len(facts) == 1 else compare(facts)
    first = Path(command.runs[0]).expanduser()
    path = (
        Path(command.output).expanduser() if command.output else (first if first.is_dir() else Path()) / "report.html"
    )
    files.replace(path, page.encode())
    print(f"{path}: {len(page.encode()) / 1e6:.1f} MB")
    return path


def _facts(run: str, command: Report) -> Facts:
    loaded = loading.load(run, weights=command.weights, recipe=command.recipe)
    found = open_images(loaded)
    images, dataset = found.images, found.dataset
    if found.note:
        print(f"{run}: {found.note}.")
    logits, maps = _outputs(loaded, dataset)
    classes = not isinstance(images.labels, Tensor) and logits.shape[1:] == (len(loaded.classes),)
    if not classes:
        print(f"{run}: its answers are no classes; the page has its curves and settings.")
    weight = _head(loaded.model, maps) if classes else None
    best = logits.argmax(dim=1).tolist()
    home = loaded.path.parent.parent
    return Facts(
        title=home.name if loaded.path.parent.name == "checkpoints" else loaded.path.name,
        classes=loaded.classes,
        labels=torch.tensor(images.labels) if classes else None,
        logits=logits if classes else None,
        names=[images.key(index) for index in range(len(images))],
        thumbnail=lambda index: visible(torch.as_tensor(dataset[0, index]["image"])),
        heat_map=None if weight is None or maps is None else lambda index: cam(maps[index], weight[best[index]]),
        features=None if weight is None or maps is None else maps.mean((2, 3)),
        history=_history(home),
        settings=loaded.about["config"],
        versions=versions() | {"python": platform.python_version()},
        command=f"accelerate launch --config_file FILE train.py --config {home.name}/config.yaml",
    )


@torch.no_grad()
def _outputs(loaded: loading.Loaded, dataset: KeyedDataset) -> tuple[Tensor, Tensor | None]:
    """Logits [N, C] of all images, and the last feature maps [N, F, h, w] if they are not too many."""
    maps: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1:
            maps[-1] = output

    hooks = [module.register_forward_hook(note) for module in loaded.model.modules()]
    loader, logits = BatchLoader(dataset, workers=min(cores_here(), len(dataset) // _BATCH)), []
    starts = range(0, len(dataset), _BATCH)
    try:
        for batch in loader([[(0, i) for i in range(s, min(s + _BATCH, len(dataset)))] for s in starts]):
            maps.append(torch.empty(0))
            images = loaded.transform.normalize(batch["image"].to(loaded.transform.device))
            logits.append(loaded.model(images).float().cpu())
            maps[-1] = maps[-1].float().cpu()
            if sum(part.numel() for part in maps) > 2**28:  # a gigabyte
                maps[:] = [torch.empty(0)]
    finally:
        for hook in hooks:
            hook.remove()
    whole = sum(map(len, maps)) == len(dataset) and len({part.shape[1:] for part in maps}) == 1
    return torch.cat(logits), torch.cat(maps) if whole else None


def _head(model: nn.Module, maps: Tensor | None) -> Tensor | None:
    """The weights [C, F] of a linear head on pooled feature maps, for which activation maps are exact."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if maps is None or len(linear) != 1 or linear[0].in_features != maps.shape[1]:
        return None
    return linear[0].weight.detach().float().cpu()


def _history(home: Path) -> list[dict[str, Any]]:
    """The epochs in `metrics.jsonl`, as far as they can be read."""
    found = []
    for line in (
        files.read_text(home / "metrics.jsonl", most=1 << 26).splitlines() if (home / "metrics.jsonl").exists() else ()
    ):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in found if isinstance(entry, dict) and "epoch" in entry]
