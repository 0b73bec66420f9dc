"""From all samples at the last hidden layer to inputs and labels: one least squares a layer."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.network.labels import decode
from spear.network.problem import Targets
from spear.normalisation.problem import Norm, NormalisedView, denormalise, normalise
from spear.normalisation.replay import solve_inputs
from spear.normalisation.statistics import Deviation

NOISE = 8  # times the usual scatter of zeros: what is above that is active
QUANTILE = 0.2  # of a unit's entries: among the zeros, for most units
WHOLE = 1e-4  # relative distance of a variance from γ² under which ReLU took nothing away
ROUNDING = 1e-14  # of the largest entry: no zero is known better


def descend(
    view: NormalisedView,
    inputs: Float[Tensor, "b n"],
    errors: Float[Tensor, "b outputs"],
    deviations: list[Deviation | None],
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
        deltas = _deltas(view, k, slopes, deviations[k])
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
    view: NormalisedView, k: int, slopes: Float[Tensor, "b m"], deviation: Deviation | None
) -> Float[Tensor, "b m"]:
    """∂L/∂z of hidden layer k from ∂L/∂y: x̂ too follows, as its part in ∂L/∂z is of another space than ∂L/∂z."""
    norm, network = view.norms[k], view.network
    if norm is None:
        return slopes
    low = network.factors(k, len(slopes) - 1 if norm.mixes else len(slopes))
    singular = low.R.norm(dim=1)
    lift = network.affine(k) @ (low.R / singular[:, None]).mT
    return _behind_batch(norm, slopes, low.L, lift, deviation) if norm.mixes else _behind_layer(norm, slopes, low.L, lift)


def _behind_batch(
    norm: Norm, slopes: Float[Tensor, "b m"], basis: Float[Tensor, "m r"], lift: Float[Tensor, "m r"], known: Deviation
) -> Float[Tensor, "b m"]:
    """γ/σ (dY - a) = U t + γ c / σ x̂ with x̂ = (W Rᵀ / σ) s, by least squares."""
    sigma, c = known.sigma, norm.scale_gradient / len(slopes)
    place, ratio = lift / sigma[:, None], norm.scale / sigma
    columns = torch.cat([basis, (ratio * c)[:, None] * place], 1)
    wanted = ratio * (slopes - slopes.mean(0))
    size = columns.norm(dim=0).clamp_min(1e-300)
    rows = known.known
    both = torch.linalg.lstsq((columns / size)[rows], wanted.mT[rows], driver="gels").solution.mT / size
    s = both[:, basis.shape[1] :]
    _, normal, deviation = normalise(norm, s @ lift.mT)
    return denormalise(norm, slopes, normal, deviation)
