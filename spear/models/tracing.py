"""Where a linear layer stands in a model: found by tracing the computation, never by a name."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from spear.reconstruction import Refusal

RESHAPES = {"flatten", "reshape", "view", "contiguous", "float", "double"}
RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
SAME_AT_EVALUATION = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Layer:
    """A linear layer Z = W X + beta of a traced model.

    `name` is the module's qualified name; `from_data` says whether its input is the model's input up to reshaping;
    `tail` computes the logits (b, C) from the layer's pre-activations z (b, m) and shares the model's parameters; it is
    `None` where the logits depend on more than these (a branch around the layer).
    """

    name: str
    linear: nn.Linear
    from_data: bool
    relu: bool
    tail: fx.GraphModule | None


def trace(model: nn.Module) -> fx.GraphModule:
    """The computation graph of a model.

    Raises `Refusal` where `torch.fx` cannot trace it (control flow that depends on the data, for instance).
    """
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # torch.fx raises many kinds, whatever the model's own code raises among them
        raise Refusal(f"torch.fx cannot trace {type(model).__name__}: {error}") from error


def linear_layers(model: nn.Module) -> list[Layer]:
    """Every `nn.Linear` of a model in the order of computation. Raises as `trace` does."""
    graph = trace(model)
    modules = dict(graph.named_modules())
    return [_layer(graph, node, modules) for node in graph.graph.nodes if _is_linear(node, modules)]


def chain(model: nn.Module) -> list[Layer]:
    """The linear layers of a model that is data -> Linear -> ReLU -> ... -> Linear -> logits, in that order.

    Raises `Refusal` as `trace` does, and for a model of any other form, naming what is in the way.
    """
    graph = trace(model)
    modules = dict(graph.named_modules())
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    layers = [_layer(graph, n, modules) for n in graph.graph.nodes if _is_linear(n, modules)]
    names = [layer.name for layer in layers]
    node, wanted = inputs[0], []
    while node.op != "output" and len(node.users) == 1:
        node = next(iter(node.users))
        if _is_linear(node, modules) or _is_relu(node, modules):
            wanted.append("linear" if _is_linear(node, modules) else "relu")
        elif node.op != "output" and not _is_reshape(node, modules):
            raise Refusal(f"the network method needs linear layers with ReLU between them; {node.name} is neither")
    plain = wanted == ["linear", "relu"] * (len(layers) - 1) + ["linear"]
    if node.op != "output" or not plain or len(set(names)) < len(names):
        raise Refusal(f"the network method needs one chain of linear layers with ReLU between them; found {wanted}")
    return layers


def find_layer(model: nn.Module, name: str | None = None) -> Layer:
    """The linear layer of that name; without a name, the first whose input is the data itself up to reshaping.

    Raises `Refusal` for a layer that does not exist, and for one that no ReLU follows.
    """
    layers = linear_layers(model)
    known = ", ".join(layer.name for layer in layers) or "none"
    chosen = [x for x in layers if (x.name == name if name is not None else x.from_data)]
    if not chosen:
        wanted = f"no linear layer named {name!r}" if name is not None else "no linear layer reads the data directly"
        raise Refusal(f"{wanted}; the model's linear layers: {known}")
    if not chosen[0].relu:
        raise Refusal(f"no ReLU follows {chosen[0].name}: its gradient has no zeros to read the batch from")
    return chosen[0]


def _layer(graph: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module]) -> Layer:
    users = list(node.users)
    relu = len(users) == 1 and _is_relu(_skip_identities(users[0], modules), modules)
    source = node.args[0] if node.args else node.kwargs["input"]
    return Layer(str(node.target), modules[node.target], _is_data(source, modules), relu, _tail(graph, node))


def _skip_identities(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    while node.op == "call_module" and isinstance(modules[node.target], SAME_AT_EVALUATION) and len(node.users) == 1:
        node = next(iter(node.users))
    return node


def _is_linear(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[node.target], nn.Linear)


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in RELUS


def _is_data(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    while node.op != "placeholder":
        if not _is_reshape(node, modules):
            return False
        node = node.args[0]
    return True


def _is_reshape(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[node.target], (nn.Flatten, nn.Unflatten, *SAME_AT_EVALUATION))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in RESHAPES


def _tail(graph: fx.GraphModule, start: fx.Node) -> fx.GraphModule | None:
    """The part of the graph that follows from the output of `start` alone; none where the model's output needs more."""
    tail = fx.Graph()
    copies = {start: tail.placeholder("z")}
    for node in graph.graph.nodes:
        needs = node.all_input_nodes
        if node.op == "get_attr" or (needs and node not in copies and all(n in copies for n in needs)):
            copies[node] = tail.node_copy(node, copies.__getitem__)
    if not any(node.op == "output" for node in copies):
        return None
    module = fx.GraphModule(graph, tail)
    tail.eliminate_dead_code()
    module.recompile()
    return module
