"""The freeze plan: which parameters train; and the proof that the others did not.

Frozen means three things at once: no gradient, eval mode for good (a BatchNorm in train mode moves its statistics even
without a gradient, and dropout makes a frozen feature noisy), and not in the checkpoint but fingerprinted there.
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
    """Which parameters train.

    Attributes:
        train: the rules it was made from, see `rules`.
        trainable: the names of the parameters that train, in the model's order; a tied one once.
        frozen: the names of the others; a tied one with all its names.
        counts: numbers in trainable parameters, and in all.
    """

    train: tuple[str, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    counts: tuple[int, int]

    def __str__(self) -> str:
        some, total = self.counts
        said = " ".join(self.train) if len(self.train) <= 8 else f"{len(self.train)} rules"
        return f"{said}: {some:,} of {total:,} parameters train ({some / total:.2%})"

    def within(self, modules: Iterable[str]) -> bool:
        """Whether all that trains is in these modules."""
        return all(any(name.startswith(f"{module}.") for module in modules) for name in self.trainable)

    def to_dict(self) -> dict[str, list[str]]:
        """The form that is stored in checkpoints."""
        return {"train": list(self.train), "trainable": list(self.trainable)}

    def content(self) -> dict[str, Any]:
        """What `freeze_plan.json` holds: the name of every frozen parameter, as a plan that `--train @FILE` takes."""
        return patterns.content([*(f"{patterns.FREEZE}{name}" for name in self.frozen), "all"])

    def save(self, path: str | Path, *, names: bool = False) -> None:
        """Write the plan to a file that `--freeze-plan` takes: JSON if it is called .json, otherwise YAML.

        Args:
            names: not its rules, but what came of them: the name of every frozen parameter.

        Raises:
            OSError: it cannot be written.
        """
        frozen = [f"{patterns.FREEZE}{name}" for name in self.frozen]
        patterns.write(Path(path), [*frozen, "all"] if names else self.train)


def freeze(model: nn.Module, train: Iterable[str], *, head: Iterable[str] = ()) -> FreezePlan:
    """Let parameters train or not by the first of the rules that names them; keep frozen modules in eval mode.

    Args:
        model: any module; its parameters' `requires_grad` and its modules' `train` method are set in place.
        train: rules (see `rules`): module or parameter names ("layer4", "fc.bias"), wildcards ("features.[67]*"),
            regular expressions, slices of layers, "head", "all"; with "freeze:" before it, a rule freezes. What none
            names is frozen. `rules.read` gives those of a file.
        head: names of the head's modules.

    Raises:
        UsageError: a rule matches no parameter (lists what there is), nothing is left to train, or of a tied parameter
            one name trains and another is frozen. The model is then unchanged.
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
                "Train both, or neither."
            )
    for parameter, aliases in names.items():
        parameter.requires_grad_(trains.get(aliases[0], False))
    for module in model.modules():
        module.__dict__.pop("train", None)  # what an earlier plan locked
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
    """For each module, "" is the model itself, the names of its children in their order: what slices count."""
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
    """Whether a module holds parameters and none of them trains.

    A module without parameters (activation, pooling, dropout) is not frozen by itself: what it may do depends on what
    comes before and after it, which `split` knows.
    """
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def lock_eval(module: nn.Module) -> None:
    """Keep `module` and all in it in eval mode through every later `.train()`, whoever calls it."""
    # The lock is an attribute of the instance: every parent's recursive .train() finds it, and the class, hence
    # isinstance and repr, stays the same. A partial and no method: copy, pickle and torch.save(model) carry it along.
    for part in module.modules():
        part.train = partial(_stay_in_eval, part)
    module.eval()


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def check_trainable(
    model: nn.Module, plan: FreezePlan | Iterable[str], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Check that exactly the parameters of a freeze plan train: that nothing changed `requires_grad` after `freeze`.

    Otherwise parameters would be frozen but updated by weight decay, or trained but missing in checkpoints. Reads flags
    only, so it costs microseconds for each parameter.

    Args:
        model: the model that was frozen, not wrapped.
        plan: as `freeze` returned it, or the names of the parameters that train.
        optimizer: must hold these parameters and no others; None: not checked.

    Raises:
        UsageError: names the parameters, and what to do.
    """
    trainable = set(plan.trainable if isinstance(plan, FreezePlan) else plan)
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    now = {name for name, parameter in parameters.items() if parameter.requires_grad}
    problems = {"frozen by the plan, but trainable now": now - trainable, "no longer trainable": trainable - now}
    if optimizer is not None:
        updated = {
            names.get(id(p), "a tensor of another model") for group in optimizer.param_groups for p in group["params"]
        }
        problems |= {"in the optimizer, but not in the plan": updated - trainable}
        problems |= {"trainable, but not in the optimizer": (trainable & now) - updated}
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_some(found)}" for what, found in problems.items() if found)
        raise UsageError(
            f"what trains is not what the freeze plan says. {listed}. To train other parameters, call trainer.freeze "
            "again and build a new Trainer (and a new split and optimizer for it)."
        )


def _some(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training can change, by the model's own names: trainable parameters, and buffers of modules not locked.

    Returns:
        The live tensors, not copies, in the model's order. A tied parameter appears once.
    """
    return dict(_tensors(model, trained=True))


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The rest of the model's state: what no training may change, and no checkpoint holds."""
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
    """The sha256 of each frozen parameter and buffer: what a checkpoint's tail was trained on."""
    return {name: digest(tensor) for name, tensor in frozen_tensors(model).items()}


def digest(tensor: torch.Tensor) -> str:
    """The sha256 of a tensor's dtype, shape and bytes; its first 16 hex digits."""
    tensor = tensor.detach().cpu().contiguous()
    sha256 = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16: hash the bytes
    return sha256.hexdigest()[:16]


def check_fingerprint(found: Fingerprint, expected: Fingerprint) -> None:
    """Compare a model's frozen tensors with those a checkpoint was trained on.

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
