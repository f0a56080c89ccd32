"""Find the recipe of a run: `trainer/recipe.py`, or a file that replaces some of its functions."""

import ast
import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FunctionType
from typing import Any

from trainer import recipe as default
from trainer.checks import recipe_differences
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
        """The model of a run; its random values depend only on the seed of the run.

        Args:
            config: the settings of the run.
            classes: names of the classes; empty if labels are not classes.

        Raises:
            UsageError: `model` did not return a `Classifier`.
        """
        with seeded(config.run.seed, "model"):
            built = self.model(
                config.model, config.weights, classes, image_size=config.data.image_size, seed=config.run.seed
            )
        if not isinstance(built, Classifier):
            raise UsageError(f"model() of the recipe returned {type(built).__name__}; expected that of build_model().")
        return built

    def restore(self, state: State | Mapping[str, Any], *, weights: str | None = None) -> Classifier:
        """The model of a checkpoint, with its trained and frozen tensors; see `model.restoring.restore`."""
        build = (lambda config: self.classifier(config, state["classes"])) if self.builds(state) else None
        return restore(state, build=build, weights=weights)

    def builds(self, state: State | Mapping[str, Any]) -> bool:
        """Whether `model` can build the model of a checkpoint: that of a recipe of the user's own has to be given."""
        stored = (state.to_dict() if isinstance(state, State) else state).get("recipe", {})
        in_place = stored.get("model", [""])[0] == f"{default.__name__}.model"  # edited in trainer/recipe.py
        return self.model is not default.model or in_place or state["base"].get("source") != "module"

    def sources(self) -> dict[str, list[str]]:
        """For checkpoints: each function's qualified name and the sha256 of its source, 16 hex digits.

        Its source is also that of the functions, classes and constants of its file which it names, and which they name.
        """
        found = {}
        for name in (f.name for f in fields(self)):
            if (function := getattr(self, name)) is not None:
                text = _source(function) if inspect.isfunction(function) else repr(function)
                where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', name)}"
                found[name] = [where, hashlib.sha256(text.encode()).hexdigest()[:16]]
        return found

    def differences(self, stored: dict[str, list[str]]) -> list[str]:
        """One line for each function that is not the one that a checkpoint was trained with."""
        return recipe_differences(stored, self.sources())


def _source(function: FunctionType) -> str:
    file = inspect.getsourcefile(function)
    if file is None or function.__qualname__ != function.__name__:  # one within another
        return inspect.getsource(function)
    text = Path(file).read_text(encoding="utf-8")
    parts: dict[str, ast.stmt] = {}
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        parts |= {name: node for target in targets if (name := getattr(target, "id", getattr(target, "name", None)))}
    found, waiting = {}, [function.__name__]
    for name in waiting:
        if name in parts and name not in found:
            found[name] = ast.get_source_segment(text, parts[name])
            waiting += [node.id for node in ast.walk(parts[name]) if isinstance(node, ast.Name)]
    return "\n".join(found[name] or "" for name in sorted(found))


def load_recipe(path: str | None) -> Recipe:
    """Load a recipe from a Python file.

    Args:
        path: functions in this file replace those of `trainer/recipe.py`; it may import files beside it. None: the
            functions of `trainer/recipe.py`.

    Raises:
        UsageError: there is no such file, it cannot be imported, or it has none of a recipe's functions.
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
    if (folder := str(file.absolute().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UsageError(f"--recipe {path}: {error}. Install what it needs, or mend its import.") from error
    except SyntaxError as error:
        raise UsageError(f"--recipe {path}: {error}.") from error
    names = [field.name for field in fields(Recipe)]
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if not found:
        raise UsageError(f"--recipe {path} defines nothing that a recipe has: {', '.join(names)}.")
    return Recipe(**found)
