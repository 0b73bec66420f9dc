"""The batch's own forward and backward pass, statistics included, held against every gradient of the update."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.certificate import inverse_columns, rms
from spear.directions import complement
from spear.network.problem import NetworkView, Targets
from spear.network.spaces import contrasts
from spear.normalisation.problem import Norm, NormalisedView, denormalise, normalise

CORRECTIONS = 8  # of the inputs: each halves the misfit, or is the last


@dataclass(frozen=True)
class Run:
    """What a batch does in each layer: `inputs[k]` (b, n_k), x̂ `normals[k]` and `outputs[k]` y (b, m_k) of the hidden
    ones, ∂L/∂y `slopes[k]` and ∂L/∂z `deltas[k]` (b, m_k), the last of which is ∂L/∂logits. `active[k]` (b, m_k) are
    the units whose activation is not flat, and that were not dropped. `behind[k]` are x̂ behind the activation and the
    gradient by what that gives."""

    inputs: tuple[Float[Tensor, "b _in"], ...]
    normals: tuple[Float[Tensor, "b _m"], ...]
    outputs: tuple[Float[Tensor, "b _m"], ...]
    slopes: tuple[Float[Tensor, "b _m"], ...]
    deltas: tuple[Float[Tensor, "b _out"], ...]
    active: tuple[Bool[Tensor, "b _m"], ...]
    behind: tuple[tuple[Float[Tensor, "b _m"], Float[Tensor, "b _m"]], ...]


def possible_errors(
    network: NetworkView, own: Run, eps: float
) -> tuple[Float[Tensor, "outputs r"], Float[Tensor, " b"]]:
    """Orthonormal basis of the possible ∂L/∂logits, and how far each sample's may be out of it, per entry.

    That is the span of the batch's own where the output layer's gradient, E Y, has the rank of the batch: every batch
    that gives it has that span. `eps` is the gradient's relative rounding.
    """
    every, E = contrasts(network.outputs, network.loss, own.deltas[-1]), own.deltas[-1]
    away = inverse_columns(network.extend(network.last + 1, own.inputs[-1]))
    if every.shape[1] <= len(E) or not bool((inverse_columns(E) + away).isfinite().all()):
        return every, torch.zeros_like(away)
    return torch.linalg.qr(E.mT)[0], eps * rms(network.weight_gradients[-1]) * away


Kept = tuple[Bool[Tensor, "b _m"] | None, ...]  # what dropout kept in each hidden layer; None where there is none


def run(view: NormalisedView, inputs: Float[Tensor, "b n"], targets: Targets, kept: Kept) -> Run:
    """Forward and backward pass of a batch with its labels, and what dropout kept."""
    network, states, before, steep, after = view.network, [inputs], [], [], []
    for k, norm in enumerate(view.norms):
        before.append(normalise(norm, network.apply(k, states[-1])))
        y, mask = before[-1][0], view.mask(k, kept[k])
        steep.append(network.activations[k].slope(y) * mask)
        after.append(normalise(view.afters[k], network.activations[k].value(y) * mask))
        states.append(after[-1][0])
    deltas = [targets.errors(network.activate(network.apply(network.last + 1, states[-1])))]
    slopes: list[Tensor] = []
    behind: list[tuple[Tensor, Tensor]] = []
    for k in range(network.last, -1, -1):
        behind.insert(0, (after[k][1], deltas[0] @ network.weights[k + 1]))
        slopes.insert(0, denormalise(view.afters[k], behind[0][1], *after[k][1:]) * steep[k])
        deltas.insert(0, denormalise(view.norms[k], slopes[0], *before[k][1:]))
    outputs, normals = [p[0] for p in before], [p[1] for p in before]
    active = [x != 0 for x in steep]
    return Run(*(tuple(x) for x in (states, normals, outputs, slopes, deltas, active, behind)))


def stretched(view: NormalisedView, own: Run, kept: Kept) -> Iterator[Float[Tensor, "b _in"]]:
    """How the inputs of each layer behind the first move with the length of the network's inputs: with that of each
    sample's own, where no samples mix."""
    moved = own.inputs[0]
    for k, norm in enumerate(view.norms):
        y, mask = own.outputs[k], view.mask(k, kept[k])
        phi = view.network.activations[k]
        moved = _along(norm, view.network.apply(k, own.inputs[k]), moved @ view.network.weights[k].mT)
        moved = _along(view.afters[k], phi.value(y) * mask, moved * phi.slope(y) * mask)
        yield moved


def _along(norm: Norm | None, z: Float[Tensor, "b m"], moved: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """How `normalise` of z moves where z does: x̂ has a symmetric derivative."""
    if norm is None:
        return moved
    _, normal, deviation = normalise(norm, z)
    return norm.scale * denormalise(replace(norm, scale=torch.ones_like(norm.scale)), moved, normal, deviation)


def gradients(view: NormalisedView, own: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Every gradient of the update beside the batch's own: of the layers, then of each γ and η."""
    for k, delta in enumerate(own.deltas):
        yield view.network.augmented(k), delta.mT @ view.network.extend(k, own.inputs[k])
    pairs = [*zip(view.norms, zip(own.normals, own.slopes, strict=True), strict=True)]
    for norm, (normal, slope) in [*pairs, *zip(view.afters, own.behind, strict=True)]:
        if norm is not None and norm.scale_gradient is not None:
            yield norm.scale_gradient, (slope * normal).sum(0)
        if norm is not None and norm.shift_gradient is not None and bool(norm.shift_gradient.any()):
            yield norm.shift_gradient, slope.sum(0)


def misfit(view: NormalisedView, own: Run) -> float:
    """The largest relative distance of a gradient of the update from the batch's own."""
    apart = [float((seen - made).norm() / seen.norm().clamp_min(1e-300)) for seen, made in gradients(view, own)]
    return max(apart) if all(value == value for value in apart) else float("inf")


def solve_inputs(view: NormalisedView, k: int, deltas: Float[Tensor, "b m"]) -> Float[Tensor, "b n"]:
    """The inputs of layer k whose outer products with `deltas` sum to its gradient, by least squares.

    Behind BatchNorm the deltas sum to zero, and the inputs come less their mean.
    """
    total = view.network.augmented(k)
    norm = view.norms[k] if k < len(view.norms) else None
    centred = complement(deltas.new_ones(1, len(deltas))) if norm is not None and norm.mixes else None
    basis, triangle = torch.linalg.qr((deltas if centred is None else centred.mT @ deltas).mT)
    found = torch.linalg.solve_triangular(triangle, basis.mT @ total, upper=True)
    return (found if centred is None else centred @ found)[:, : view.network.weights[k].shape[1]]


def corrected(
    view: NormalisedView, inputs: Float[Tensor, "b n"], targets: Targets, kept: Kept
) -> tuple[Float[Tensor, "b n"], Run, float]:
    """The inputs after corrections by what is left of the first layer's gradient, as long as these help."""
    own = run(view, inputs, targets, kept)
    best = misfit(view, own)
    for _ in range(CORRECTIONS):
        if not best < float("inf") or best < view.network.accuracy.explained:
            break
        trial = solve_inputs(view, 0, own.deltas[0])
        if view.loses_mean:
            trial = trial + inputs.mean(0)
        following = run(view, trial, targets, kept)
        now = misfit(view, following)
        if not now < best:
            break
        slow = now > best / 2
        inputs, own, best = trial, following, now
        if slow:
            break
    return inputs, own, best
