"""A model cut where its features enter a linear layer: the front that computes them, the head that reads them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from spear.models.graphs import as_rows, extract
from spear.models.layers import Shape
from spear.models.modes import modes, words
from spear.models.traced import Traced, source_of
from spear.models.tracing import SPREADS, ancestors, data_path, outputs_of, traced_model
from spear.reconstruction import Refusal


@dataclass(frozen=True)
class Cut:
    """A model as head(front(x)): `layer` is the first linear layer of the head, whose inputs are the features.

    Both share the model's parameters; `own` is the model's own name of each that they alone use, those in `turned`
    are its transposes. `unknown` says why the front is no function of each sample alone, or cannot be tried.
    """

    layer: str
    front: fx.GraphModule
    head: fx.GraphModule
    own: Mapping[str, str]
    turned: frozenset[str]
    unknown: str

    def of_head(self, received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's gradients by its own names, of those received by the model's."""
        return self._named(self.head, received)

    def of_front(self, received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The front's."""
        return self._named(self.front, received)

    def _named(self, part: nn.Module, received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [name for name, _ in part.named_parameters() if self.own.get(name) in received]
        return {name: self._turned(name, received[self.own[name]]) for name in names}

    def _turned(self, name: str, g: Tensor) -> Tensor:
        return g.T if name in self.turned else g


def cut(model: nn.Module, shape: Shape = None) -> Cut | None:
    """The model cut before the first linear layer that all its outputs pass through.

    `None` where the samples themselves reach a linear layer, and where there is no such cut.
    """
    try:
        traced = traced_model(model, shape)
    except Refusal:
        return None
    for node in (node for node in traced.nodes if traced.is_linear(node)):
        if _is_data(traced, node, shape):
            return None
        made = _cut(traced, node, shape)
        if made is not None:
            return made
    return None


def _is_data(traced: Traced, node: fx.Node, shape: Shape) -> bool:
    """Whether the samples themselves reach a layer, or what dropout and normalisation in training mode left of them."""
    way = ancestors(source_of(node))
    plain = not any(isinstance(traced.part(one), SPREADS) for one in way)
    return (plain and bool(modes(traced, way, on=True))) or (
        data_path(traced, node, traced.part(node).in_features, shape) is not None
    )


def _cut(traced: Traced, node: fx.Node, shape: Shape) -> Cut | None:
    outputs, features = outputs_of(traced), source_of(node)
    way = ancestors(features)
    roots = [one for one in way if one.op == "placeholder"]
    if len(outputs) != 1 or len(roots) != 1 or len(traced.inputs) != 1:
        return None
    head, front = extract(traced, features, outputs[0], then=as_rows), extract(traced, roots[0], features, then=as_rows)
    if head is None or front is None:
        return None
    on = words(modes(traced, way, on=True))
    unknown = f"the client trained with {on} on before {node.target}: no function of a sample alone" if on else ""
    unknown = unknown or ("" if shape else "the shape of a sample was not given")
    head.training = traced.training
    return Cut(str(node.target), front, head, traced.names(), frozenset(traced.turned), unknown)
