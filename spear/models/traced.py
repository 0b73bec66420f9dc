"""A traced model: its nodes, its parts, and what an operation is called however it is written."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn


@dataclass(frozen=True)
class Traced:
    """A model's graph, and how its parameters are called: `origin` names the model's own parameter of each that a
    linear module made here has, `turned` those of them that the model holds transposed. `training`: the model is in
    training mode (the graph is of evaluation mode)."""

    module: fx.GraphModule
    training: bool
    origin: dict[str, str] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        """What the caller gives."""
        return [node for node in self.nodes if node.op == "placeholder"]

    def part(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def is_linear(self, node: fx.Node) -> bool:
        return isinstance(self.part(node), nn.Linear)

    def value(self, node: fx.Node) -> Any:
        """The parameter, buffer or constant that a node gets."""
        return operator.attrgetter(node.target)(self.module)

    def is_parameter(self, node: Any, dimensions: int) -> bool:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return False
        value = self.value(node)
        return isinstance(value, nn.Parameter) and value.ndim == dimensions

    def names(self) -> dict[str, str]:
        """The model's own name of every parameter of the graph that one module alone uses."""
        owners: dict[int | str, set[str]] = {}
        known = {}
        for target, name, parameter in self._used():
            own = self.origin.get(name, name)
            known[name] = own
            owners.setdefault(id(parameter), set()).add(target)
            owners.setdefault(own, set()).add(target)
        tensors = dict(self.module.named_parameters(remove_duplicate=False))
        alone = lambda name, own: len(owners[own]) == 1 and len(owners[id(tensors[name])]) == 1  # noqa: E731
        return {name: own for name, own in known.items() if alone(name, own)}

    def _used(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Every use of a parameter: what uses it, its name in the graph, the parameter."""
        for node in self.nodes:
            if node.op == "call_module":
                for name, parameter in self.part(node).named_parameters(remove_duplicate=False):
                    yield node.target, f"{node.target}.{name}", parameter
            elif node.op == "get_attr" and isinstance(self.value(node), nn.Parameter):
                yield f"={node.target}", node.target, self.value(node)


def source_of(node: fx.Node) -> fx.Node:
    """The node whose value a call takes first."""
    return node.args[0] if node.args else node.kwargs["input"]


def operation(node: fx.Node) -> str:
    """What a call does, by its name in torch; the overload of an operator does not matter."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", "")
