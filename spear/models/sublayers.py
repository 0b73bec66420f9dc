"""What stands before a feed-forward block of a transformer: a branch, e.g. attention, added to a stream, normalised."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import fx, nn

from spear.models.entrywise import ROWS, Piece
from spear.models.graphs import as_rows, extract, is_size
from spear.models.normalised import Normaliser, sample_norm
from spear.models.traced import Traced, operation, source_of
from spear.models.tracing import LONGEST, ancestors

SHAPES = {"dropout", "transpose", "view", "reshape", "permute", "contiguous", "flatten", "unflatten", "unsqueeze"}


@dataclass(frozen=True)
class Normalised:
    """x = norm(h) enters a linear layer: `end` and `given`, the nodes of x and h. `rounding` is what the model's own
    precision leaves in the mean of the squares that it makes 1."""

    end: fx.Node
    given: fx.Node
    norm: Normaliser
    rounding: float


@dataclass(frozen=True)
class Sublayer:
    """x = norm(e + o) enters a block, e = `stream`(sample) and o = `branch`(e), whose last step is the layer `out`.

    All modules share the model's parameters; `front` is all of it together, one row a sample. `weight` is the model's
    name of `out`'s weights, `turned`: it holds them transposed.
    """

    stream: fx.GraphModule
    branch: fx.GraphModule
    front: fx.GraphModule
    norm: Normaliser
    out: nn.Linear
    weight: str
    turned: bool


def normalised(traced: Traced, name: str) -> Normalised | None:
    """The normalisation that stands directly before the linear layer of that name; `None` where none does."""
    node = next((one for one in traced.nodes if traced.is_linear(one) and str(one.target) == name), None)
    if node is None:
        return None
    end, m = source_of(node), traced.part(node).in_features
    for given in islice((one for one in reversed(ancestors(end)) if one is not end), LONGEST):
        module = None if traced.is_linear(end) else extract(traced, given, end)
        norm = None if module is None else sample_norm(piece := Piece(module), m)
        if norm is not None:
            return Normalised(end, given, norm, _rounding(piece, norm, m))
    return None


def added(traced: Traced, found: Normalised, begins: Sequence[str], second: str) -> list[fx.Node]:
    """The linear layers whose outputs make h, as they are, where it is seen by a block alone, between its layers
    `begins` and `second`, and by the sum of the two: the loss' gradient by h is that by the sum and what is led back.
    """
    within = {found.given}
    for one in ancestors(found.end):
        within |= {one} if within & set(one.all_input_nodes) else set()
    seen_by = {user for one in within for user in one.users if user not in within and not is_size(user)}
    sums = {one for one in seen_by if found.given in _summands(one)}
    ends = [str(out.target) for one in sums for out in _made_of(traced, one)]
    if len(sums) > 1 or {str(one.target) for one in seen_by - sums} != set(begins) or second not in ends:
        return []
    return _made_of(traced, found.given)


def _made_of(traced: Traced, node: fx.Node) -> list[fx.Node]:
    """The linear layers whose outputs are a node's value, or a summand of it, and are used for nothing else."""
    outs = [_last_linear(traced, part) for part in _summands(node) or (node,)]
    return [out for out in outs if out is not None and _leads_only(out, node)]


def _leads_only(start: fx.Node, end: fx.Node) -> bool:
    while start is not end and len(start.users) == 1:
        (start,) = start.users
    return start is end


def _summands(node: fx.Node) -> tuple[object, ...]:
    return node.args[:2] if operation(node) == "add" and not node.kwargs else ()


def sublayer(traced: Traced, name: str) -> Sublayer | None:
    """What stands before the linear layer of that name; `None` where that is anything else."""
    found = normalised(traced, name)
    if found is None or operation(found.given) != "add" or len(traced.inputs) != 1:
        return None
    total, root = found.given, traced.inputs[0]
    for stream, branch in (total.args[:2], total.args[1::-1]):
        out = _last_linear(traced, branch)
        if out is None or not isinstance(stream, fx.Node) or stream not in ancestors(out):
            continue
        weight = f"{out.target}.weight"
        ends = (root, stream), (stream, branch), (root, found.end, as_rows)
        pieces = [extract(traced, *each) for each in ends]
        own = traced.names().get(weight)
        if all(piece is not None for piece in pieces) and own is not None:
            return Sublayer(*pieces, found.norm, traced.part(out), own, weight in traced.turned)
    return None


def _rounding(piece: Piece, norm: Normaliser, m: int) -> float:
    """How far the mean of the squares is from what eps says, at most."""
    rows = torch.randn(ROWS, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    n = (piece(rows) - norm.shift) / norm.scale
    square = (rows - rows.mean(1, keepdim=True) if norm.kind == "layer" else rows).square().mean(1)
    return float((n.square().mean(1) - square / (square + norm.eps)).abs().max())


def _last_linear(traced: Traced, node: object) -> fx.Node | None:
    """The linear layer whose outputs a node gives, in another shape at most."""
    while isinstance(node, fx.Node) and not traced.is_linear(node):
        plain = isinstance(traced.part(node), nn.Dropout | nn.Identity) or operation(node) in SHAPES
        node = node.args[0] if plain and node.args else None
    return node
