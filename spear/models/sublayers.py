"""What stands before a feed-forward block of a transformer: a branch, e.g. attention, added to a stream, normalised."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from spear.models.graphs import as_rows, extract
from spear.models.traced import Traced, operation
from spear.models.tracing import ancestors, source_of

SHAPES = {"dropout", "transpose", "view", "reshape", "permute", "contiguous", "flatten", "unflatten", "unsqueeze"}


@dataclass(frozen=True)
class Sublayer:
    """x = norm(e + o) enters a block, e = `stream`(sample) and o = `branch`(e), whose last step is the layer `out`.

    All modules share the model's parameters; `front` is all of it together, one row a sample. `gain`, `shift` are the
    normalisation's, ones and zeros where it has none. `turned`: the model holds `out`'s weights transposed.
    """

    stream: fx.GraphModule
    branch: fx.GraphModule
    front: fx.GraphModule
    gain: Tensor
    shift: Tensor
    out: nn.Linear
    weight: str
    turned: bool


def sublayer(traced: Traced, name: str) -> Sublayer | None:
    """What stands before the linear layer of that name; `None` where that is anything else."""
    node = next((one for one in traced.nodes if traced.is_linear(one) and str(one.target) == name), None)
    norm = None if node is None else source_of(node)
    if norm is None or not (given := _normalised(traced, norm)):
        return None
    total, gain, shift = given
    if operation(total) != "add" or len(traced.inputs) != 1:
        return None
    for stream, branch in (total.args[:2], total.args[1::-1]):
        out = _last_linear(traced, branch)
        if out is None or not isinstance(stream, fx.Node) or stream not in ancestors(out):
            continue
        root, weight = traced.inputs[0], f"{out.target}.weight"
        pieces = extract(traced, root, stream), extract(traced, stream, branch), extract(traced, root, norm, as_rows)
        own = traced.names().get(weight)
        if all(piece is not None for piece in pieces) and own is not None:
            return Sublayer(*pieces, gain, shift, traced.part(out), own, weight in traced.turned)
    return None


def _normalised(traced: Traced, node: fx.Node) -> tuple[fx.Node, Tensor, Tensor] | None:
    """What a layer normalisation over the last entries is given, its gain and its shift."""
    part = traced.part(node)
    if isinstance(part, nn.LayerNorm) and len(part.normalized_shape) == 1:
        given, size, parameters = source_of(node), part.normalized_shape[0], (part.weight, part.bias)
    elif node.op == "call_function" and operation(node) == "layer_norm" and len(node.args[1]) == 1:
        given, size = node.args[0], node.args[1][0]
        both = [*node.args[2:4], None, None][:2]
        parameters = [traced.value(one) if isinstance(one, fx.Node) else None for one in both]
    else:
        return None
    usual = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    gain, shift = (own if one is None else one.detach().double() for one, own in zip(parameters, usual, strict=True))
    return given, gain, shift


def _last_linear(traced: Traced, node: object) -> fx.Node | None:
    """The linear layer whose outputs a node gives, in another shape at most."""
    while isinstance(node, fx.Node) and not traced.is_linear(node):
        plain = isinstance(traced.part(node), nn.Dropout | nn.Identity) or operation(node) in SHAPES
        node = node.args[0] if plain and node.args else None
    return node
