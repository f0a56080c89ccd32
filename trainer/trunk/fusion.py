"""Fold BatchNorm into convolutions; on a CPU, also fuse sums and activations into them.

Both work on copies of fx graphs in eval mode, and return the same features up to rounding.
"""

import operator
from collections import Counter
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trainer.model.freezing import lock_eval

_ADD = (operator.add, operator.iadd, torch.add)
_RELU = ("relu", [])
# An activation after a convolution → its name and scalars in oneDNN's operators.
_ACTIVATIONS = {nn.ReLU: _RELU, functional.relu: _RELU, torch.relu: _RELU}
_ACTIVATIONS |= {nn.ReLU6: ("hardtanh", [0.0, 6.0]), nn.SiLU: ("swish", [])}


def folded_copy(trunk: nn.Module) -> tuple[fx.GraphModule, int]:
    """A copy of a frozen module with each BatchNorm folded into the convolution before it.

    W' = γ / √(σ² + ε) · W, b' = γ / √(σ² + ε) · (b − μ) + β (Jacob et al., 2018, https://arxiv.org/abs/1712.05877).

    Returns:
        The copy, and the number of BatchNorms that were folded.
    """
    copy = deepcopy(fx.symbolic_trace(trunk))
    modules: dict[Any, Any] = dict(copy.named_modules())
    uses = Counter(node.target for node in copy.graph.nodes if node.op == "call_module")
    folded = 0
    for node in list(copy.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or not isinstance(modules[before.target], nn.Conv2d):
            continue
        if len(before.users) == uses[before.target] == uses[node.target] == 1:
            copy.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target], modules[node.target]))
            node.replace_all_uses_with(before)
            copy.graph.erase_node(node)
            folded += 1
    copy.delete_all_unused_submodules()
    copy.recompile()
    lock_eval(copy)
    return copy, folded


class _FusedConv(nn.Module):
    """A convolution of oneDNN that also adds another tensor and applies an activation.

    Args:
        conv: the convolution.
        shape: shape of its input. Its weight is stored in the order that oneDNN uses for it, so that calls need not
            reorder it.
        activation: name and scalars of oneDNN's activation; None: none.
    """

    def __init__(self, conv: nn.Conv2d, shape: torch.Size, activation: tuple[str, list[float]] | None):
        super().__init__()
        self.how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *self.how, list(shape))
        self.bias, self.activation = conv.bias, activation

    def forward(self, images: Tensor, other: Tensor | None = None) -> Tensor:
        name, scalars = self.activation or (None, [])
        tensors = (self.weight, self.bias, *self.how)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(images, *tensors, name or "none", scalars, None)
        return torch.ops.mkldnn._convolution_pointwise(images, other, *tensors, "add", 1.0, name, scalars, None)


def fuse_convolutions(module: fx.GraphModule, sample: Tensor) -> int:
    """Fuse the sum and the activation after each convolution of a frozen module into the convolution, in place.

    `torch.compile` does the same on a CPU (torch/_inductor/fx_passes/mkldnn_fusion.py), but takes half a minute. The
    operators are private to torch, so the features should be compared.

    Args:
        module: is changed.
        sample: a few images as the module takes them; later batches may have another number of images.

    Returns:
        The number of convolutions with something fused into them.
    """
    ShapeProp(module).propagate(sample)
    modules: dict[Any, Any] = dict(module.named_modules())

    def kind(node: fx.Node) -> object:
        return type(modules[node.target]) if node.op == "call_module" else node.target

    def then(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    count = 0
    for number, node in enumerate([node for node in module.graph.nodes if kind(node) is nn.Conv2d]):
        images, end, others = node.args[0], node, []
        if (after := then(end)) is not None and kind(after) in _ADD and not after.kwargs:
            others = [value for value in after.args if value is not node and isinstance(value, fx.Node)]
            others = [value for value in others if _shape(value) == _shape(node)]
            end = after if others else end
        activation = _ACTIVATIONS.get(kind(after)) if (after := then(end)) is not None else None
        if others and activation is not _RELU:  # the only activation that oneDNN combines with a sum
            activation = None
        end = end if activation is None or after is None else after
        conv, name = _FusedConv(modules[node.target], _shape(images), activation), f"fused_{number}"
        module.add_module(name, conv)
        with module.graph.inserting_before(end):
            fused = module.graph.call_module(name, (images, *others))
        fused.meta = end.meta
        end.replace_all_uses_with(fused)
        count += end is not node
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return count


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["tensor_meta"].shape
