"""From all samples at the last hidden layer to inputs and labels: one least squares a layer."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.directions import unit_rows
from spear.network.labels import decode
from spear.network.problem import Targets
from spear.normalisation.problem import NormalisedView, denormalise, normalise
from spear.normalisation.replay import solve_inputs
from spear.normalisation.sample_descent import inputs_behind
from spear.normalisation.statistics import Deviation
from spear.published.lowrank import LowRank

NOISE = 8  # times the usual scatter of zeros: what is above that is active
QUANTILE = 0.2  # of a unit's entries: among the zeros, for most units
WHOLE = 1e-4  # relative distance of a variance from γ² under which ReLU took nothing away
ROUNDING = 1e-14  # of the largest entry: no zero is known better
ROUNDS, FINE = 6, 1e-13  # of σ by the samples, each of which halves its error; the error under which there is no need


def descend(
    view: NormalisedView,
    inputs: Float[Tensor, "b n"],
    errors: Float[Tensor, "b outputs"],
    lows: Sequence[LowRank],
    deviations: Sequence[Deviation | None],
) -> tuple[Float[Tensor, "b n0"], Targets]:
    """Inputs of the network and targets, from the inputs of the last hidden layer and ∂L/∂logits.

    `inputs` are less their mean where BatchNorm follows; so are those that are returned.
    """
    network, top = view.network, view.network.last
    y, normal, deviation = normalise(view.norms[top], network.apply(top, inputs))
    activated = network.activate(network.apply(top + 1, y.relu()))
    targets = replace(decode(network, errors, activated), measured=errors)
    slopes = (targets.errors(activated) @ network.weights[top + 1]) * (y > 0)
    deltas = denormalise(view.norms[top], slopes, normal, deviation)
    x = solve_inputs(view, top, deltas)
    for k in range(top - 1, -1, -1):
        slopes = (deltas @ network.weights[k + 1]) * active(view, k, x)
        deltas = _deltas(view, k, slopes, lows[k], deviations[k])
        x = solve_inputs(view, k, deltas)
    return x, targets


def active(view: NormalisedView, k: int, x: Float[Tensor, "b m"]) -> Bool[Tensor, "b m"]:
    """Which units of hidden layer k are active, from the activations x that it hands on, or these less their mean.

    A unit behind BatchNorm that is active in every sample keeps the variance γ²; any other is zero in some sample.
    """
    above, own = view.norms[k + 1] if k < view.network.last else None, view.norms[k]
    centred = above is not None and above.mixes
    height = x - x.amin(0) if centred else x
    noise = float(height.quantile(QUANTILE, dim=0).abs().median()) if centred else float(-x.amin().clamp_max(0))
    on = height > max(NOISE * noise, ROUNDING * float(height.abs().max()))
    if centred and own is not None and own.mixes:
        on |= (x.square().mean(0) - own.scale.square()).abs() < WHOLE * own.scale.square()
    return on


def _deltas(
    view: NormalisedView, k: int, slopes: Float[Tensor, "b m"], low: LowRank, known: Deviation | None
) -> Float[Tensor, "b m"]:
    """∂L/∂z of hidden layer k from ∂L/∂y."""
    norm = view.norms[k]
    if norm is None:
        return slopes
    if norm.mixes:
        return _behind_batch(view, k, slopes, low, known)
    x = inputs_behind(view.network, norm, k, low, norm.scale * slopes)[0]
    _, normal, deviation = normalise(norm, view.network.apply(k, x))
    return denormalise(norm, slopes, normal, deviation)


def _behind_batch(
    view: NormalisedView, k: int, slopes: Float[Tensor, "b m"], low: LowRank, known: Deviation
) -> Float[Tensor, "b m"]:
    """∂L/∂z behind BatchNorm from ∂L/∂y: γ/σ (dY - a) = U t + γ c / σ x̂ with x̂ = (W Rᵀ / σ) s, by least squares.

    Where σ is known roughly, that of the samples themselves is nearer, and so on.
    """
    norm, c = view.norms[k], view.norms[k].scale_gradient / len(slopes)
    lift = view.network.weights[k] @ unit_rows(low.R).mT
    sigma, rows = known.sigma, known.known
    for _ in range(ROUNDS):
        ratio = norm.scale / sigma
        columns = torch.cat([low.L, (ratio * c / sigma)[:, None] * lift], 1)[rows]
        wanted = (ratio * (slopes - slopes.mean(0))).mT[rows]
        size = columns.norm(dim=0).clamp_min(1e-300)
        both = torch.linalg.lstsq(columns / size, wanted, driver="gels").solution.mT / size
        _, normal, deviation = normalise(norm, both[:, low.L.shape[1] :] @ lift.mT)
        if known.usual < FINE:
            break
        sigma, rows = deviation[0], torch.ones_like(rows)
    return denormalise(norm, slopes, normal, deviation)
