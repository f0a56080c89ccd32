"""The state of an optimizer by parameter name. torch's own is by position, where swapped parameters load silently."""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.storage.state import difference


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state by parameter name; torch's own is by position, where swapped parameters load silently."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}
    return {"kind": type(optimizer).__name__, "state": {name: state[name] for name in sorted(state)}}


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
        if not isinstance(values, dict) or values.keys() != next(iter(saved["state"].values())).keys():
            raise CheckpointError(f"the optimizer state of {name} is not like that of the other parameters.")
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[name]:
                found = f"{tuple(value.shape)}; expected {tuple(shapes[name])}"
                raise CheckpointError(f"optimizer state {key} of {name} has shape {found}.")
    # torch numbers the parameters in the order of the groups, as `shapes` does.
    state = {position: saved["state"][name] for position, name in enumerate(shapes) if saved["state"]}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
