"""The state of an optimizer by parameter name. torch's own is by position, where swapped parameters load silently."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.storage.state import difference

_SETTINGS = ("params", "lr", "weight_decay", "schedule")  # of a group: others than the optimizer set them
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """A copy of what an optimizer may change itself in its groups: schedule-free ones count their steps there."""
    return [{k: deepcopy(v) for k, v in group.items() if k not in _SETTINGS} for group in optimizer.param_groups]


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, start: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """An optimizer's state by parameter name; torch's own is by position, where swapped parameters load silently.

    Args:
        model: names the parameters.
        start: `group_values` at the start of the run: what differs from it now is state, too.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}
    found = {"kind": type(optimizer).__name__, "state": {name: state[name] for name in sorted(state)}}
    pairs = zip(group_values(optimizer), start or [], strict=False)
    groups = [{k: v for k, v in now.items() if k not in was or not _same(v, was[k])} for now, was in pairs]
    return found | ({"groups": groups} if any(groups) else {})


def positional_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The inverse of `optimizer_state`: what this optimizer's `load_state_dict` takes, with its own hyperparameters.

    Raises:
        CheckpointError: another kind of optimizer, other parameters, or another shape; names them.
    """
    kind = type(optimizer).__name__
    if saved["kind"] != kind:
        raise CheckpointError(f"the checkpoint was trained with {saved['kind']}; this run uses {kind}.")
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {names[parameter]: parameter.shape for group in optimizer.param_groups for parameter in group["params"]}
    if saved["state"] and saved["state"].keys() != shapes.keys():
        found = difference(saved["state"].keys(), shapes.keys())
        raise CheckpointError(f"the optimizer state is for other parameters: {found}.")
    for name, values in saved["state"].items():
        first = next(other for name_, other in saved["state"].items() if len(shapes[name_]) == len(shapes[name]))
        if not isinstance(values, dict) or values.keys() != first.keys():
            raise CheckpointError(f"the optimizer state of {name} is not like that of the other parameters.")
        for key, value in values.items():
            if key in _LIKE_PARAMETER and isinstance(value, Tensor) and value.shape != shapes[name]:
                found = f"{tuple(value.shape)}; expected {tuple(shapes[name])}"
                raise CheckpointError(f"optimizer state {key} of {name} has shape {found}.")
    # torch numbers the parameters in the order of the groups, as `shapes` does.
    state = {position: saved["state"][name] for position, name in enumerate(shapes) if saved["state"]}
    groups, changed = optimizer.state_dict()["param_groups"], saved.get("groups", [{}] * len(optimizer.param_groups))
    if not isinstance(changed, list) or len(changed) != len(groups):
        raise CheckpointError(f"the optimizer state has {len(changed)} groups of parameters; expected {len(groups)}.")
    return {"state": state, "param_groups": [old | new for old, new in zip(groups, changed, strict=True)]}


def _same(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return torch.equal(one, other) if both else type(one) is type(other) and bool(one == other)
