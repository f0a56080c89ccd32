"""Freeze parameters and BatchNorm statistics, and prove later that they did not change.

A frozen module is frozen in three ways:

1. Its parameters have no gradient (`requires_grad` is False).
2. It stays in eval mode, whoever calls `model.train()`. Otherwise its BatchNorms would move their running statistics
   and its dropout would add noise to its features, gradient or not.
3. Checkpoints do not hold its tensors, but a fingerprint of each, which is compared before the checkpoint is used.
"""

import difflib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import CheckpointError, UsageError
from trainer.model import patterns as patterns

Fingerprint = dict[str, str]  # tensor name → sha256 of dtype, shape and bytes (first 16 hex digits)


@dataclass(frozen=True)
class FreezePlan:
    """Which parameters of a model train, as decided by `freeze`.

    Attributes:
        train: the rules that decided, see `trainer.model.patterns`.
        trainable: names of the parameters that train, in the model's order; of a tied parameter, its first name.
        frozen: names of all other parameters; of a tied parameter, all its names.
        counts: number of values in the trainable parameters, and in all parameters.
    """

    train: tuple[str, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    counts: tuple[int, int]

    def __str__(self) -> str:
        some, total = self.counts
        rules = " ".join(self.train) if len(self.train) <= 8 else f"{len(self.train)} rules"
        return f"{rules}: {some:,} of {total:,} parameters train ({some / total:.2%})"

    def within(self, modules: Iterable[str]) -> bool:
        """Whether every trainable parameter belongs to one of these modules, given by name."""
        return all(any(name.startswith(f"{module}.") for module in modules) for name in self.trainable)

    def to_dict(self) -> dict[str, list[str]]:
        """The plan as checkpoints store it: its rules, and the names of the trainable parameters."""
        return {"train": list(self.train), "trainable": list(self.trainable)}

    def content(self) -> dict[str, Any]:
        """The content of `freeze_plan.json`: a file for `--train @FILE` that names every frozen parameter."""
        return patterns.content([*(f"{patterns.FREEZE}{name}" for name in self.frozen), "all"])

    def save(self, path: str | Path) -> None:
        """Write the rules to a file for `--train @FILE`: JSON if its name ends in .json, otherwise YAML.

        Raises:
            OSError: the file cannot be written.
        """
        patterns.write(Path(path), self.train)


def freeze(model: nn.Module, train: Iterable[str], *, head: Iterable[str] = ()) -> FreezePlan:
    """Set which parameters of a model train, and lock every frozen module in eval mode.

    Rules are applied in their order: the first one that matches a parameter decides whether it trains. A parameter that
    no rule matches is frozen.

    Args:
        model: any module. Sets the `requires_grad` of its parameters and the `train` method of its frozen modules.
        train: rules as `--train` takes them, see `trainer.model.patterns`: names of modules or parameters ("layer4",
            "fc.bias"), wildcards ("features.[67]*"), "re:" and a regular expression, slices ("features[3:8]"), "head"
            or "all". A rule that begins with "freeze:" freezes.
        head: names of the modules that the rule "head" stands for.

    Returns:
        The plan; the model is in train mode, except for its frozen modules.

    Raises:
        UsageError: a rule matches no parameter, no parameter would train, or a tied parameter would train under one of
            its names and be frozen under another. The model is then unchanged.
    """
    train, head = tuple(train), tuple(head)
    names: dict[nn.Parameter, list[str]] = {}  # a tied parameter has several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    every = [name for aliases in names.values() for name in aliases]
    below = children(model)
    trains: dict[str, bool] = {}
    for rule in train:
        pattern = rule.removeprefix(patterns.FREEZE)
        found = patterns.named(pattern, every, children=below, head=head)
        if not found:
            raise UsageError(_no_match(model, pattern))
        for name in found:
            trains.setdefault(name, pattern == rule)
    if not any(trains.values()):
        raise UsageError(
            f"nothing to train: the rules are {' '.join(train) or 'none'}; expected head, all, or module names such "
            "as layer4."
        )
    for aliases in names.values():
        if len({trains.get(name, False) for name in aliases}) > 1:
            one, other = (next(n for n in aliases if trains.get(n, False) is wanted) for wanted in (True, False))
            raise UsageError(
                f"{one} and {other} are one tied parameter, and --train trains the first and freezes the second. "
                "Train both, or freeze both."
            )
    for parameter, aliases in names.items():
        parameter.requires_grad_(trains.get(aliases[0], False))
    for module in model.modules():
        module.__dict__.pop("train", None)  # the lock of an earlier plan
    for module in model.modules():
        if is_frozen(module):
            lock_eval(module)
    model.train()
    trainable = [(aliases[0], parameter.numel()) for parameter, aliases in names.items() if parameter.requires_grad]
    return FreezePlan(
        train,
        trainable=tuple(name for name, _ in trainable),
        frozen=tuple(name for name in every if not trains.get(name, False)),
        counts=(sum(size for _, size in trainable), sum(parameter.numel() for parameter in names)),
    )


def children(model: nn.Module) -> dict[str, list[str]]:
    """The names of each module's children, in their order, by the module's name; "" is the model itself."""
    return {name: list(module._modules) for name, module in model.named_modules()}


def _no_match(model: nn.Module, pattern: str) -> str:
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    near = difflib.get_close_matches(pattern, names, n=5)
    top = ", ".join(name for name in names if "." not in name)
    return (
        f"--train {pattern!r} matches no parameter of {type(model).__name__}; "
        + (f"did you mean {', '.join(near)}? " if near else "")
        + f"Its top modules are {top}; head and all work everywhere."
    )


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters and none of them trains.

    False for a module without parameters, such as dropout: whether it must stay in eval mode depends on the modules
    before and after it, which `split_model` finds.
    """
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def lock_eval(module: nn.Module) -> None:
    """Put a module and its submodules in eval mode, and keep them there: a later `.train()` has no effect on them.

    This keeps the running statistics of a frozen BatchNorm as they are.
    """
    # The lock hides `train` on the instance: a parent's recursive .train() calls it, and the class stays the same, and
    # with it isinstance and repr. A partial, because copy, pickle and torch.save keep one and lose a local function.
    for part in module.modules():
        part.train = partial(_stay_in_eval, part)
    module.eval()


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training can change: trainable parameters, and persistent buffers of modules without a lock.

    Returns:
        The tensors themselves, not copies, by their names in the model and in its order. A tied parameter has its first
        name alone.
    """
    return dict(_tensors(model, trained=True))


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The other parameters and persistent buffers of the model, which training must not change."""
    return dict(_tensors(model, trained=False))


def _tensors(model: nn.Module, *, trained: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad is trained:
            yield name, parameter
    for prefix, module in model.named_modules():
        locked = "train" in module.__dict__
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            if persistent and locked is not trained:
                yield f"{prefix}.{name}" if prefix else name, buffer


def fingerprint(model: nn.Module) -> Fingerprint:
    """The `digest` of each of the `frozen_tensors`, by name."""
    return {name: digest(tensor) for name, tensor in frozen_tensors(model).items()}


def digest(tensor: torch.Tensor) -> str:
    """The first 16 hex digits of the sha256 of a tensor's dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    sha256 = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16: hash the bytes
    return sha256.hexdigest()[:16]


def check_fingerprint(found: Fingerprint, expected: Fingerprint) -> None:
    """Check that a model's frozen tensors are the ones that a checkpoint was trained with.

    Args:
        found: `fingerprint` of the model.
        expected: the fingerprint in the checkpoint.

    Raises:
        CheckpointError: names the tensors that are missing, additional or different.
    """
    if found == expected:
        return
    lines = [f"{name}: in the checkpoint, not in this model" for name in expected.keys() - found.keys()]
    lines += [f"{name}: in this model, not in the checkpoint" for name in found.keys() - expected.keys()]
    both = [name for name in expected if name in found and expected[name] != found[name]]
    lines += [f"{name}: expected sha256 {expected[name]}…, this model has {found[name]}…" for name in both]
    shown = "\n  ".join(sorted(lines)[:8])
    raise CheckpointError(
        f"the frozen part of this model is not the one the checkpoint was trained on; {len(lines)} of "
        f"{len(expected)} tensors differ:\n  {shown}\n"
        "Give the weights it was trained on (--weights), and the same --model, --train and --seed."
    )
