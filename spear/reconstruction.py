"""What an attack on one layer ends with: the batch behind the columns of Q, and how sure the server can be of it."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.certificate import certify, certify_layer, recover_labels
from spear.filtering import disaggregate
from spear.lowrank import MIN_GAP
from spear.search import Found
from spear.streaming import weight_names
from spear.target import Target


@dataclass(frozen=True)
class Stats:
    """What an attack cost: `seconds`, `proposals` (kernel vectors tested) and `rounds` of sampling."""

    seconds: float
    proposals: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class Reconstruction:
    """What the server recovered: k samples, in no particular order.

    `inputs` (k, *input shape) and `labels` (k,) or None; `residuals` (k,) is, per sample, the relative distance between
    its own gradient as recovered and as recomputed from input and label (infinite without labels); `certified` (k,)
    tells which samples are beyond doubt, by every layer where the rest of the model is known, by one layer alone where
    it is not. `rank` is the batch size that the gradient shows, `complete` whether the whole batch, as far as the
    client disclosed its size, was recovered and certified, and `reason` why the attack stopped, in words. Under noise
    nothing is certified or complete; `expected_error` (k,) is then each input's expected relative error
    |guess - truth| / |truth|, from what the server knows alone. `weights` (k,) are the weights in the loss, where
    clipping, or an average over unequal clients, made them differ from sample to sample.
    """

    inputs: Float[Tensor, "k *input_shape"]
    labels: Int[Tensor, " k"] | None
    rank: int
    residuals: Float[Tensor, " k"]
    certified: Bool[Tensor, " k"]
    complete: bool
    reason: str
    stats: Stats
    expected_error: Float[Tensor, " k"] | None = None
    weights: Float[Tensor, " k"] | None = None


def reconstruct(target: Target, found: Found, stats: Stats) -> Reconstruction:
    """The batch behind a full set of directions, with what certifies it: everything that is known of the model."""
    q, name = found.q[found.basis], target.layer.name
    G, X = disaggregate(target.observed, q)
    if target.observed.d is None:
        why = f"{name} has no bias, so each input is known up to a positive factor only (here: unit length)"
        return _result(target, X.mT, f"recovered, but not certified: {why}", stats)
    unknown = _unknown_rest(target)
    if not unknown:
        whole = _with_labels(target, q, G, X, stats)
        if whole.certified.any() or _rest_is_sent(target):
            return whole
        unknown = f"the update holds nothing of what follows {name}, and the model's own rest does not fit it"
    return _by_one_layer(target, q, X, unknown, stats)


def _with_labels(
    target: Target, q: Float[Tensor, "b b"], G: Float[Tensor, "m b"], X: Float[Tensor, "n b"], stats: Stats
) -> Reconstruction:
    """The batch with its labels, certified by the layer and all that follows it."""
    with torch.no_grad():
        Z = target.layer.linear(X.mT)
    labels = recover_labels(target.layer, Z, G.mT, target.scale)
    certificate = certify(target, q, X.mT, labels)
    certain = certificate.holds and target.low.gap >= MIN_GAP
    if not certificate.holds:
        reason = f"recovered, but not certified: {certificate.why_not()}"
    elif not certain:
        reason = "recovered, but not certified: the gradient carries noise"
    elif len(labels) < target.count:
        reason = f"{len(labels)} of {target.count} samples: the others leave no trace above rounding"
    else:
        reason = f"the whole batch of {len(labels)}: every gradient reproduced to {certificate.gradients:.0e}"
    return _result(target, X.mT, reason, stats, labels=labels, residuals=certificate.samples, certain=certain)


def _by_one_layer(
    target: Target, q: Float[Tensor, "b b"], X: Float[Tensor, "n b"], unknown: str, stats: Stats
) -> Reconstruction:
    """The inputs without labels, certified by the layer alone."""
    certificate = certify_layer(target, q, X.mT)
    doubt = certificate.why_not() or ("" if target.low.gap >= MIN_GAP else "the gradient carries noise")
    if doubt:
        reason = f"recovered, but not certified: {doubt}; no labels: {unknown}"
    else:
        signs = f"{target.layer.name} alone, every sign of its pre-activations and every zero of its gradient"
        reason = f"the whole batch of {len(q)}, certified by {signs}; no labels: {unknown}"
    return _result(target, X.mT, reason, stats, certain=not doubt)


def _unknown_rest(target: Target) -> str:
    """Why the server cannot compute what follows the layer, in words; empty where it can."""
    if target.layer.tail is None:
        return f"the outputs depend on more than {target.layer.name}, by a branch around it"
    if target.loss != "cross_entropy":
        return f"one layer shows labels under cross-entropy alone; the client's loss is {target.loss}"
    return ""


def _rest_is_sent(target: Target) -> bool:
    """Whether the update has a gradient of anything that follows the layer."""
    return any(name in target.gradients for name in weight_names(target.layer.tail))


def _result(
    target: Target,
    X: Float[Tensor, "k n"],
    reason: str,
    stats: Stats,
    *,
    labels: Int[Tensor, " k"] | None = None,
    residuals: Float[Tensor, " k"] | None = None,
    certain: bool = False,
) -> Reconstruction:
    inputs = X.unflatten(1, target.input_shape).contiguous()
    residuals = X.new_full((len(X),), math.inf) if residuals is None else residuals
    certified = torch.full((len(X),), certain, device=X.device)
    complete = certain and len(X) >= target.count
    return Reconstruction(inputs, labels, target.low.rank, residuals, certified, complete, reason, stats)


def nothing(target: Target, reason: str, stats: Stats) -> Reconstruction:
    """No sample at all: an image that the zero pattern contradicts is never returned."""
    R = target.observed.R
    return _result(target, R.new_zeros(0, R.shape[1]), reason, stats)
