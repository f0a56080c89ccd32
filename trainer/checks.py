"""Checks during training: one set of parameters trains, replicas are equal, frozen tensors do not change."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from trainer.errors import NumericalError, UsageError
from trainer.model.freezing import Fingerprint, digest, fingerprint
from trainer.processes.together import gather


def recipe_differences(stored: Mapping[str, list[str]], mine: Mapping[str, list[str]]) -> list[str]:
    """One line for each function of a recipe that is not the one that a checkpoint was trained with.

    Args:
        stored: of the checkpoint, see `Recipe.sources`; empty if it is of an earlier version.
        mine: those of now.
    """
    lines = []
    for name in sorted(stored.keys() | mine.keys()) if stored else []:
        was, now = (" ".join(entry) if entry else "none" for entry in (stored.get(name), mine.get(name)))
        if was != now:
            lines.append(f"recipe  {name}: trained with {was}, now {now}")
    return lines


def check_functions(learning_rate: Any, step: Any) -> None:
    """Raise UsageError unless both are functions: what `learning_rate` and `step` of a recipe return."""
    if not callable(learning_rate) or not callable(step):
        raise UsageError("learning_rate(config) and step(config) return functions: see trainer/recipe.py.")


def check_trainable(model: nn.Module, trainable: Mapping[str, Tensor], optimizer: Any) -> None:
    """Check that the model, the trainer and the optimizer train the same parameters.

    Otherwise weight decay would change frozen parameters, or checkpoints would lack parameters that were trained.

    Args:
        model: trains its parameters with `requires_grad`.
        trainable: the parameters that the trainer trains, by name.
        optimizer: trains the parameters in its groups.

    Raises:
        UsageError: names the parameters that differ, and what to do.
    """
    if not hasattr(optimizer, "param_groups"):
        kind = type(optimizer).__name__
        raise UsageError(
            f"optimizer() of the recipe returned {kind}; expected an optimizer (schedules: learning_rate)."
        )
    now = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if changed := sorted(now.keys() ^ trainable.keys()):
        raise UsageError(
            f"requires_grad of {', '.join(changed[:4])} was changed after the trainer was built, which has no effect. "
            "To train something else, call freeze() and split_model() again, and build a new optimizer and Trainer."
        )
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [name for name, parameter in now.items() if parameter not in held]:
        raise UsageError(f"the optimizer does not have {', '.join(missing[:4])}, which should train.")
    if len(held) != len(now):
        raise UsageError("the optimizer has parameters that do not train: build it after freeze().")


def check_replicas(accelerator: Accelerator, trainable: Mapping[str, Tensor], *, step: int) -> None:
    """Compare the trainable parameters of all processes, bit by bit (a collective).

    Raises:
        NumericalError: on every process; names the first parameter that differs and the processes that have it.
    """
    mine = {name: digest(parameter) for name, parameter in trainable.items()}
    found = gather(accelerator, mine)
    for name in mine:
        other = [rank for rank, digests in enumerate(found) if digests[name] != found[0][name]]
        if other:
            raise NumericalError(
                f"after step {step} the replicas of {name} differ: processes {other} from process 0. Continue from the "
                "last checkpoint; if it happens again, suspect the hardware.",
                step=step,
            )


def check_frozen(accelerator: Accelerator, model: nn.Module, expected: Fingerprint, *, step: int) -> None:
    """Compare the frozen parameters and buffers, on all processes, with those at the start (a collective).

    Raises:
        NumericalError: on every process; names the first tensor that changed and the processes where it did.
    """
    now = fingerprint(model)
    mine = [name for name, value in expected.items() if now.get(name) != value]
    found = gather(accelerator, mine)
    for names in filter(None, found):
        ranks = [rank for rank, others in enumerate(found) if names[0] in others]
        raise NumericalError(
            f"after step {step} the frozen {names[0]} is not what it was at the start (processes {ranks}; {len(names)} "
            f"of {len(now)} frozen tensors changed). Something writes to it: look for code that sets its values or "
            "takes its module out of eval mode. Checkpoints of this run hold only what trains.",
            step=step,
        )
