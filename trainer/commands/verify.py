"""Check checkpoints and exports: `python -m trainer verify`."""

import os
from pathlib import Path

from trainer.commands import loaded as loading
from trainer.commands.arguments import Verify
from trainer.errors import CheckpointError
from trainer.model.restoring import NO_BASE
from trainer.recipes import Recipe, load_recipe
from trainer.storage import checkpoint, files
from trainer.text import counted


def verify(command: Verify) -> None:
    """Check a checkpoint, all checkpoints of a run, or an export: checksum, contract, fingerprint.

    Raises:
        CheckpointError: some cannot be used; each with its reason.
    """
    path = command.path
    place = Path(os.path.expanduser(path))
    place = place.parent if loading.is_export(place) else place
    folder = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    found = [place] if place.is_file() else [*checkpoint.steps(folder), *folder.glob("best.pt")]
    found += [place / loading.ABOUT] if (place / loading.ABOUT).is_file() else []
    if not found:
        raise CheckpointError(f"{path}: there is no checkpoint and no export here.")
    problems, functions = [], load_recipe(command.recipe)
    for file in found:
        try:
            print(f"ok   {file}: {_verified(file, command.weights, functions)}", flush=True)
        except (ValueError, OSError, KeyError) as error:
            problems.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            print(f"bad  {file}", flush=True)
    if problems:
        raise CheckpointError("\n  ".join([f"{len(problems)} of {len(found)} cannot be used:", *problems]))


def _verified(file: Path, weights: str | None, recipe: Recipe) -> str:
    """What was checked, as text; raises for anything wrong."""
    if file.name == loading.ABOUT:  # of an export: all its files
        exported = loading.read_about(file)["files"]
        for name, facts in exported.items():
            if files.sha256_of(file.with_name(name)) != facts["sha256"]:
                raise CheckpointError(f"{file.with_name(name)} is damaged: its content does not match its sha256.")
            if loading.is_export(file.with_name(name)):
                _load(file.with_name(name), weights, recipe)
        return ", ".join(exported)
    about = loading.read(file)
    trained, frozen = about["freeze_plan"]["trainable"], len(about["fingerprint"])
    if (state := about["optimizer"].get("state")) and state.keys() != set(trained):
        raise CheckpointError(f"{file}: its optimizer state is not of the parameters that train.")
    if missing := set(trained) - about["model"].keys():
        raise CheckpointError(f"{file}: it lacks {', '.join(sorted(missing))}, which train.")
    base = f"base as fingerprinted ({frozen})" if _load(file, weights, recipe) else NO_BASE
    return f"epoch {about['epoch']}, step {about['step']}; {counted(len(trained), 'parameter')}; {base}"


def _load(file: Path, weights: str | None, recipe: Recipe) -> bool:
    """Load a file for its errors; False if its model is the user's own code, and no recipe with it was given."""
    if not recipe.builds(loading.read(file)):
        return False
    loading.load_frozen(file, device="cpu", weights=weights, recipe=recipe)
    return True
