"""The batch held against the update: what is certain, the inputs themselves or only their differences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from spear.certificate import BY_BIASES, SAFETY, Certificate, length_by_labels, length_by_reader, norms, rms
from spear.federated.losses import activate_along
from spear.models.streaming import Blocks
from spear.network.labels import WHOLE_NUMBERS
from spear.network.problem import Targets
from spear.network.recovery import Judged, Reached
from spear.normalisation.batch_bounds import difference_bounds
from spear.normalisation.descent import Known
from spear.normalisation.problem import NormalisedView
from spear.normalisation.replay import Kept, Run, corrected, stretched
from spear.normalisation.sample_bounds import sample_bounds
from spear.normalisation.sensitivity import measured_bounds
from spear.normalisation.statistics import EITHER, Deviation
from spear.reconstruction import Budget, Reconstruction

WHOLE = "every gradient is that of the recovered batch"
CONFUSED = 1e-8  # singular value of W, of the largest, under which its rows do not tell the mean input
UNLIKELY = 8  # standard deviations of what dropout takes
AGREE = 100  # errors by which the batch's own deviation may differ from that which the update tells


@dataclass(frozen=True)
class Mean:
    """The mean input (n,) as far as the running mean tells it, the `error` of its norm (infinite where a part of it is
    not told), and that in words."""

    image: Float[Tensor, " n"]
    error: float
    words: str


def common_mean(view: NormalisedView, deviations: Sequence[Deviation | None]) -> Mean:
    """W mean + β is the batch's mean pre-activation, which the buffers tell: mean by least squares, of least norm."""
    norm, W = view.norms[0], view.network.weights[0]
    lost = "no gradient depends on the mean of the batch"
    if norm.mean is None or not all(known is None or known.told for known in deviations):
        sent = "no running mean was sent" if norm.mean is None else "the buffers are not those of this batch"
        return Mean(W.new_zeros(W.shape[1]), math.inf, f"{lost}, and {sent}: it is set to zero")
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    told = int((CONFUSED * S[0] < S).sum())
    seen = (norm.mean - norm.offset) @ U[:, :told]
    image, beside = (seen / S[:told]) @ V[:told], norm.mean - norm.offset - seen @ U[:, :told].mT
    if rms(beside) > AGREE * rms(norm.mean_error):
        return Mean(torch.zeros_like(image), math.inf, f"{lost}, and the running mean is no batch's: it is set to zero")
    if told < W.shape[1]:
        free = f"{W.shape[1] - told} of its {W.shape[1]} dimensions are free"
        return Mean(image, math.inf, f"{lost}; the running mean tells it by {told} equations: {free}")
    error = SAFETY * rms(norm.mean_error) * float((1 / S).norm())
    return Mean(image, error, "their mean is that which the running mean tells")


def judge(
    view: NormalisedView,
    inputs: Float[Tensor, "b n"],
    targets: Targets,
    kept: Kept,
    known: Sequence[Known],
    reached: Reached,
    budget: Budget,
    *,
    again: Callable[[NormalisedView, Run], Tensor | None],
    doubt: str = "",
    reserve: str = "",
) -> Reconstruction:
    """Inputs, less their mean where BatchNorm follows the first layer, targets and what dropout kept as a result.

    `again` gives the inputs to which another update of this batch leads; `doubt` is what the search has against it,
    `reserve` what leaves it explained, but not certain.
    """
    network, lows, deviations = view.network, [one.low for one in known], [one.before for one in known]
    inputs, own, residual = corrected(view, inputs, targets, kept)
    mixing = [one for one in deviations if one is not None]
    common = SAFETY * max((one.common for one in mixing if not one.told), default=0.0)
    either = max((one.common for one in mixing if one.told), default=0.0)
    if either:
        reserve = f"{EITHER}: {either:.0e} apart"
    if not view.is_uniform:
        bound = measured_bounds(view, inputs, lambda other: again(other, own), residual) + common
    elif view.mixes:
        seen = [  # no better than they agree with the batch's own
            replace(known, error=known.error.maximum(_apart(view, own, k, known))) for k, known in enumerate(deviations)
        ]
        bound = difference_bounds(view, own, lows, seen, residual) + common
    else:
        bound = sample_bounds(view, own, lows, residual)
    evidence = Certificate(
        copies=targets.copies.round().long(),
        disclosed=network.batch_size,
        residual=residual,
        limit=network.accuracy.layer,
        error_bound=torch.where(targets.agree(network.activate(_logits(view, own))), bound, torch.inf),
        allowed=network.accuracy.recovered,
        doubt=doubt or _doubt(view, own, targets, known),
        reserve=reserve or ("" if _tells_lengths(view, own, targets, kept, residual) else BY_BIASES),
    )
    error, reason = evidence.error_bound + either, (evidence.why_not() or WHOLE) + _dropped(view, own)
    if view.loses_mean:
        mean = common_mean(view, deviations)
        inputs = inputs - inputs.mean(0)
        size, inputs = norms(inputs), inputs + mean.image
        error = (error * size + mean.error) / norms(inputs)
        vouched = " the differences of the inputs are certain, one image common to all is not:"
        reason += ";" + (vouched if evidence.holds and not mean.error < math.inf else "") + f" {mean.words}"
    certified = evidence.certified & (error <= evidence.allowed)
    complete = evidence.holds and bool(certified.all())
    sound = evidence.supported.nonzero()[:, 0]  # an image that the update does not support is never returned
    held = torch.full_like(error, residual)[sound], certified[sound], complete, reason, reached
    told = {"error_bound": error[sound], "labelled": not targets.free}
    judged = Judged(inputs[sound], targets.counts[sound], *held, **told)
    made = judged.entries(network, budget.elapsed, "network")
    if not (view.loses_mean and evidence.holds):
        return made
    return replace(made, difference_bound=evidence.error_bound)


def _tells_lengths(view: NormalisedView, own: Run, targets: Targets, kept: Kept, residual: float) -> bool:
    """Whether more than the biases' gradients tells how long inputs are: a normalisation takes a factor of all that
    enters it away, so that behind biases that are zero x / 2 leaves the same in every weight's gradient. Of what the
    labels say, that which a scale of the loss would not."""
    network = view.network
    if view.loses_mean:
        return True
    every = list(stretched(view, own, kept))
    if not targets.free:
        logits = _logits(view, own)
        along = activate_along(network.loss, logits, every[-1] @ network.weights[-1].mT)
        error = torch.full_like(along[:, 0], max(residual, 2 * network.precision))
        if length_by_labels(own.deltas[-1] / targets.unit, along, error, whole=False) <= network.accuracy.recovered:
            return True
    least = torch.full_like(own.inputs[0][:, 0], math.inf)
    for k, moved in enumerate(every):
        J = Blocks(network.weight_gradients[k + 1], None, network.weights[-1])
        sums_to_zero = view.afters[k] is not None and view.afters[k].mixes
        shares, _ = length_by_reader(own.inputs[k + 1], moved, J, 2 * network.precision, int(sums_to_zero))
        least = torch.minimum(least, shares)
    return bool((least <= network.accuracy.recovered).all())


def _dropped(view: NormalisedView, own: Run) -> str:
    """What dropout took, as far as that can be told; in words."""
    said = []
    for k, share in enumerate(view.drops):
        if share:
            positive = _positive(view, own, k)
            took = positive - int(own.active[k].sum())
            those = "positive units" if view.network.activations[k].is_relu else "units"
            said.append(f"{took / max(positive, 1):.1%} of the {those} of layer {k + 1} (p = {share:g})")
    unknown = "where an activation is zero in any case it cannot be told, and does not matter"
    return f"; dropout took {', '.join(said)}; {unknown}" if said else ""


def _positive(view: NormalisedView, own: Run, k: int) -> int:
    """How many units of hidden layer k would be active without dropout."""
    return int((view.network.activations[k].slope(own.outputs[k]) != 0).sum())


def _logits(view: NormalisedView, own: Run) -> Float[Tensor, "b outputs"]:
    return view.network.apply(view.network.last + 1, own.inputs[-1])


def _apart(view: NormalisedView, own: Run, k: int, known: Deviation) -> Float[Tensor, " m"]:
    """The relative distance of the batch's own deviations behind layer k from those that the update tells."""
    centred = own.inputs[k] - own.inputs[k].mean(0)
    sigma = ((centred @ view.network.weights[k].mT).square().mean(0) + view.norms[k].eps).sqrt()
    return (sigma / known.sigma - 1).abs()


def _doubt(view: NormalisedView, own: Run, targets: Targets, known: Sequence[Known]) -> str:
    """What speaks against the batch whatever its residual, in words."""
    if targets.error >= WHOLE_NUMBERS:
        return f"labels do not come out as whole numbers (off by {targets.error:.1e})"
    if not targets.whole:
        return "the samples' weights in the loss differ"
    for k, share in enumerate(view.drops):
        positive = max(_positive(view, own, k), 1)
        took = 1 - int(own.active[k].sum()) / positive
        if abs(took - share) > UNLIKELY * (share * (1 - share) / positive) ** 0.5 and share:
            return f"dropout would have taken {took:.1%} of the positive units of layer {k + 1}, with p = {share:g}"
    for k, one in enumerate(known):
        if one.before is None:
            continue
        limit = (AGREE * one.before.error).clamp_min(view.network.accuracy.layer)
        if bool(((_apart(view, own, k, one.before) > limit) & one.before.known).any()):
            source = "its buffers" if one.before.told else "epsilon"
            return f"the deviations behind layer {k + 1} are not those that the update tells by {source}"
    return ""
