"""Networks that normalise or drop units while they train, read from their graph: what is between their linear layers.

BatchNorm with the batch's own statistics is known by its module or its function; a normalisation of each sample
(LayerNorm, RMSNorm, GroupNorm of one group, or the same written by hand) by trying what it computes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor, fx, nn

from spear.models.activations import RELU, Activation, recognise
from spear.models.entrywise import ROWS, Entrywise, Piece, find, relu_then
from spear.models.graphs import extract
from spear.models.layers import Behind, Layer, Shape
from spear.models.modes import dropped, mode, modes, words
from spear.models.traced import Traced, source_of
from spear.models.tracing import LONGEST, ancestors, cuts, ends_at, layer_at, outputs_of, traced_model
from spear.reconstruction import Refusal

WANTED = "a network in training mode is attacked where it is Linear, normalisation, activation, dropout, in turn"
BY_FUNCTION = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
BY_OPERATOR = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")  # torch.export's graphs
USUAL = {"momentum": 0.1, "eps": 1e-5}
FAR, NEAR = 1e6, 1e-3  # sizes of rows at which a normalisation shows its scale, and its epsilon
LARGEST = 0.1  # epsilon of a normalisation


@dataclass(frozen=True)
class Normaliser:
    """What normalises a layer's m outputs: over the batch, the layer, or by the root mean square; then γ and η.

    `scale_name` and `shift_name` are the model's names of γ and η, empty where it has no such parameter. Of BatchNorm
    `mean_name` and `variance_name` are those of its buffers, whose new values are `rate` times the batch's statistics
    and the rest the old ones; empty where it keeps none.
    """

    kind: Literal["batch", "layer", "rms"]
    scale: Float[Tensor, " m"]
    shift: Float[Tensor, " m"]
    eps: float
    scale_name: str = ""
    shift_name: str = ""
    mean_name: str = ""
    variance_name: str = ""
    rate: float = 0.0


@dataclass(frozen=True)
class Between:
    """What follows a layer: its `norm`, its activation, BatchNorm `after` that, dropout of a share `drop` of its units
    in training mode."""

    behind: Behind
    norm: Normaliser | None
    drop: float
    after: Normaliser | None = None


def normalised_chain(model: nn.Module, shape: Shape = None) -> tuple[list[Layer], list[Between]] | None:
    """The linear layers of data -> Linear -> (normalisation) -> activation -> (BatchNorm, dropout) -> ... -> Linear ->
    logits, and what follows each hidden one.

    Raises `Refusal` as `trace` does, and for a model of any other form, naming what is in the way; `None` for one that
    neither normalises nor drops anything.
    """
    traced = traced_model(model, shape)
    nodes = [node for node in traced.nodes if traced.is_linear(node)]
    between = [_between(traced, node) for node in nodes]
    if not any(one.norm or one.after for one in between) and not modes(traced, traced.nodes, on=True):
        return None
    layers = [layer_at(traced, node, shape, one.behind) for node, one in zip(nodes, between, strict=True)]
    _check(traced, nodes, layers, between)
    return layers, between[:-1]


@dataclass(frozen=True)
class Entry:
    """What stands before the first linear layer in training mode: the module's `name`, and BatchNorm, or the share
    `drop` of the data that dropout takes."""

    name: str
    norm: Normaliser | None
    drop: float


def entry(model: nn.Module, shape: Shape = None) -> Entry | None:
    """BatchNorm or dropout of the data; `None` where there is none, where it is no module, or where there is more."""
    traced = traced_model(model, shape)
    first = next((node for node in traced.nodes if traced.is_linear(node)), None)
    before = [] if first is None else [node for node in ancestors(source_of(first)) if _is_on(traced, node)]
    part = traced.part(before[0]) if len(before) == 1 else None
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return Entry(str(before[0].target), _batch_norm(traced, before[0], part.num_features), 0.0)
    drop = 0.0 if part is None else dropped(traced, before[0])
    return Entry(str(before[0].target), None, drop) if drop else None


def _between(traced: Traced, node: fx.Node) -> Between:
    """What follows a layer, up to the first node that is neither its normalisation, its activation nor dropout."""
    m, found = traced.part(node).out_features, _Found(node)
    for cut, _ in zip(cuts(node), range(LONGEST), strict=False):
        on = dropped(traced, cut) or _is_on(traced, cut)
        if traced.is_linear(cut) or not (_switched_on(traced, cut, m, found) if on else _tried(traced, cut, m, found)):
            break
    same = Entrywise.same(m)
    behind = Behind(same, found.relu, found.activation, same, found.start, found.end)
    return Between(behind, found.norm, found.drop, found.after)


@dataclass
class _Found:
    """What stands behind a layer so far: `origin` enters its normalisation, `start` its activation; `end` is last."""

    end: fx.Node
    norm: Normaliser | None = None
    after: Normaliser | None = None
    drop: float = 0.0
    relu: fx.Node | None = None
    activation: Activation | None = None

    def __post_init__(self) -> None:
        self.origin = self.start = self.end


def _switched_on(traced: Traced, cut: fx.Node, m: int, found: _Found) -> bool:
    """Dropout, each unit for itself, once; or BatchNorm before it, once."""
    if found.drop:
        return False
    if share := dropped(traced, cut):
        found.drop = share
    elif found.norm is not None or found.after is not None or not mode(traced, cut).mixes:
        return False
    elif found.activation is None:
        found.norm, found.start = _batch_norm(traced, cut, m), cut
    else:
        found.after = _batch_norm(traced, cut, m)
    found.end = cut
    return True


def _tried(traced: Traced, cut: fx.Node, m: int, found: _Found) -> bool:
    """What changes nothing; ReLU; a normalisation of each sample; another activation, each by what it computes.

    What is none of these may be a part of one; whether more can be tried.
    """
    module = extract(traced, found.end, cut)
    if module is None:
        return False
    plain, early = find(piece := Piece(module), (m,)), found.activation is None
    if plain is not None and plain.is_plain:
        found.origin = cut if early and found.norm is None else found.origin
        found.start, found.end = (cut if early else found.start), cut
    elif early and (scaled := relu_then(piece, m)) is not None and scaled.is_plain:
        found.relu, found.activation, found.end = cut, RELU, cut
    elif not found.drop and found.after is None:
        _composed(traced, cut, m, found)
    return True


def _composed(traced: Traced, cut: fx.Node, m: int, found: _Found) -> None:
    """A normalisation of each sample, whose scale and shift may be steps of their own, or an activation."""
    if found.activation is None and (found.norm is None or found.norm.kind != "batch"):
        whole = extract(traced, found.origin, cut)
        if (norm := sample_norm(Piece(whole), m)) is not None:
            found.norm, found.start, found.end = _named(norm, whole), cut, cut
            return
    if (activation := recognise(Piece(extract(traced, found.start, cut)).double, m)) is not None:
        found.relu, found.activation, found.end = None, activation, cut


def _is_on(traced: Traced, node: fx.Node) -> bool:
    """Whether a node is dropout, or normalisation that mixes the batch, in training mode."""
    found = mode(traced, node)
    return found is not None and found.on


def _batch_norm(traced: Traced, node: fx.Node, m: int) -> Normaliser:
    """BatchNorm by its module, or by its function."""
    part = traced.part(node)
    if part is not None:
        names = {name: f"{node.target}.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
        values = {name: getattr(part, name) for name in names} | {"eps": part.eps, "momentum": part.momentum}
        steps = part.num_batches_tracked
    else:
        names, values = _arguments(traced, node)
        steps = None
    names = {name: own for name, own in names.items() if values[name] is not None}
    rate = 1 / (1 + int(steps or 0)) if values["momentum"] is None else float(values["momentum"])
    one = torch.ones(m, dtype=torch.float64)
    scale, shift = (values[name] for name in ("weight", "bias"))
    return Normaliser(
        kind="batch",
        scale=one if scale is None else scale.detach(),
        shift=torch.zeros_like(one) if shift is None else shift.detach(),
        eps=float(values["eps"]),
        scale_name=names.get("weight", ""),
        shift_name=names.get("bias", ""),
        mean_name=names.get("running_mean", ""),
        variance_name=names.get("running_var", ""),
        rate=rate,
    )


def _arguments(traced: Traced, node: fx.Node) -> tuple[dict[str, str], dict[str, Any]]:
    """Names and values of the tensors that a function is given, and of its numbers."""
    order = BY_OPERATOR if isinstance(node.target, torch._ops.OpOverload) else BY_FUNCTION
    given = USUAL | dict(zip(order, node.args[1:], strict=False)) | node.kwargs
    names = {name: str(one.target) for name, one in given.items() if isinstance(one, fx.Node) and one.op == "get_attr"}
    values = {name: traced.value(given[name]) if name in names else given.get(name) for name in (*order, *USUAL)}
    names = {name: names.get(name, "") for name in ("weight", "bias", "running_mean", "running_var")}
    return names, {name: value for name, value in values.items() if name != "training"}


def sample_norm(piece: Piece, m: int) -> Normaliser | None:
    """The normalisation of each sample that a piece is, its names left out; `None` where it is none."""
    generator = Generator().manual_seed(0)
    rows = torch.randn(ROWS, m, generator=generator, dtype=torch.float64)
    v = piece(torch.cat([torch.zeros_like(rows[:1]), FAR * rows, NEAR * rows, rows]))
    if v is None or v.shape != (1 + 3 * ROWS, m) or v.dtype != torch.float64 or not bool(v.isfinite().all()):
        return None
    shift, (far, near, own) = v[0], (v[1:] - v[0]).split(ROWS)
    for kind in ("layer", "rms"):
        centred = rows - rows.mean(1, keepdim=True) if kind == "layer" else rows
        square = centred.square().mean(1, keepdim=True)
        scale = (far * square.sqrt() / centred).median(0)[0]
        eps = max(float(((scale * NEAR * centred / near).square() - NEAR**2 * square).nanmedian()), 0.0)
        sizes = (FAR, far), (NEAR, near), (1.0, own)
        made = lambda size: scale * size * centred / (size**2 * square + eps).sqrt()  # noqa: B023, E731
        same = [torch.allclose(made(size), v, rtol=1e-6) for size, v in sizes]
        if bool(scale.any()) and eps < LARGEST and all(same):
            return Normaliser(kind, scale, shift, eps)
    return None


def _named(norm: Normaliser, module: fx.GraphModule) -> Normaliser:
    """With the names of the parameters that hold γ and η."""
    names = {"scale": "", "shift": ""}
    for name, value in module.named_parameters():
        for kind in names:
            if value.shape == norm.scale.shape and torch.allclose(value.double(), getattr(norm, kind), atol=1e-6):
                names[kind] = names[kind] or name
    return Normaliser(norm.kind, norm.scale, norm.shift, norm.eps, names["scale"], names["shift"])


def _check(traced: Traced, nodes: list[fx.Node], layers: list[Layer], between: list[Between]) -> None:
    """Raises `Refusal` where the layers are no chain from the data to the logits."""
    names, outputs = [layer.name for layer in layers], outputs_of(traced)
    on = words(modes(traced, traced.nodes, on=True))
    trained = f"{WANTED}; the client trained with {on} on" if on else WANTED
    if len(layers) < 2 or layers[0].path is None or layers[0].rows > 1:
        raise Refusal(f"{trained}, and no linear layer reads the data directly")
    if len(outputs) != 1:
        raise Refusal(f"{trained}; the model gives {len(outputs)} outputs")
    shared = [name for name in names if f"{name}.weight" not in layers[0].own]
    if len(set(names)) < len(names) or shared:
        raise Refusal(f"{trained}; {', '.join(sorted(set(shared or names)))} shares its weights")
    norms = [norm for one in between for norm in (one.norm, one.after) if norm is not None]
    own = [norm.scale_name for norm in norms if norm.scale_name]
    if len(set(own)) < len(own):
        raise Refusal(f"{trained}; {max(own, key=own.count)} is of several layers")
    for k, layer in enumerate(layers[:-1]):
        end = between[k].behind.end
        if layer.activation is None or end is not source_of(nodes[k + 1]):
            found = ", ".join(user.name for user in end.users)
            raise Refusal(f"{trained}; behind {layer.name} comes {found}")
    last = between[-1]
    if (
        last.norm is not None
        or last.after is not None
        or last.drop
        or not ends_at(traced, last.behind.end, outputs[0], layers[-1])
    ):
        raise Refusal(f"{trained}; something else follows {names[-1]}")
