"""What makes a recovered batch certain: the server recomputes the update from it with its own weights, and compares.

`certify` asks the layer and everything after it; `certify_layer` the layer alone, where the rest is not known.
"""

import math
from contextlib import ExitStack
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.certificate import (
    BY_BIASES,
    Certificate,
    column_errors,
    input_errors,
    inverse_columns,
    length_by_labels,
    length_by_reader,
    length_slack,
    rms,
    spread_of_zeros,
)
from spear.federated.losses import activate, activate_along, one_hot
from spear.models.layers import Layer
from spear.models.streaming import Blocks, Outer, Streamed, pieces
from spear.models.watching import watched
from spear.published.filtering import determined, zero_rows
from spear.published.greedy import matching_coefficient, recover_scales
from spear.published.lowrank import MIN_GAP
from spear.published.view import LayerView, Observed

LEAST_SPARE = 8  # zeros of a column beyond the b - 1 that fix it, for one layer's word to count
MOST_UNITS, TRIED_UNITS, SAME_UNIT = 256, 8, 1e-2  # scales that samples show: looked at, tried; and when two are one
SHARPEST = 1e-3  # of a column's largest entry: what one layer's zeros must be told from


def recover_labels(
    layer: Layer, Z: Float[Tensor, "b m"], G: Float[Tensor, "b m"], scale: float, loss: str = "cross_entropy"
) -> Int[Tensor, " b"]:
    """The label of each sample from its column of G, by one directional derivative.

    With J = d logits / d z and p what the loss compares with the label, G = scale J^T (p - e_c), hence
    (p - e_c)^T J G = |G|^2 / scale for the right class c alone: one product J G serves all classes. It is taken as the
    derivative of J^T u, linear in u, by u: reverse mode twice.
    """
    value = _by_class(layer, Z, G, loss)
    return (value - (G**2).sum(1, keepdim=True) / scale).abs().argmin(1)


def shown_units(layer: Layer, Z: Float[Tensor, "b m"], G: Float[Tensor, "b m"], loss: str) -> list[float]:
    """The scales that the samples themselves show, the likeliest first: under the right one each has a class.

    |G|^2 over (p - e_c)^T J G, by sample and class; negative where the sign of the update is reversed.
    """
    ratio = (G**2).sum(1, keepdim=True) / _by_class(layer, Z, G, loss)
    found = ratio[ratio.isfinite() & (ratio != 0)]
    found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:MOST_UNITS].to(found.device)]
    near = torch.stack([((ratio / unit - 1).abs() < SAME_UNIT).any(1).sum() for unit in found]) if len(found) else found
    units: list[float] = []
    for unit in found[near.argsort(descending=True, stable=True)].tolist():
        if all(abs(unit / other - 1) > SAME_UNIT for other in units):
            units.append(unit)
    return units[:TRIED_UNITS]


def _by_class(layer: Layer, Z: Float[Tensor, "b m"], G: Float[Tensor, "b m"], loss: str) -> Float[Tensor, "b classes"]:
    """(p - e_c)^T J G of every sample and class c."""
    outputs, slope = _moved(layer, Z, G)
    wanted = one_hot(torch.arange(max(outputs.shape[1], 2), device=Z.device), outputs)
    return (activate(loss, outputs) * slope).sum(1, keepdim=True) - slope @ wanted.mT


def _moved(
    layer: Layer, Z: Float[Tensor, "b m"], along: Float[Tensor, "b m"]
) -> tuple[Float[Tensor, "b outputs"], Float[Tensor, "b outputs"]]:
    """The outputs, and how they move where the pre-activations move `along`."""
    Z = Z.detach().requires_grad_(True)
    outputs = layer.tail(Z)
    u = torch.zeros_like(outputs, requires_grad=True)
    (back,) = torch.autograd.grad(outputs, Z, u, create_graph=True)
    (slope,) = torch.autograd.grad(back, u, along)
    return outputs.detach(), slope


def explain(
    layer: Layer,
    X: Float[Tensor, "b n"],
    Z: Float[Tensor, "b m"],
    labels: Int[Tensor, " b"],
    scale: float,
    loss: str = "cross_entropy",
) -> tuple[Float[Tensor, "b m"], dict[str, Tensor | Outer]]:
    """G, and the gradients of the layer and of everything after it, by name, that a batch would give.

    Those of linear layers come as the outer products that they are: each may be large.
    """
    parameters, Z = dict(layer.tail.named_parameters()), Z.detach().requires_grad_(True)
    linear = {name: part for name, part in layer.tail.named_modules() if isinstance(part, Streamed)}
    with ExitStack() as stack:
        seen = {name: stack.enter_context(watched(part)) for name, part in linear.items()}
        outputs = layer.tail(Z)
    calls = [(name, x.detach(), z) for name, pairs in seen.items() for x, z in pairs]
    wanted = [Z, *parameters.values(), *(z for _, _, z in calls)]
    slope = scale * (activate(loss, outputs.detach()) - one_hot(labels, outputs))
    G, *rest = torch.autograd.grad(outputs, wanted, slope, materialize_grads=True)
    gradients = dict(zip(parameters, rest, strict=False))
    own = _linear(layer.name, [(G, X)])
    for name in (name for name, uses in seen.items() if uses):
        pairs = [(delta, x) for (n, x, _), delta in zip(calls, rest[len(parameters) :], strict=True) if n == name]
        own |= _linear(name, pairs)
    return G, own | gradients


def _linear(name: str, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor | Outer]:
    """The gradients of a linear layer's weight and bias, from the (delta, input) of its calls."""
    deltas, inputs = (torch.cat([x.flatten(0, -2) for x in side]) for side in zip(*pairs, strict=True))
    return {f"{name}.weight": Outer(deltas, inputs), f"{name}.bias": deltas.sum(0)}


def certify(
    target: LayerView,
    q: Float[Tensor, "b b"],
    X: Float[Tensor, "b n"],
    labels: Int[Tensor, " b"],
    *,
    whole: bool = True,
) -> tuple[Certificate, Float[Tensor, " b"]]:
    """The evidence for a batch X with its labels, recovered from the directions `q` of all columns.

    `whole` says whether the scale of the loss is the one that was told, not one that the samples show. Also returned
    is, per sample, the relative distance between its column of G and the same vector back-propagated from input and
    label.
    """
    G, layer = _columns(target, q), target.layer
    with torch.no_grad():
        Z = layer.linear(X)
        p = activate(target.loss, layer.tail(Z))
    # The client rounds p - e_c, which is small where the model is confident and right.
    confidence = torch.linalg.vector_norm(p - one_hot(labels, p), dim=1).clamp_min(target.eps)
    G_again, again = explain(layer, X, Z, labels, target.unit(p.shape[1]), target.loss)
    off = torch.linalg.vector_norm(G_again - G, dim=1) / torch.linalg.vector_norm(G, dim=1)
    limits = target.eps**0.5 + 10 * target.eps / confidence
    found = _certificate(target, q, G, X, again)
    worst = int((off / limits).argmax())
    if not found.doubt and not off[worst] <= limits[worst]:
        allows = f"rounding allows {float(limits[worst]):.0e}"
        found = replace(found, doubt=f"a sample's own gradient is off by {float(off[worst]):.0e}, {allows}")
    if not found.doubt and not _tells_lengths(target, X, labels, off.clamp_min(max(found.residual, target.eps)), whole):
        found = replace(found, reserve=BY_BIASES)
    return found, off


def _tells_lengths(
    target: LayerView, X: Float[Tensor, "b n"], labels: Int[Tensor, " b"], error: Float[Tensor, " b"], whole: bool
) -> bool:
    """Whether labels, or what reads the layer, tell how long inputs are, not the biases' gradients alone."""
    layer, allowed = target.layer, target.accuracy.recovered
    with torch.no_grad():
        Z = layer.linear(X)
    outputs, moved = _moved(layer, Z, Z - layer.linear.bias)
    own = activate(target.loss, outputs) - one_hot(labels, outputs)
    if length_by_labels(own, activate_along(target.loss, outputs, moved), error, whole=whole) <= allowed:
        return True
    shares, doubt = _by_readers(target, X)
    return not doubt and bool((shares <= allowed).all())


def certify_layer(target: LayerView, q: Float[Tensor, "b b"], X: Float[Tensor, "b n"]) -> Certificate:
    """The evidence of one layer alone, for inputs X recovered from the directions `q`: whatever follows it, any loss.

    Where every column of G is fixed by its zeros, with some to spare, no other G has this pattern. But the length of an
    input is that of dL/dW over dL/dβ, which one layer takes on trust as far as the signs of Z let it, or the gradient
    of a layer that reads it (`length_by_reader`), whatever its weights.
    """
    name, bias = target.layer.name, target.layer.linear.bias
    G = _columns(target, q)
    found = _certificate(target, q, G, X, {f"{name}.weight": Outer(G, X), f"{name}.bias": G.sum(0)})
    with torch.no_grad():
        slack = length_slack(target.layer.linear(X) - bias, bias)
    read, unread = _by_readers(target, X)
    slack = torch.minimum(slack, read)
    doubt = found.doubt or _unclear(target, q) or unread
    if not doubt and not bool((slack <= found.allowed).all()):
        least = float(slack.max())
        room = f"by {least:.0e}" if math.isfinite(least) else "by any factor"
        doubt = f"each image up to its length: no sign of Z would change if one were off {room}"
        if bool(read.isfinite().any()):
            doubt = (
                f"each image up to its length, which what {', '.join(target.layer.readers)} reads leaves open {room}"
            )
    return replace(found, error_bound=found.error_bound + slack, doubt=doubt)


def _by_readers(target: LayerView, X: Float[Tensor, "b n"]) -> tuple[Float[Tensor, " b"], str]:
    """By what share each input's length is uncertain, from the layers that read this one's; and a doubt, in words."""
    layer, best = target.layer, X.new_full((len(X),), torch.inf)
    with torch.no_grad():
        Z = layer.linear(X)
        mapped = layer.after.then_of(Z.relu())
        slopes = layer.after.slope_of((Z > 0) * (Z - layer.linear.bias))
    for name in layer.readers:
        weight = target.gradients.received.get(f"{name}.weight")
        if weight is None:
            continue
        shares, left = length_by_reader(mapped, slopes, Blocks(weight, None, X[:0]), target.eps)
        if left > target.eps**0.5 and math.isfinite(left):
            return best, f"the gradient of {name} has {left:.0e} beside the samples'"
        best = torch.minimum(best, shares)
    return best, ""


def _columns(target: LayerView, q: Float[Tensor, "b b"]) -> Float[Tensor, "b m"]:
    """The columns of G, as rows, that the directions q make."""
    return (target.observed.L @ (q.mT * recover_scales(target.observed, q))).mT


def _unclear(target: LayerView, q: Float[Tensor, "b b"]) -> str:
    """Why one layer's zeros do not tell its columns of G, in words; empty where they do."""
    tolerance, spare = target.observed.tolerance, spare_zeros(target.observed, q)
    if tolerance > SHARPEST:
        return f"zeros are told from entries of {tolerance:.0e} only, one layer alone needs {SHARPEST:.0e}"
    return f"a column has {spare} zeros to spare, one layer alone needs {LEAST_SPARE}" if spare < LEAST_SPARE else ""


def _certificate(
    target: LayerView,
    q: Float[Tensor, "b b"],
    G: Float[Tensor, "b m"],
    X: Float[Tensor, "b n"],
    again: dict[str, Tensor | Outer],
) -> Certificate:
    """The evidence for columns G and inputs X that give the gradients `again`, F_i known from the inactive units."""
    observed, name, received = target.observed, target.layer.name, target.gradients.received
    compared = {key: _compare(again.pop(key), received[key]) for key in list(again) if key in received}
    spread = spread_of_zeros(observed.L, G, zero_rows(observed.L, q, tolerance=observed.tolerance))
    bias = target.gradients[f"{name}.bias"]
    entries = _entry_error(target, compared[f"{name}.weight"][0]), compared[f"{name}.bias"][0] / len(bias) ** 0.5
    entries = entries[0], max(entries[1], target.eps * rms(bias))
    extended = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    moved = column_errors(inverse_columns(extended), spread, entries[0])
    return Certificate(
        copies=torch.ones_like(spread, dtype=torch.long),
        disclosed=target.disclosed,
        residual=max(relative for _, relative in compared.values()),
        limit=target.eps**0.5,
        error_bound=input_errors(G, extended, entries=entries)(moved),
        allowed=target.accuracy.recovered,
        doubt=_doubt(target, q),
    )


def _doubt(target: LayerView, q: Float[Tensor, "b b"]) -> str:
    """What the zero pattern or the spectrum holds against a batch, in words."""
    matching = float(matching_coefficient(target.observed, q))
    if matching < 1:
        return f"matching coefficient {matching:.6f} instead of 1"
    return "the gradient carries noise" if target.low.gap < MIN_GAP else ""


def spare_zeros(observed: Observed, q: Float[Tensor, "b b"]) -> int:
    """How many zeros each column has at least beyond the b - 1 that fix it; 0 where a single one is indispensable.

    A neuron that no sample activates is zero in every direction, and neurons of equal weights, up to a factor, are one.
    A single sample has nothing to be told from: all m rows are to spare.
    """
    m, b = observed.L.shape
    if b == 1:
        return m
    live = torch.linalg.vector_norm(observed.L, dim=1) > 1e-9
    own = live & _one_of_each(observed.B)
    zeros = zero_rows(observed.L, q, tolerance=observed.tolerance) & own
    fixed = determined(observed.L[own], q, tolerance=observed.tolerance)
    return int(torch.where(fixed, zeros.sum(1) - (b - 1), 0).min())


def _one_of_each(B: Float[Tensor, "m b"]) -> Bool[Tensor, " m"]:
    """One row of each group that differ by a positive factor, told by the angle of two random products they share."""
    generator = torch.Generator().manual_seed(0)
    across = torch.randn(B.shape[1], 2, generator=generator, dtype=B.dtype).to(B.device)
    over, under = (B @ across).unbind(1)
    turn = torch.atan2(over, under).sort()
    own = torch.ones_like(turn.indices, dtype=torch.bool)
    own[turn.indices[1:]] = turn.values.diff() > 1e-9
    return own


def _entry_error(target: LayerView, misfit: float) -> float:
    """The error of each entry of the gradient: its rounding, or what the recovered batch leaves of it."""
    m, n = target.layer.linear.weight.shape
    rounding = max(target.low.noise, target.eps * target.low.largest) / (m**0.5 + n**0.5)
    return max(rounding, misfit / (m * n) ** 0.5)


def _compare(again: Tensor | Outer, received: Tensor) -> tuple[float, float]:
    """|again - received|, and relative to |received|; 0 / 0 = 0, as for a neuron that no sample activates."""
    apart, whole = 0.0, 0.0
    for part in pieces(len(received), received[:1].numel()):
        a = again[part]
        r = received[part].to(a)
        apart = math.hypot(apart, float(torch.linalg.vector_norm(a - r)))
        whole = math.hypot(whole, float(torch.linalg.vector_norm(r)))
    return apart, apart / max(whole, 1e-300) if apart else 0.0
