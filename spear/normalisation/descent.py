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
from spear.normalisation.replay import Kept, solve_inputs
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
    mask: Bool[Tensor, "b m"] | None,
    lows: Sequence[LowRank],
    deviations: Sequence[Deviation | None],
) -> tuple[Float[Tensor, "b n0"], Targets, Kept]:
    """Inputs of the network, targets and what dropout kept, from the inputs of the last hidden layer and ∂L/∂logits.

    `inputs` are less their mean where BatchNorm follows; so are those that are returned. `mask` are the active units of
    the last hidden layer where dropout follows. Of a unit that is not positive it does not matter, and is taken to be
    kept.
    """
    network, top = view.network, view.network.last
    y, normal, deviation = normalise(view.norms[top], network.apply(top, inputs))
    on, share = y > 0, 1 - view.drops[top]
    kept: list[Tensor | None] = [None if mask is None else mask | ~on]
    on = on if mask is None else on & mask
    activated = network.activate(network.apply(top + 1, y * on / share))
    targets = replace(decode(network, errors, activated), measured=errors)
    slopes = (targets.errors(activated) @ network.weights[top + 1]) * on / share
    deltas = denormalise(view.norms[top], slopes, normal, deviation)
    x = solve_inputs(view, top, deltas)
    for k in range(top - 1, -1, -1):
        on = active(view, k, x)
        slopes = (deltas @ network.weights[k + 1]) * on / (1 - view.drops[k])
        deltas, y = _deltas(view, k, slopes, lows[k], deviations[k])
        kept.insert(0, on | (y <= 0) if view.drops[k] else None)
        x = solve_inputs(view, k, deltas)
    return x, targets, tuple(kept)


def active(view: NormalisedView, k: int, x: Float[Tensor, "b m"]) -> Bool[Tensor, "b m"]:
    """Which units of hidden layer k are active, from the activations x that it hands on, or these less their mean.

    A unit behind BatchNorm that is active in every sample keeps the variance γ²; any other is zero in some sample.
    """
    above, own = view.norms[k + 1] if k < view.network.last else None, view.norms[k]
    centred = above is not None and above.mixes
    height = x - x.amin(0) if centred else x
    noise = float(height.quantile(QUANTILE, dim=0).abs().median()) if centred else float(-x.amin().clamp_max(0))
    on = height > max(NOISE * noise, ROUNDING * float(height.abs().max()))
    if centred and own is not None and own.mixes and not view.drops[k]:
        on |= (x.square().mean(0) - own.scale.square()).abs() < WHOLE * own.scale.square()
    return on


def _deltas(
    view: NormalisedView, k: int, slopes: Float[Tensor, "b m"], low: LowRank, known: Deviation | None
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
    """∂L/∂z and y of hidden layer k from ∂L/∂y."""
    norm = view.norms[k]
    if norm is not None and norm.mixes:
        z = _behind_batch(view, k, slopes, low, known)
    else:
        z = view.network.apply(k, inputs_behind(view, k, low, view.scale(k) * slopes)[0])
    y, normal, deviation = normalise(norm, z)
    return denormalise(norm, slopes, normal, deviation), y


def _behind_batch(
    view: NormalisedView, k: int, slopes: Float[Tensor, "b m"], low: LowRank, known: Deviation
) -> Float[Tensor, "b m"]:
    """z less its mean behind BatchNorm: γ/σ (dY - a) = U t + γ c / σ x̂ with x̂ = (W Rᵀ / σ) s, by least squares.

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
        z = both[:, low.L.shape[1] :] @ lift.mT
        if known.usual < FINE:
            break
        sigma, rows = normalise(norm, z)[2][0], torch.ones_like(rows)
    return z
