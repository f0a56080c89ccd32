"""Cut a model into a frozen trunk and a live tail.

    images ──▶ trunk (no autograd, eval mode, not wrapped, not saved) ──▶ features ──▶ tail (trained) ──▶ logits

The trunk is everything that no trainable parameter can influence. It is found on the graph that `torch.fx` records
(Reed et al., 2022, https://arxiv.org/abs/2112.08429): a node is *live* if its module trains or if it reads a live
node; the frozen nodes that live nodes read are the *frontier*, and their values are what passes from trunk to tail.
Both parts share the model's modules and keep its parameter names; nothing is copied.

Only modules that are partly frozen are traced through. A module that is frozen, or trainable, as a whole is one opaque
node of the graph, so its code may do whatever it likes.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torchvision.ops import StochasticDepth

from trainer.errors import UsageError
from trainer.model.freezing import is_frozen, lock_eval

_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, StochasticDepth)


@dataclass
class Split:
    """A model in two parts: `tail(*trunk(images))` is `model(images)`, bit for bit, in eval mode.

    Attributes:
        trunk: frozen; a tuple of tensors, whatever it computes. Without parameters if nothing could be cut off.
        tail: the trainable rest.
        cut: the names of the nodes whose values pass from trunk to tail; ("images",) if the trunk is empty.
        before: the name of the first node of the tail.
        reason: why the model runs uncut; empty if it was cut, or if nothing in it is frozen before the first trainable
            parameter.
    """

    trunk: nn.Module
    tail: nn.Module
    cut: tuple[str, ...]
    before: str = ""
    reason: str = ""

    @property
    def has_trunk(self) -> bool:
        """Whether anything was cut off."""
        return not isinstance(self.trunk, Uncut)

    def __str__(self) -> str:
        if self.reason:
            return f"uncut: the whole model runs as tail, its frozen parts in eval mode ({self.reason})"
        if not self.has_trunk:
            return "uncut: nothing is frozen before the first trainable parameter"
        size = sum(parameter.numel() for parameter in self.trunk.parameters())
        return f"cut before {self.before}: {size:,} parameters are frozen in the trunk"


class Uncut(nn.Module):
    """The empty trunk: hands the images through."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images,)


def split_model(model: nn.Module, sample: torch.Tensor) -> Split:
    """Cut a model whose parameters have been frozen (`freezing.freeze`), and check the cut on a batch.

    Args:
        model: takes one tensor, gives one tensor.
        sample: a batch as the model gets it: float `[B, 3, H, W]`, normalised, on the model's device. On the meta
            device the cut is made but not checked.

    Returns:
        The parts. A model that cannot be traced, depends on train mode in code that would be traced, or whose parts do
        not give the model's own output bit for bit, comes back uncut, with the reason.

    Raises:
        UsageError: the model cannot take such a batch.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(sample)
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        size = "×".join(map(str, sample.shape[-2:]))
        raise UsageError(f"{type(model).__name__} cannot take images of {size} pixels: {error}") from error
    try:
        graph = _trace(model)
        parts = _cut(model, graph)
        with torch.no_grad():
            features = parts.trunk(sample)
            found = parts.tail(*features)
        if not all(isinstance(value, torch.Tensor) and value.shape[:1] == sample.shape[:1] for value in features):
            raise NotImplementedError("something other than one row per image passes from its trunk to its tail")
        if not sample.is_meta and not torch.equal(found, expected):
            raise NotImplementedError("trunk and tail do not give the model's own output")
    except Exception as error:  # fx fails in many ways on code it cannot follow: none of them is the user's mistake
        reason = str(error).strip().splitlines() or [type(error).__name__]
        parts = Split(Uncut(), model, ("images",), reason=reason[0])
    if parts.tail is not model:
        lock_eval(parts.trunk)
    model.train(training)
    return parts


class _Tracer(fx.Tracer):
    """Traces through modules that hold both frozen and trainable parameters; any other is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        trains = {parameter.requires_grad for parameter in m.parameters()}
        return trains != {True, False} or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    """The model's graph, which must be the same in both modes: a graph cannot follow `if self.training`."""
    code = []
    partly = [m for m in model.modules() if {p.requires_grad for p in m.parameters()} == {True, False}]
    for mode in (True, False):
        for module in partly:  # flags alone: a module's own .train() would also switch, or refuse to switch, others
            module.training = mode
        graph = _graph_module(model, _without_options(_Tracer().trace(model, _options(model)))).graph
        code.append(graph.python_code("self").src)
    if code[0] != code[1]:
        raise NotImplementedError("its forward differs between train and eval mode")
    return graph


def _options(model: nn.Module) -> dict[str, Any]:
    """The arguments of a model's forward after the first, with their defaults: they stay what they are."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    plain = (parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    return {parameter.name: parameter.default for parameter in plain if parameter.default is not parameter.empty}


def _without_options(graph: fx.Graph) -> fx.Graph:
    """The graph without the inputs for such arguments, and without the checks that they have their defaults."""
    for node in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        chain = [node]
        for user in chain:
            chain += [other for other in user.users if other not in chain]
        if not all(user.op == "call_function" or user is node for user in chain):
            raise NotImplementedError("its forward takes more than one argument")
        for user in reversed(chain):
            graph.erase_node(user)
    return graph


def _graph_module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs `graph` on the submodules of `model`, without the nodes that nothing reads."""
    graph = fx.GraphModule(model, graph).graph
    graph.eliminate_dead_code()  # needs a graph that belongs to a module, to know which calls are pure
    return fx.GraphModule(model, graph)  # holds what is left, no parameter more


def _cut(model: nn.Module, graph: fx.Graph) -> Split:
    live = _live_nodes(model, graph)
    modules = dict(model.named_modules())
    random = [(modules[n.target], n in live) for n in graph.nodes if n.op == "call_module"]
    random = [(module, trains) for module, trains in random if _is_random(module)]
    if any((module, not trains) in random for module, trains in random):
        raise NotImplementedError("it uses one dropout module both before and after the first trainable parameter")
    nodes = [node for node in graph.nodes if node.op != "output"]
    placeholders = [node for node in nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise NotImplementedError("its forward takes more than one argument")
    of_image = set(placeholders)  # what depends on the image; the rest are constants, which each part has for itself
    for node in nodes:
        if any(argument in of_image for argument in node.all_input_nodes):
            of_image.add(node)
    frozen = [node for node in nodes if node in of_image and node not in live]
    frontier = [node for node in frozen if any(user in live or user.op == "output" for user in node.users)]
    if frozen == placeholders or frontier == placeholders:
        return Split(Uncut(), model, ("images",))

    trunk, tail = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in live:
            copies[node] = trunk.node_copy(node, copies.__getitem__)
    trunk.output(tuple(copies[node] for node in frontier))

    copies = {node: tail.placeholder(node.name) for node in frontier}
    for node in graph.nodes:
        if node.op == "output":
            tail.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node in live or node not in of_image:
            copies[node] = tail.node_copy(node, copies.__getitem__)
    first = next(node for node in nodes if node in live)
    cut = tuple(_name(node) for node in frontier)
    return Split(_graph_module(model, trunk), _graph_module(model, tail), cut, before=_name(first))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def _live_nodes(model: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Nodes that train, draw random numbers late enough to be worth it, or read such a node."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))

    # Backwards: is a node followed by a module that is frozen and has parameters? Then dropout there is switched off:
    # it would make the frozen features noisy. After the last of them it regularises what trains: it stays on.
    frozen_after: dict[fx.Node, bool] = {}
    for node in reversed(graph.nodes):
        frozen_after[node] = any(
            frozen_after[user] or (user.op == "call_module" and is_frozen(modules[user.target])) for user in node.users
        )

    live: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            starts = any(parameter.requires_grad for parameter in module.parameters())
            starts |= _is_random(module) and not frozen_after[node]
        elif node.op == "get_attr":
            parameter = parameters.get(node.target)
            starts = parameter is not None and parameter.requires_grad
        else:
            starts = False
        if starts or any(argument in live for argument in node.all_input_nodes):
            live.add(node)
    live -= {node for node in live if node.op == "output"}
    return live


def _is_random(module: nn.Module) -> bool:
    """Whether a module without parameters draws random numbers in train mode."""
    return not any(True for _ in module.parameters()) and any(
        isinstance(part, _RANDOM) and getattr(part, "p", 1.0) > 0 for part in module.modules()
    )
