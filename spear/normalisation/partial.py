"""Samples found while others are missing: each by itself from the last hidden layer down to its input, uncertified.

Behind BatchNorm a sample's (t, s) says all of it; behind LayerNorm or RMSNorm its gradient's part along A is a multiple
of s, whose last entry is known. Without a normalisation, and without the gradients of all samples, nothing tells s.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import least_squares, unit_rows
from spear.normalisation.descent import Known, inverse, is_centred, through_activation
from spear.normalisation.problem import Norm, NormalisedView, denormalise, normalise
from spear.normalisation.sample_search import columns
from spear.normalisation.statistics import Deviation

FITTING = 1e-6  # of a gradient: what a layer's space may leave of it


def inputs_alone(
    view: NormalisedView,
    inputs: Float[Tensor, "s n"],
    errors: Float[Tensor, "s outputs"],
    known: Sequence[Known],
    size: int,
) -> Float[Tensor, "s n0"]:
    """Inputs of some samples of a batch of `size`, from those of the last hidden layer and ∂L/∂logits; not finite where
    a layer does not bear them out. They come less their mean where BatchNorm follows the first layer.

    Of samples that do not mix, `errors` may have any length.
    """
    network, x, slopes = view.network, inputs, errors @ view.network.weights[-1]
    for k in range(network.last, -1, -1):
        one, after, activation = known[k], view.afters[k], network.activations[k]
        if k == network.last:
            y = _normalised(view.norms[k], network.apply(k, x), one.before)[0]
            a = activation.value(y)
            slopes = _before(
                after, slopes, *_normalised(after, a if after is None else a - after.mean, one.after), size
            )
            slopes = slopes * activation.slope(y)
        else:
            if after is not None:
                mixed = view.norms[k + 1] is not None and view.norms[k + 1].mixes
                normal = (x if mixed else x - after.shift) / after.scale
                x = after.mean + one.after.sigma * normal
                slopes = _before(after, slopes, None, normal, one.after.sigma[None], size)
            a, slopes = x, through_activation(view, k, x, slopes, one)[0]
            alone = view.norms[k] is None and not is_centred(view, k)
            x = _from_activations(view, k, a, one) if alone else from_gradient(view, k, slopes, one, size)
        if k:
            z = network.apply(k, x)
            slopes = _before(view.norms[k], slopes, *_normalised(view.norms[k], z, one.before), size)
            slopes = slopes @ network.weights[k]
    return x


def from_gradient(
    view: NormalisedView, k: int, slopes: Float[Tensor, "s m"], known: Known, size: int
) -> Float[Tensor, "s n"]:
    """The inputs of layer k of samples whose ∂L/∂y is known; not finite where nothing tells them."""
    norm, low, network = view.norms[k], known.low, view.network
    rows = unit_rows(low.R)
    if norm is None:
        return torch.full((len(slopes), network.weights[k].shape[1]), torch.nan).to(slopes)
    if not norm.mixes:
        span, wanted = columns(norm, low, network.affine(k)), (norm.scale * slopes).mT
        length = (network.affine(k) @ rows.mT).norm(dim=0)
        s = least_squares(span, wanted)
        extended = (s[-low.rank :] / length[:, None]).mT @ rows
        x = extended[:, :-1] / extended[:, -1:]
    else:
        ratio, lift = norm.scale / known.before.sigma, network.weights[k] @ rows.mT
        span = torch.cat([low.L, (ratio / known.before.sigma * norm.scale_gradient / size)[:, None] * lift], 1)
        span, wanted = span[known.before.known], (ratio * (slopes - norm.shift_gradient / size)).mT[known.before.known]
        length = span.norm(dim=0)
        s = least_squares(span / length, wanted)
        x = (s[low.rank :] / length[low.rank :, None]).mT @ rows
        span = span / length
    off = (span @ s - wanted).norm(dim=0) / wanted.norm(dim=0)
    return torch.where((off < FITTING)[:, None], x, torch.nan)


def _from_activations(view: NormalisedView, k: int, a: Float[Tensor, "s m"], known: Known) -> Float[Tensor, "s n"]:
    """The inputs of layer k from what its activation gives, where nothing is between."""
    rows = unit_rows(known.low.R)
    z = inverse(view, k, a * (1 - view.drops[k]), None, known)
    s = least_squares(view.network.affine(k) @ rows.mT, z.mT).mT @ rows
    return s[:, :-1] / s[:, -1:]


def _normalised(
    norm: Norm | None, z: Float[Tensor, "s m"], known: Deviation | None
) -> tuple[Float[Tensor, "s m"], Float[Tensor, "s m"], Float[Tensor, "#s #m"]]:
    """`normalise`; over the batch by the deviation that is told, of z less their mean."""
    if norm is None or not norm.mixes:
        return normalise(norm, z)
    normal = z / known.sigma
    return norm.scale * normal + norm.shift, normal, known.sigma[None]


def _before(
    norm: Norm | None,
    slopes: Float[Tensor, "s m"],
    output: Float[Tensor, "s m"] | None,
    normal: Float[Tensor, "s m"],
    deviation: Float[Tensor, "#s #m"],
    size: int,
) -> Float[Tensor, "s m"]:
    """`denormalise`, from what `_normalised` gives; over the batch by the means that the gradients of γ and η tell."""
    if norm is None or not norm.mixes:
        return denormalise(norm, slopes, normal, deviation)
    return norm.scale / deviation * (slopes - (norm.shift_gradient + norm.scale_gradient * normal) / size)
