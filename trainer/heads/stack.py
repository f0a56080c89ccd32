"""Copies of a tail, stacked, so that one forward on a batch serves all of them.

Each copy is kept in units of a scale of its own, the peak rate of its optimizer: its tensors are scale · u.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from trainer.errors import UsageError

Inputs = tuple[Tensor, ...]  # [B, ...] each
_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_BEFORE, _AFTER = (nn.Flatten, nn.Identity, nn.Dropout), (nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten)


class Stack(Protocol):
    """H heads.

    Attributes:
        tensors: what trains, by name: `[H, ...]`, in units of the scales.
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
        """The gradients of scale · u, given those `[B, H, C]` of the logits."""
        ...


def stack(tail: nn.Module, scales: Tensor, inputs: Inputs) -> Stack:
    """Copies of `tail` as it is.

    Args:
        tail: `tail(*inputs)` returns logits `[B, C]`; parameters without requires_grad are the same for all copies.
        scales: `[H]`, positive.
        inputs: a batch, from which the kind of stack follows.

    Raises:
        UsageError: these tails cannot be compared, see `obstacle`.
    """
    if reason := obstacle(tail):
        raise UsageError(f"the heads cannot be compared: {reason}.")
    parts = list(_chain(tail))
    layer = next((part for part in parts if isinstance(part, (nn.Linear, nn.Conv2d))), None)
    if layer is None or len(inputs) != 1 or not all(parameter.requires_grad for parameter in layer.parameters()):
        return ModuleStack(tail, scales)
    place, x = parts.index(layer), inputs[0]
    before, after = parts[:place], parts[place + 1 :]
    if not all(isinstance(part, _BEFORE) for part in before):
        return ModuleStack(tail, scales)
    if isinstance(layer, nn.Linear):
        fits = not after and x.flatten(1).shape[1] == layer.in_features
    else:
        pools = [part.output_size for part in after if isinstance(part, nn.AdaptiveAvgPool2d)]
        rest = [type(part) for part in after if not isinstance(part, nn.Flatten)]
        fits = pools in ([1], [(1, 1)]) and rest in ([nn.ReLU, nn.AdaptiveAvgPool2d], [nn.AdaptiveAvgPool2d])
        fits = fits and x.ndim == 4 and not any(isinstance(part, nn.Flatten) for part in before)
        fits = fits and set(layer.kernel_size + layer.stride) == {1} and set(layer.padding) == {0} and layer.groups == 1
    if not fits:
        return ModuleStack(tail, scales)
    name = next(name for name, module in tail.named_modules() if module is layer)
    rates = [part.p for part in before if isinstance(part, nn.Dropout) and part.p > 0]
    relu = any(isinstance(part, nn.ReLU) for part in after)
    return LinearStack(layer, scales, prefix=name and f"{name}.", dropouts=rates, relu=relu)


def obstacle(tail: nn.Module) -> str:
    """Why copies of a tail cannot be compared by samples they have not seen; empty if they can."""
    if not any(parameter.requires_grad for parameter in tail.parameters()):
        return "the tail has nothing to train"
    if any(_mixes(module) for module in tail.modules()):
        return "a BatchNorm that trains mixes samples; freeze it"
    return ""


class LinearStack:
    """Linear layers after dropout, or 1×1 convolutions before a mean over the map: one matrix product for all.

    Args:
        layer: linear or convolution. scales: `[H]`.
        prefix: of its parameters' names.
        dropouts: rates of the dropouts before it.
        relu: whether there is one before the mean.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        scales: Tensor,
        *,
        prefix: str = "",
        dropouts: Sequence[float] = (),
        relu: bool = False,
    ):
        self.tensors = _copies({prefix + name: value for name, value in layer.named_parameters()}, scales)
        self.random, self._dropouts, self._relu = bool(dropouts), list(dropouts), relu
        self._maps, self._scales = isinstance(layer, nn.Conv2d), scales
        self._names, self._kept = [prefix + "weight", prefix + "bias"], (torch.empty(0), torch.empty(0))

    def logits(self, inputs: Inputs, *, heads: slice = slice(None)) -> Tensor:
        return self._run(self._rows(inputs[0]), heads)[0]

    def train(self, inputs: Inputs) -> Tensor:
        x = self._rows(inputs[0])
        for rate in self._dropouts:
            x = F.dropout(x, rate)
        logits, active = self._run(x, slice(None))
        self._kept = x, active
        return logits

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        weight, bias = self._names
        x, active = self._kept
        if self._maps:
            positions = x.shape[1]
            gradient = (gradient / positions)[:, None].expand(-1, positions, -1, -1)  # [B, P, H, C]
            gradient = gradient * active if self._relu else gradient
        rows = gradient.reshape(-1, gradient.shape[-2] * gradient.shape[-1])  # [B·P, H·C]
        gradients = {weight: (rows.T @ x.flatten(0, -2)).view_as(self.tensors[weight])}
        if bias in self.tensors:
            gradients[bias] = rows.sum(dim=0).view_as(self.tensors[bias])
        return gradients

    def _rows(self, x: Tensor) -> Tensor:
        """`[B, D]`, or of maps `[B, P, D]`: positions before channels."""
        return x.flatten(2).transpose(1, 2).contiguous() if self._maps else x.flatten(1)

    def _run(self, x: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """Logits `[B, H, C]`, and where the ReLU is active, `[B, P, H, C]`."""
        weight, bias = self._names
        every = self.tensors[weight][heads].flatten(2)  # [H, C, D]
        flat, matrix = x.flatten(0, -2), every.flatten(0, 1).T  # [B·P, D], [D, H·C]
        biased = bias in self.tensors
        out = torch.addmm(self.tensors[bias][heads].flatten(), flat, matrix) if biased else flat @ matrix
        out, active = out.view(*x.shape[:-1], *every.shape[:2]), x  # [B, (P,) H, C]
        if self._maps:
            if self._relu:
                active = out.relu_() > 0
            out = out.mean(dim=1)
        return out.mul_(self._scales[heads, None]), active  # positive: it may follow the ReLU and the mean


class ModuleStack:
    """Any small tail, by `torch.func` (Horace He & Richard Zou, functorch, 2021).

    Args:
        tail: see `stack`. scales: `[H]`.
    """

    def __init__(self, tail: nn.Module, scales: Tensor):
        self._tail, self._scales = deepcopy(tail), scales  # a copy: modes change
        trains = {name: value for name, value in tail.named_parameters() if value.requires_grad}
        self.tensors = _copies(trains, scales)
        self.random = any(isinstance(module, _DROPOUTS) and module.p > 0 for module in tail.modules())
        self._leaves, self._logits = {}, torch.empty(0)

    def logits(self, inputs: Inputs, *, heads: slice = slice(None)) -> Tensor:
        self._tail.eval()
        with torch.no_grad():
            return self._run(self._scaled(heads), inputs)

    def train(self, inputs: Inputs) -> Tensor:
        self._tail.train()
        self._leaves = {name: tensor.requires_grad_() for name, tensor in self._scaled(slice(None)).items()}
        with torch.enable_grad():
            self._logits = self._run(self._leaves, inputs)
        return self._logits.detach()

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(self._logits, list(self._leaves.values()), gradient)
        self._logits = torch.empty(0)
        return dict(zip(self._leaves, found, strict=True))

    def _scaled(self, heads: slice) -> dict[str, Tensor]:
        scales = self._scales[heads]
        return {name: tensor[heads] * _wide(scales, tensor) for name, tensor in self.tensors.items()}

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

    copied = without_dropout(tail).train()  # all heads share what dropout lets through
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        logits = copied(*inputs)
    parameters = sum(parameter.nbytes for parameter in tail.parameters() if parameter.requires_grad)
    return 5 * parameters + 2 * sum(sizes.values()) + 4 * logits.nbytes


def _copies(parameters: dict[str, nn.Parameter], scales: Tensor) -> dict[str, Tensor]:
    return {name: value.detach() / _wide(scales, value[None]) for name, value in parameters.items()}


def _wide(scales: Tensor, like: Tensor) -> Tensor:
    return scales.view(-1, *[1] * (like.ndim - 1))


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
                yield tail  # neither a layer nor what may be around it: no chain of these
                return
            yield from inner
    elif isinstance(tail, fx.GraphModule):
        yield from _graph_chain(tail)
    elif isinstance(tail, (nn.Linear, nn.Conv2d, *_BEFORE, *_AFTER)):
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
