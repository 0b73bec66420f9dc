"""From all samples at the last hidden layer to inputs and labels: one least squares a layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.directions import least_squares, unit_rows
from spear.network.labels import decode, weights_of_labels
from spear.network.problem import NetworkView, Targets
from spear.normalisation.centred import pre_activations
from spear.normalisation.problem import NormalisedView, denormalise, normalise
from spear.normalisation.replay import Kept, solve_inputs
from spear.normalisation.sample_descent import inputs_behind
from spear.normalisation.sample_search import columns
from spear.normalisation.spaces import open_spaces
from spear.normalisation.statistics import Deviation
from spear.published.lowrank import LowRank
from spear.reconstruction import Refusal

NOISE = 8  # times the usual scatter of zeros: what is above that is active
QUANTILE = 0.2  # of a unit's entries: among the zeros, for most units
FEW, GAP = 1e-2, 30.0  # of the largest activation: few are less; ratio of neighbours that is a gap
WHOLE = 1e-4  # relative distance of a variance from γ² under which ReLU took nothing away
ROUNDING = 1e-14  # of the largest entry: no zero is known better
ROUNDS, FINE = 6, 1e-13  # of σ by the samples, each of which halves its error; the error under which there is no need
SPARE = 8  # equations beyond the unknowns of a sample
MOST_OPEN = 16  # saturated activations of a unit that are tried in all ways
OUTLIERS = 10  # times the median residual: units of which a sample is taken for active, or not, wrongly
EVEN = 1e-4  # relative difference of weights that are one
INEXACT = 1e-9  # of the largest activation: how near to another branch an inverse is not trusted


class Multiple(Exception):
    """The update is a `factor` times the gradient of the samples found: another view of it leads to them."""

    def __init__(self, factor: float) -> None:
        super().__init__(f"the update is {factor:.6g} times their mean")
        self.factor = factor


def check_multiple(view: NormalisedView, weights: Float[Tensor, " b"]) -> None:
    """Raises `Multiple` where all samples have one weight in the loss, and another than that of one of as many."""
    mean = float(weights.mean())
    even = view.network.batch_size == len(weights) and bool(((weights - mean).abs() < EVEN * abs(mean)).all())
    if even and abs(mean - 1) > EVEN:
        raise Multiple(mean)


def _weights(
    network: NetworkView, errors: Float[Tensor, "b outputs"], activated: Float[Tensor, "b outputs"]
) -> Float[Tensor, " b"]:
    """By how much each ∂L/∂logits is more than that of one sample of one label, whichever fits; NaN where none does."""
    weight, off = weights_of_labels(network, errors, activated)
    off, label = off.min(1)
    own = weight.gather(1, label[:, None])[:, 0] / network.unit(len(errors))
    return torch.where(off < EVEN, own, torch.nan)


@dataclass(frozen=True)
class Known:
    """What is known of each layer before the descent: its factorised gradient, and the deviations of BatchNorm before
    and behind the activation."""

    low: LowRank
    before: Deviation | None
    after: Deviation | None


def descend(
    view: NormalisedView,
    inputs: Float[Tensor, "b n"],
    errors: Float[Tensor, "b outputs"],
    mask: Bool[Tensor, "b m"] | None,
    known: Sequence[Known],
) -> tuple[Float[Tensor, "b n0"], Targets, Kept]:
    """Inputs of the network, targets and what dropout kept, from the inputs of the last hidden layer and ∂L/∂logits.

    `inputs` are less their mean where BatchNorm follows; so are those that are returned. `mask` are the units of the
    last hidden layer that have a gradient, where dropout follows.

    Raises `Refusal` where activations do not tell their pre-activations, and `Multiple` for an update that is not the
    mean of the samples.
    """
    network, top = view.network, view.network.last
    y, normal, deviation = normalise(view.norms[top], network.apply(top, inputs))
    kept: list[Tensor | None] = [None if mask is None else _kept(view, mask, y, errors)]
    on = 1 if mask is None else kept[0].to(y) / (1 - view.drops[top])
    v, *behind = normalise(view.afters[top], network.activations[top].value(y) * on)
    activated = network.activate(network.apply(top + 1, v))
    check_multiple(view, _weights(network, errors, activated))
    targets = replace(decode(network, errors, activated), measured=errors)
    slopes = denormalise(view.afters[top], targets.errors(activated) @ network.weights[top + 1], *behind)
    deltas = denormalise(view.norms[top], slopes * network.activations[top].slope(y) * on, normal, deviation)
    x = solve_inputs(view, top, deltas)
    for k in range(top - 1, -1, -1):
        if view.lacks_mean(k):
            deltas = _deltas_by_bias(view, k, x, deltas @ network.weights[k + 1])
            kept.insert(0, None)
            x = solve_inputs(view, k, deltas)
            continue
        a, slopes = _through_after(view, k, x, deltas @ network.weights[k + 1], known[k].after)
        slopes, one = through_activation(view, k, a, slopes, known[k])
        deltas, y = _deltas(view, k, slopes, known[k])
        kept.insert(0, one | (y <= 0) if view.drops[k] and network.activations[k].is_relu else one)
        x = solve_inputs(view, k, deltas)
    return x, targets, tuple(kept)


def _kept(
    view: NormalisedView, mask: Bool[Tensor, "b m"], y: Float[Tensor, "b m"], errors: Float[Tensor, "b outputs"]
) -> Bool[Tensor, "b m"]:
    """What dropout kept at the last hidden layer, from the units that have a gradient.

    Where phi is flat they have none in any case. Where it is 0, it does not matter, and the unit is taken to be kept;
    elsewhere the output layer's gradient tells, ∂L/∂logitsᵀ A.
    """
    network, k = view.network, view.network.last
    flat, a = network.activations[k].slope(y) == 0, network.activations[k].value(y) / (1 - view.drops[k])
    kept = mask | (flat & (a == 0))
    rest, doubtful = network.weight_gradients[k + 1] - errors.mT @ (a * kept), flat & ~kept
    for unit in doubtful.any(0).nonzero()[:, 0].tolist():
        who = doubtful[:, unit].nonzero()[:, 0]
        kept[who, unit] = summed(a[who, unit] * errors[who].mT, rest[:, unit])
    return kept


def summed(columns: Float[Tensor, "outputs k"], total: Float[Tensor, " outputs"]) -> Bool[Tensor, " k"]:
    """Which of the columns sum to the total: those beyond their rank are tried in all ways, least squares tells the
    others."""
    more = columns.shape[1] - int(torch.linalg.matrix_rank(columns))
    if more > MOST_OPEN:
        raise Refusal(f"which of {columns.shape[1]} saturated activations of a unit dropout kept is not searched")
    bits = torch.arange(more, device=columns.device)
    ways = (torch.arange(2**more, device=columns.device)[:, None] >> bits & 1).to(columns)
    first = torch.linalg.lstsq(columns[:, more:], (total - ways @ columns[:, :more].mT).mT, driver="gelsd").solution.mT
    best = (first - (first > 0.5).to(first)).abs().amax(1).argmin()
    return torch.cat([ways, first], 1)[best] > 0.5


def _through_after(
    view: NormalisedView, k: int, v: Float[Tensor, "b m"], slopes: Float[Tensor, "b m"], known: Deviation | None
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
    """What layer k's activation gives, and the gradient by it, from those of the BatchNorm behind it, if there is one.

    What BatchNorm gives has the mean η: v may be known less its mean.
    """
    norm = view.afters[k]
    if norm is None:
        return v, slopes
    normal = (v - v.mean(0)) / norm.scale
    return norm.mean + known.sigma * normal, denormalise(norm, slopes, normal, known.sigma[None])


def _deltas_by_bias(
    view: NormalisedView, k: int, v: Float[Tensor, "b m"], slopes: Float[Tensor, "b m"]
) -> Float[Tensor, "b m"]:
    """∂L/∂z of hidden layer k from what the BatchNorm behind its ReLU gives, and the gradient by that, σ unknown.

    x̂ tells which units are active, where two samples at least are not, and so g_j = σ_j ∂L/∂z_j of these. As
    g_jᵀ [X | 1] = σ_j [∂L/∂W_j | ∂L/∂β_j], they tell the inputs by g_jᵀ X ∂L/∂β_j = g_jᵀ 1 ∂L/∂W_j, and these the rest.
    """
    network, norm = view.network, view.afters[k]
    normal = ((v - v.mean(0)) / norm.scale).nan_to_num(0, 0, 0)
    on = active(view, k, normal)
    sure = on.any(0) & ((~on).sum(0) > 1)
    size = (norm.scale * slopes).norm(dim=0).clamp_min(1e-300)  # as rounding goes
    g = (denormalise(norm, slopes, normal, size[None]) * on).mT[sure]
    if len(g) < len(v) + SPARE:
        raise Refusal(f"too few units of layer {k + 1} are not active in two samples")
    told = unit_rows(network.augmented(k)[sure])
    rows, wanted = told[:, -1:] * g, g.sum(1, keepdim=True) * told[:, :-1]
    x = torch.linalg.pinv(rows) @ wanted
    off = (rows @ x - wanted).norm(dim=1)
    right = off <= torch.maximum(OUTLIERS * off.median(), off.kthvalue(len(v) + SPARE).values)
    x = torch.linalg.pinv(rows[right]) @ wanted[right]
    z = network.apply(k, x)
    behind = normalise(norm, z.clamp_min(0))[1:]
    return denormalise(norm, slopes, *behind) * (z > 0)


def through_activation(
    view: NormalisedView, k: int, a: Float[Tensor, "b m"], behind: Float[Tensor, "b m"], known: Known
) -> tuple[Float[Tensor, "b m"], Bool[Tensor, "b m"] | None]:
    """The gradient by what enters layer k's activation, and what dropout kept, from what it gives, and its gradient."""
    activation, share, centred = view.network.activations[k], 1 - view.drops[k], is_centred(view, k)
    if activation.is_relu:
        on = active(view, k, a)
        if centred and not view.drops[k] and not (view.norms[k] is not None and view.norms[k].mixes):
            on = _by_gradient(view, k, on, view.scale(k) * behind, known.low)
        return behind * on / share, on if view.drops[k] else None
    if centred:
        return behind * activation.slope(_between(view, k, a, behind, known)), None
    kept = a.abs() > _least(a.abs(), ROUNDING * float(a.abs().max())) if view.drops[k] else None
    y = inverse(view, k, a * share, kept, known)
    slopes = behind * activation.slope(y) / share
    return slopes if kept is None else slopes * kept, kept


def _between(
    view: NormalisedView, k: int, a: Float[Tensor, "b m"], behind: Float[Tensor, "b m"], known: Known
) -> Float[Tensor, "b m"]:
    """What enters an activation that is not ReLU, between two BatchNorms."""
    norm, lost = view.norms[k], f"layer {k + 1}'s activations come less their mean, as batch normalisation follows next"
    if norm is None or not norm.mixes or view.drops[k]:
        raise Refusal(f"{lost}: with an activation other than ReLU, and none in front of it, that is not searched")
    spaces = open_spaces(view.network, norm, k, known.low, known.before.of_all())
    if not bool(spaces.live.all()):
        raise Refusal(f"{lost}, and the deviation of {int((~spaces.live).sum())} units in front of it is not told")
    return pre_activations(view.network.activations[k], spaces, a, behind / view.network.unit(len(a)))


def is_centred(view: NormalisedView, k: int) -> bool:
    """Whether the activations of layer k are known less their mean only."""
    above = view.norms[k + 1] if k < view.network.last else None
    return view.lacks_mean(k) or (above is not None and above.mixes and view.afters[k] is None)


def active(view: NormalisedView, k: int, x: Float[Tensor, "b m"]) -> Bool[Tensor, "b m"]:
    """Which units of hidden layer k are active, from the activations x that it hands on, or these less their mean.

    A unit behind BatchNorm that is active in every sample keeps the variance γ²; any other is zero in some sample.
    """
    own, centred = view.norms[k], is_centred(view, k)
    height = x - x.amin(0) if centred else x
    among = height.quantile(QUANTILE, dim=0, interpolation="lower")
    noise = float(among.abs().median()) if centred else float(-x.amin().clamp_max(0))
    on = height > _least(height, max(NOISE * noise, ROUNDING * float(height.abs().max())))
    if centred and own is not None and own.mixes and not view.drops[k]:
        on |= (x.square().mean(0) - own.scale.square()).abs() < WHOLE * own.scale.square()
    return on


def _least(height: Float[Tensor, "b m"], noise: float) -> float:
    """What parts zeros from the rest: the widest gap above the noise, if it is one, between zeros of more noise and
    activations; else the noise."""
    largest = float(height.max())
    above = height[(height > noise) & (height < FEW * largest)].sort().values
    above = torch.cat([above.new_tensor([noise]), above, above.new_tensor([FEW * largest])])
    ratio = above[1:] / above[:-1]
    k = int(ratio.argmax())
    return float((above[k] * above[k + 1]).sqrt()) if float(ratio[k]) > GAP else noise


def _by_gradient(
    view: NormalisedView, k: int, on: Bool[Tensor, "b m"], behind: Float[Tensor, "b m"], low: LowRank
) -> Bool[Tensor, "b m"]:
    """Active units where a mean is lost: those that are zero in two samples at least are sure, and tell the others by
    the space in which the gradients lie."""
    sure = (~on).sum(0) > 1
    span = columns(view.norms[k], low, view.network.affine(k))
    if int(sure.sum()) < span.shape[1] + SPARE:
        return on
    g = (span @ least_squares(span[sure], (behind * on)[:, sure].mT)).mT
    return torch.where(sure | ~g.isfinite(), on, (2 * g - behind) * behind > 0)


def inverse(
    view: NormalisedView, k: int, a: Float[Tensor, "b m"], kept: Bool[Tensor, "b m"] | None, known: Known
) -> Float[Tensor, "b m"]:
    """What enters layer k's activation: where the activation tells it, by itself; so each sample's place is told, and
    the rest."""
    network, norm = view.network, view.norms[k]
    y, sure = network.activations[k].inverse(a, INEXACT * float(a.abs().max()))
    sure = sure if kept is None else sure & kept
    lift = network.affine(k) @ unit_rows(known.low.R).mT
    if norm is not None:
        y = torch.where(sure, (y - norm.shift) / norm.scale, 0)
        lift = lift / known.before.sigma[:, None] if norm.mixes else lift
        lift = torch.cat([lift, torch.ones_like(lift[:, :1])], 1) if norm.kind == "layer" else lift
    if int(sure.sum(1).min()) < lift.shape[1] + SPARE:
        raise Refusal(f"too few activations of layer {k + 1} tell their pre-activations")
    pairs = zip(sure.to(y), y, strict=True)
    parts = [torch.linalg.lstsq(w[:, None] * lift, (w * one)[:, None]).solution for w, one in pairs]
    y = torch.cat(parts, 1).mT @ lift.mT
    return y if norm is None else norm.shift + norm.scale * y


def _deltas(
    view: NormalisedView, k: int, slopes: Float[Tensor, "b m"], known: Known
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
    """∂L/∂z and y of hidden layer k from ∂L/∂y."""
    norm = view.norms[k]
    if norm is not None and norm.mixes:
        z = _behind_batch(view, k, slopes, known.low, known.before)
    else:
        z = view.network.apply(k, inputs_behind(view, k, known.low, view.scale(k) * slopes)[0])
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
        both = least_squares(columns / size, wanted).mT / size
        z = both[:, low.L.shape[1] :] @ lift.mT
        if known.usual < FINE:
            break
        sigma, rows = normalise(norm, z)[2][0], torch.ones_like(rows)
    return z
