"""Cut a model into a frozen trunk and a trainable tail.

    images ──▶ trunk (no autograd, eval mode, not wrapped, not saved) ──▶ features ──▶ tail (trained) ──▶ logits

The trunk is everything that no trainable parameter can influence. It is found on the graph that `torch.fx` records
(Reed et al., 2022, https://arxiv.org/abs/2112.08429). A node of this graph is *live* if its module has a trainable
parameter, or if it reads the value of a live node. The trunk consists of the other nodes; its outputs are the values
that live nodes read. Both parts share the model's modules under the model's own names; nothing is copied.

Only a module that is partly frozen is traced. A module that is frozen as a whole, or trainable as a whole, is one node
of the graph, so its code may be anything.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torchvision.ops import StochasticDepth

from trainer.errors import UsageError
from trainer.model.freezing import is_frozen, lock_eval
from trainer.text import counted

_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, StochasticDepth)


@dataclass
class Split:
    """A model in two parts: `tail(*trunk(images))` equals `model(images)` bit for bit, in eval mode.

    Attributes:
        trunk: the frozen part; returns a tuple of tensors `[B, ...]`. `Uncut` if nothing could be cut off.
        tail: the trainable part; takes these tensors.
        cut: names of the nodes whose values pass from trunk to tail; ("images",) for an empty trunk.
        before: name of the first node of the tail; "" for an empty trunk.
        reason: why the model could not be cut; "" if it was, or if nothing is frozen before the first trainable
            parameter.
    """

    trunk: nn.Module
    tail: nn.Module
    cut: tuple[str, ...]
    before: str = ""
    reason: str = ""

    @property
    def has_trunk(self) -> bool:
        """Whether a trunk was cut off."""
        return not isinstance(self.trunk, Uncut)

    def __str__(self) -> str:
        if self.reason:
            return f"uncut: the whole model runs as tail, its frozen parts in eval mode ({self.reason})"
        if not self.has_trunk:
            return "uncut: nothing is frozen before the first trainable parameter"
        size = sum(parameter.numel() for parameter in self.trunk.parameters())
        return f"cut before {self.before}: {counted(size, 'parameter')} in the frozen trunk"


class Uncut(nn.Module):
    """An empty trunk: returns the images."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images,)


def split_model(model: nn.Module, sample: torch.Tensor) -> Split:
    """Cut a model after `freeze`, and check on a batch that the parts compute what the model computes.

    Args:
        model: takes one tensor and returns one tensor.
        sample: a batch as the model takes it: float `[B, 3, H, W]`, normalised, on the model's device. On the meta
            device the model is cut, but the values are not compared.

    Returns:
        The two parts. The model stays uncut, with the reason, if it cannot be traced, if code that would be traced
        differs between train and eval mode, or if the parts do not return the model's output bit for bit.

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
            raise NotImplementedError("trunk and tail do not return the model's own output")
    except Exception as error:  # fx fails in many ways on code it cannot follow: none of them is the user's mistake
        reason = str(error).strip().splitlines() or [type(error).__name__]
        parts = Split(Uncut(), model, ("images",), reason=reason[0])
    if parts.tail is not model:
        lock_eval(parts.trunk)
    model.train(training)
    return parts


def _is_partly_frozen(module: nn.Module) -> bool:
    return {parameter.requires_grad for parameter in module.parameters()} == {True, False}


class _Tracer(fx.Tracer):
    """Traces modules that are partly frozen; any other is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _is_partly_frozen(m) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    """The graph of the model, which must be the same in train and eval mode: a graph cannot have `if self.training`."""
    code, partly = set(), [module for module in model.modules() if _is_partly_frozen(module)]
    for mode in (True, False):
        for module in partly:  # the attribute, because .train() also changes submodules, unless they are locked
            module.training = mode
        graph = _graph_module(model, _without_options(_Tracer().trace(model, _options(model)))).graph
        code.add(graph.python_code("self").src)
    if len(code) > 1:
        raise NotImplementedError("its forward differs between train and eval mode")
    return graph


def _options(model: nn.Module) -> dict[str, Any]:
    """The optional arguments of a model's forward and their defaults, which the graph is traced with."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    plain = (parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    return {parameter.name: parameter.default for parameter in plain if parameter.default is not parameter.empty}


def _without_options(graph: fx.Graph) -> fx.Graph:
    """The graph without placeholders of optional arguments, and without the checks that they have their defaults."""
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
    """A module that runs a graph on the submodules of `model`, without nodes whose value is not used."""
    graph = fx.GraphModule(model, graph).graph
    graph.eliminate_dead_code()  # the graph needs its module to know which calls have no side effect
    return fx.GraphModule(model, graph)  # again, to hold only the parameters that are used


def _cut(model: nn.Module, graph: fx.Graph) -> Split:
    """Divide the graph into trunk and tail; `Uncut` if the trunk would compute nothing."""
    live, modules = _live_nodes(model, graph), dict(model.named_modules())
    calls = [(modules[str(node.target)], node in live) for node in graph.nodes if node.op == "call_module"]
    random = {(module, trains) for module, trains in calls if _is_random(module)}
    if len({module for module, _ in random}) < len(random):
        raise NotImplementedError("it uses one dropout module both before and after the first trainable parameter")
    nodes = [node for node in graph.nodes if node.op != "output"]
    placeholders = [node for node in nodes if node.op == "placeholder"]
    of_image = set(placeholders)  # nodes that depend on the images; the others are constants, which both parts have
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
    """The name of a node for people: that of its module or attribute, if it has one."""
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def _live_nodes(model: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Nodes that train, dropout that only trainable modules follow, and nodes that read the value of a live node."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))

    # Is a node followed by a frozen module? Then its dropout is off, because it would add noise to frozen features.
    # Behind the last frozen module dropout is on: it regularises the trainable parameters.
    frozen_after: dict[fx.Node, bool] = {}
    for node in reversed(graph.nodes):
        frozen_after[node] = any(
            frozen_after[user] or (user.op == "call_module" and is_frozen(modules[user.target])) for user in node.users
        )

    live: set[fx.Node] = set()
    for node in graph.nodes:
        starts = False
        if node.op == "call_module":
            module = modules[node.target]
            starts = any(p.requires_grad for p in module.parameters()) or (
                _is_random(module) and not frozen_after[node]
            )
        elif node.op == "get_attr":
            starts = node.target in parameters and parameters[node.target].requires_grad
        if node.op != "output" and (starts or any(argument in live for argument in node.all_input_nodes)):
            live.add(node)
    return live


def _is_random(module: nn.Module) -> bool:
    """Whether a module without parameters draws random numbers in train mode."""
    return not any(True for _ in module.parameters()) and any(
        isinstance(part, _RANDOM) and getattr(part, "p", 1.0) > 0 for part in module.modules()
    )
