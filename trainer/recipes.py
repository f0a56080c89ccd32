"""Find the recipe of a run: `trainer/recipe.py`, or a file that replaces some of its functions."""

import hashlib
import importlib.util
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trainer import recipe as default
from trainer.config import Config
from trainer.errors import UsageError
from trainer.model.classifiers import Classifier, seeded
from trainer.model.restoring import restore
from trainer.storage.state import State


@dataclass(frozen=True)
class Recipe:
    """The functions of a recipe; `trainer/recipe.py` documents each."""

    images: Any = default.images
    transforms: Any = default.transforms
    model: Any = default.model
    step: Any = default.step
    metrics: Any = default.metrics
    score: Any = default.score
    optimizer: Any = default.optimizer
    learning_rate: Any = default.learning_rate
    prediction: Any = default.prediction

    def classifier(self, config: Config, classes: Sequence[str]) -> Classifier:
        """The model of a run; random values in it depend on the run's seed alone.

        Args:
            config: of the run.
            classes: names of the classes; empty if labels are no classes.
        """
        with seeded(config.run.seed, "model"):
            return self.model(
                config.model, config.weights, classes, image_size=config.data.image_size, seed=config.run.seed
            )

    def restore(self, state: State | Mapping[str, Any], *, weights: str | None = None) -> Classifier:
        """The whole model of a checkpoint; see `model.restoring.restore`."""
        by_name = self.model is default.model
        unknown = by_name and state["base"].get("source") == "module"
        build = None if unknown else lambda config: self.classifier(config, state["classes"])
        return restore(state, build=build, weights=weights)

    def sources(self) -> dict[str, list[str]]:
        """For checkpoints: each function's qualified name and the sha256 of its source, 16 hex digits."""
        found = {}
        for name in (f.name for f in fields(self)):
            if (function := getattr(self, name)) is not None:
                text = inspect.getsource(function) if inspect.isfunction(function) else repr(function)
                where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', name)}"
                found[name] = [where, hashlib.sha256(text.encode()).hexdigest()[:16]]
        return found

    def differences(self, stored: dict[str, list[str]]) -> list[str]:
        """One line for each function that is not the one that a checkpoint was trained with."""
        lines, mine = [], self.sources()
        for name in sorted(stored.keys() | mine.keys()) if stored else []:
            was, now = (" ".join(entry) if entry else "none" for entry in (stored.get(name), mine.get(name)))
            if was != now:
                lines.append(f"recipe  {name}: trained with {was}, now {now}")
        return lines


def load_recipe(path: str | None) -> Recipe:
    """The recipe in a Python file: what it defines replaces the functions of `trainer/recipe.py`; None: these.

    Raises:
        UsageError: there is no such file, it fails, or it defines nothing that a recipe has.
    """
    if path is None:
        return Recipe()
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise UsageError(f"--recipe {path}: there is no such file.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UsageError(f"--recipe {path}: {error}. Install what it needs, or mend its import.") from error
    names = [field.name for field in fields(Recipe)]
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if not found:
        raise UsageError(f"--recipe {path} defines nothing that a recipe has: {', '.join(names)}.")
    return Recipe(**found)
