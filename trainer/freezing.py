"""The freeze plan: which parameters train; and the proof that the others did not.

Frozen means three things at once: no gradient, eval mode for good (a BatchNorm in train mode moves its statistics even
without a gradient, and dropout makes a frozen feature noisy), and not in the checkpoint but fingerprinted there.
"""

import difflib
import hashlib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from trainer.errors import CheckpointError, UsageError

Fingerprint = dict[str, str]  # tensor name → sha256 of dtype, shape and bytes (first 16 hex digits)


@dataclass(frozen=True)
class FreezePlan:
    """Which parameters train.

    Attributes:
        train: the patterns it was made from.
        trainable: the names of the parameters that they match, in the model's order.
        counts: numbers in trainable parameters, and in all.
    """

    train: tuple[str, ...]
    trainable: tuple[str, ...]
    counts: tuple[int, int]

    def __str__(self) -> str:
        some, total = self.counts
        return f"{' '.join(self.train)}: {some:,} of {total:,} parameters train ({some / total:.2%})"

    def to_dict(self) -> dict[str, list[str]]:
        """The form that is stored in checkpoints."""
        return {"train": list(self.train), "trainable": list(self.trainable)}


def freeze(model: nn.Module, train: Iterable[str], *, head: Iterable[str] = ()) -> FreezePlan:
    """Let the parameters that a pattern of `train` matches train, freeze the others, keep frozen modules in eval mode.

    Args:
        model: any module; its parameters' `requires_grad` and its modules' `train` method are set in place.
        train: module or parameter names ("layer4", "fc.bias"), with wildcards ("features.[67]*"), or the words
            "head" (the modules named in `head`) and "all".
        head: names of the head's modules.

    Raises:
        UsageError: a pattern matches no parameter; lists what there is.
    """
    train = tuple(train)
    patterns = []
    for pattern in train:
        patterns += {"head": list(head), "all": ["*"]}.get(pattern, [pattern])
    if not patterns:
        raise UsageError("nothing to train: `train` is empty; expected head, all, or module names such as layer4.")
    parameters = list(model.named_parameters())
    for pattern in patterns:
        if not any(_matches(name, pattern) for name, _ in parameters):
            raise UsageError(_no_match(model, pattern))
    for name, parameter in parameters:
        parameter.requires_grad_(any(_matches(name, pattern) for pattern in patterns))
    for module in model.modules():
        module.__dict__.pop("train", None)  # what an earlier plan locked
    for module in model.modules():
        if is_frozen(module):
            lock_eval(module)
    model.train()
    trainable = [(name, parameter.numel()) for name, parameter in parameters if parameter.requires_grad]
    counts = sum(size for _, size in trainable), sum(parameter.numel() for _, parameter in parameters)
    return FreezePlan(train, tuple(name for name, _ in trainable), counts)


def _matches(name: str, pattern: str) -> bool:
    """Whether `pattern` matches a parameter's name or the name of a module that holds it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


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
    # The lock is a method on the instance: every parent's recursive .train() finds it, it survives deepcopy (a bound
    # method is bound anew to the copy), and the class, hence isinstance and repr, stays what it was.
    for part in module.modules():
        part.train = types.MethodType(_stay_in_eval, part)
    module.eval()


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


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
    sha256.update(tensor.reshape(-1).view(torch.uint8).numpy())  # numpy has no bfloat16: hash the bytes
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
