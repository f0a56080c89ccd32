"""What the data says about itself: `python -m trainer audit`."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import cli
from trainer import config as settings
from trainer.audit import Row, examine, features_of, ordered, summarise, take_prints, with_ticks
from trainer.commands import loaded as loading
from trainer.commands import output
from trainer.commands.arguments import Audit
from trainer.config import Config, from_dict
from trainer.data.excluded import place, read_table
from trainer.data.images import Subset
from trainer.data.loader import Workers
from trainer.data.open import Data, open_data
from trainer.errors import UsageError, check_least
from trainer.model.classifiers import Classifier
from trainer.processes.startup import start
from trainer.processes.together import main_first, on_main, print_main
from trainer.recipes import load_recipe
from trainer.report import Finding
from trainer.storage import files
from trainer.text import counted


def audit(command: Audit) -> dict[str, Any]:
    """Look for what should not be in the data, on any number of processes; print and write it (a collective).

    Returns:
        What `--json` writes: "data", "model", "images" (number of training and validation images), "accuracy" (of ridge
        heads: of "validation", "validation_without_leaks", "left_out"; None where there is none) and "findings": rows.

    Raises:
        UsageError, CheckpointError, DataError: the data, the model or the run cannot be used, or labels are no classes.
        OSError: a file cannot be written; before the work, if that can be known then.
    """
    check_least(0, workers=command.workers)
    config, home = _config(command)
    recipe, accelerator = load_recipe(config.run.recipe), start(exact=config.run.exact)
    given = command.output or str(home / "audit.csv")
    file = Path(given).expanduser()

    def targets() -> tuple[Path | None, list[dict[str, str]]]:  # before the work
        output.target(given)
        return output.target(command.json), read_table(file) if file.exists() else []

    json_file, old = on_main(accelerator, targets)
    workers = Workers.of(accelerator, command.workers, minutes=config.run.timeout)
    what = replace(config.data, check_data=False, bad_images="stop")
    data = open_data(accelerator, what, recipe.images, seed=config.run.seed)
    if isinstance(data.train.labels, Tensor):
        raise UsageError("labels are no classes: an audit needs one class for each image.")
    name = partial(place, data=config.data.data)
    parts, prints, unreadable = [], [], []
    sides = data.train, data.val
    for images, some in zip(sides, take_prints(accelerator, sides, workers=workers), strict=True):
        parts.append(Subset(images, [index for index, one in enumerate(some) if not one.error]))
        prints.append([one for one in some if not one.error])
        unreadable += [Row(name(images, i), "unreadable", 1.0, other=p.error) for i, p in enumerate(some) if p.error]
    classifier = main_first(accelerator, recipe.classifier, config, data.classes)
    _, transform = recipe.transforms(config.data, classifier.input)
    features = features_of(accelerator, classifier, parts, transform=transform, config=config.speed, workers=workers)

    def finish() -> dict[str, Any]:
        most = classifier.input.max_value
        found, accuracy = examine(features, parts, prints, name=name, transform=transform, most=most)
        rows = ordered([*unreadable, *found])
        table, marked = with_ticks(rows, old)
        findings = [asdict(row) for row in table]
        result = {"data": config.data.data, "model": config.model.model, "images": [len(part) for part in parts]}
        result |= {"accuracy": accuracy._asdict(), "findings": findings}
        text = json.dumps(result, indent=1, ensure_ascii=False)
        files.replace(file, output.as_csv(findings or [asdict(Row("", "", 0.0))]))
        if json_file:
            output.write(json_file, text.encode())
        print_main(text if command.json == "-" else _text(data, classifier, summarise(rows, accuracy), given, marked))
        return result

    return on_main(accelerator, finish)


def _config(command: Audit) -> tuple[Config, Path]:
    """The settings of the audit, and the folder for its table."""
    given = {name: value for name in ("data", "model", "weights", "recipe") if (value := getattr(command, name))}
    if command.run is None:
        if command.data is None:
            raise UsageError("an audit needs --data FOLDER or --run RUN.")
        return cli.parse(arguments=[f"{settings.flag(name)}={value}" for name, value in given.items()]), Path()
    path = loading.find(command.run)
    return settings.replace(from_dict(loading.read(path)["config"], str(path)), **given), loading.home_of(path)


def _text(data: Data, classifier: Classifier, found: list[Finding], table: str, marked: int) -> str:
    """The summary, for a console."""
    lines = [f"data    {data}", f"model   features before its head; {classifier.origin}"]
    for finding in found:
        lines += ["", finding.what, *(f"    {image}" for image in finding.images), f"  → {finding.advice}"]
    ticks = f", {counted(marked, 'tick')} in its column exclude" * bool(marked)
    if not found:
        return "\n".join([*lines, "", f"Nothing was found; {table} is empty{ticks}."])
    lines += ["", f"{table} lists all of them{ticks}. To train without some images, write x into the column exclude of"]
    return "\n".join([*lines, f"their rows, and give train.py --exclude {table}. No file is deleted or moved."])
