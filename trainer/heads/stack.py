"""Copies of a tail, stacked, so that one forward on a batch serves all of them."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from trainer.errors import UsageError

Inputs = tuple[Tensor, ...]  # [B, ...] each
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


class Stack(Protocol):
    """H heads.

    Attributes:
        tensors: what trains, by name: `[H, ...]`.
        random: whether a forward in training draws random numbers, from torch's own generator: the same for all heads.
    """

    tensors: dict[str, Tensor]
    random: bool

    def logits(self, inputs: Inputs, *, heads: slice = slice(None)) -> Tensor:
        """In eval mode, without gradient: `[B, H, C]`."""
        ...

    def train(self, inputs: Inputs) -> Tensor:
        """In train mode, `[B, H, C]`; what `backward` needs is kept."""
        ...

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        """The gradients of the tensors, given those `[B, H, C]` of the logits."""
        ...


def stack(tail: nn.Module, count: int, inputs: Inputs) -> Stack:
    """Copies of `tail` as it is.

    Args:
        tail: `tail(*inputs)` gives logits `[B, C]`; parameters without requires_grad are the same for all copies.
        count: H.
        inputs: a batch, from which the kind of stack follows.

    Raises:
        UsageError: nothing in it trains, or a BatchNorm does: its statistics would mix samples.
    """
    if not any(parameter.requires_grad for parameter in tail.parameters()):
        raise UsageError("the tail has nothing to train: no parameter has requires_grad.")
    if any(_mixes(module) for module in tail.modules()):
        raise UsageError("heads with a BatchNorm that trains cannot be compared by held-out samples; freeze it.")
    parts = list(_chain(tail))
    last = parts[-1] if parts else None
    if (
        len(inputs) == 1
        and isinstance(last, nn.Linear)
        and all(isinstance(part, (nn.Flatten, nn.Identity, nn.Dropout)) for part in parts[:-1])
        and inputs[0].flatten(1).shape[1] == last.in_features
        and all(parameter.requires_grad for parameter in last.parameters())
    ):
        name = next(name for name, module in tail.named_modules() if module is last)
        rates = [part.p for part in parts if isinstance(part, nn.Dropout) and part.p > 0]
        return LinearStack(last, count, prefix=name and f"{name}.", dropouts=rates)
    return ModuleStack(tail, count)


class LinearStack:
    """Linear layers, after dropout: one matrix product for all.

    Args:
        linear: the layer. count: H.
        prefix: of its parameters' names.
        dropouts: rates of the dropouts before it.
    """

    def __init__(self, linear: nn.Linear, count: int, *, prefix: str = "", dropouts: Sequence[float] = ()):
        parameters = {prefix + name: parameter.detach() for name, parameter in linear.named_parameters()}
        self.tensors = {name: tensor.expand(count, *tensor.shape).clone() for name, tensor in parameters.items()}
        self.random, self._dropouts = bool(dropouts), list(dropouts)
        self._names, self._inputs = [prefix + "weight", prefix + "bias"], torch.empty(0)

    def logits(self, inputs: Inputs, *, heads: slice = slice(None)) -> Tensor:
        weight, bias = self._names
        x, every = inputs[0].flatten(1), self.tensors[weight][heads]
        count, classes, size = every.shape
        matrix = every.reshape(-1, size).T  # [D, H·C]
        if bias not in self.tensors:
            return (x @ matrix).view(len(x), count, classes)
        return torch.addmm(self.tensors[bias][heads].reshape(-1), x, matrix).view(len(x), count, classes)

    def train(self, inputs: Inputs) -> Tensor:
        x = inputs[0].flatten(1)
        for rate in self._dropouts:
            x = F.dropout(x, rate)
        self._inputs = x
        return self.logits((x,))

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        weight, bias = self._names
        gradients = {weight: (gradient.flatten(1).T @ self._inputs).view_as(self.tensors[weight])}
        return gradients | ({bias: gradient.sum(dim=0)} if bias in self.tensors else {})


class ModuleStack:
    """Any small tail, by `torch.func` (Horace He & Richard Zou, functorch, 2021).

    Args:
        tail: see `stack`. count: H.
    """

    def __init__(self, tail: nn.Module, count: int):
        self._tail = deepcopy(tail)  # modes change
        trains = {name: parameter.detach() for name, parameter in tail.named_parameters() if parameter.requires_grad}
        self.tensors = {name: tensor.expand(count, *tensor.shape).clone() for name, tensor in trains.items()}
        self.random = any(isinstance(module, _DROPOUTS) and module.p > 0 for module in tail.modules())
        self._leaves, self._logits = {}, torch.empty(0)

    def logits(self, inputs: Inputs, *, heads: slice = slice(None)) -> Tensor:
        self._tail.eval()
        with torch.no_grad():
            return self._run({name: tensor[heads] for name, tensor in self.tensors.items()}, inputs)

    def train(self, inputs: Inputs) -> Tensor:
        self._tail.train()
        self._leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        with torch.enable_grad():
            self._logits = self._run(self._leaves, inputs)
        return self._logits.detach()

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(self._logits, list(self._leaves.values()), gradient)
        self._logits = torch.empty(0)
        return dict(zip(self._leaves, found, strict=True))

    def _run(self, tensors: dict[str, Tensor], inputs: Inputs) -> Tensor:
        def head(tensors: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self._tail, tensors, inputs)

        return torch.func.vmap(head, out_dims=1, randomness="same")(tensors)


def without_dropout(tail: nn.Module) -> nn.Module:
    """A copy whose dropouts let everything through."""
    copied = deepcopy(tail)
    for module in copied.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
    return copied


def bytes_of(tail: nn.Module, inputs: Inputs) -> int:
    """What one more head takes in memory: its parameters with gradient and two states, and twice its activations."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not any(tensor is given or tensor.data_ptr() == given.data_ptr() for given in inputs):
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    copied = deepcopy(tail).train()
    devices = [inputs[0].device] if inputs[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = copied(*inputs)
    parameters = sum(parameter.nbytes for parameter in tail.parameters() if parameter.requires_grad)
    return 5 * parameters + 2 * sum(sizes.values()) + 4 * logits.nbytes


def _mixes(module: nn.Module) -> bool:
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    copied = deepcopy(module).train()  # one that is locked in eval mode stays in it
    return copied.training


def _chain(tail: nn.Module) -> Iterator[nn.Module]:
    """The modules of a tail that calls one after the other; nothing if it does anything else."""
    if isinstance(tail, nn.Sequential):
        for part in tail:
            inner = list(_chain(part))
            if not inner:
                yield tail  # neither a flatten, a dropout nor a linear layer: no chain of these
                return
            yield from inner
    elif isinstance(tail, fx.GraphModule):
        yield from _graph_chain(tail)
    elif isinstance(tail, (nn.Linear, nn.Flatten, nn.Identity, nn.Dropout)):
        yield tail


def _graph_chain(tail: fx.GraphModule) -> list[nn.Module]:
    found: list[nn.Module] = []
    last = None
    for node in tail.graph.nodes:
        if node.op == "placeholder" and last is None:
            last = node
            continue
        if last is None or node.all_input_nodes != [last]:
            return []
        if node.op == "call_module" and node.args == (last,):
            found += [*_chain(tail.get_submodule(node.target))] or [tail]
        elif node.op == "call_function" and node.target is torch.flatten and node.args == (last, 1):
            found.append(nn.Flatten())
        elif node.op != "output":
            return []
        last = node
    return found
