"""The attack on one layer, whatever finds the columns of its Q: from the server's view to a batch with its evidence."""

import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.certificate import Certificate
from spear.models.streaming import weight_names
from spear.published import theory
from spear.published.certificate import certify, certify_layer, recover_labels
from spear.published.greedy import Candidates, disaggregate
from spear.published.lowrank import MIN_GAP
from spear.published.view import LayerView, under_noise
from spear.reconstruction import Budget, Progress, Reconstruction, Stats

DESCENTS = ("dictionary", "layer")
EXACT_GAP = 1e6  # between the batch's singular values and the noise's, under which single zeros are mistaken
PLAUSIBLE = 0.75  # matching coefficient from which a reconstruction under noise is returned, uncertified
HOPELESS = 1e14  # proposals that no budget pays for: years of sampling
AFFORDABLE = 1e9  # proposals that "auto" goes on with where the network method ended without the whole batch


def attack_layer(
    target: LayerView,
    search: Callable[..., Candidates],
    method: str,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """The attack on one layer, by any search for the columns of its Q."""
    seen = under_noise(target) if method in DESCENTS and _shows_noise(target) else None
    obstacle = "" if seen else _obstacle(target, method, budget)
    if obstacle:
        return nothing(target, obstacle, Stats(0.0))
    target, goal = (seen, {"goal": PLAUSIBLE}) if seen else (target, {})
    found = search(target.observed, budget=budget, seed=seed, progress=progress, **goal)
    stats = Stats(time.monotonic() - budget.started, found.proposals, found.rounds)
    if found.matching < goal.get("goal", 1):
        live, m = len(target.observed.alive().L), len(target.observed.L)
        reached = f"{len(found.basis)} of {target.low.rank} directions, matching coefficient {found.matching:.6f}"
        reached += f"; of {m} neurons {live} tell anything, the others see no sample" if live < m else ""
        return nothing(target, f"{method}: {found.spent}: {reached}", stats)
    return reconstruct(target, found, stats)


def _shows_noise(target: LayerView) -> bool:
    """Whether what lies beyond the rank is more than rounding, and too much for an exact zero pattern."""
    low = target.low
    return low.gap < MIN_GAP or (low.gap < EXACT_GAP and low.noise > 100 * target.eps * low.largest)


def _obstacle(target: LayerView, method: str, budget: Budget) -> str:
    """Why a search would be pointless, in words; empty where it may succeed."""
    low, (m, b), name = target.low, target.observed.L.shape, target.layer.name
    if low.gap < MIN_GAP:
        return f"the gradient of {name} shows no rank: no gap among its {low.rank} singular values"
    if b >= m or b > target.observed.R.shape[1]:
        return f"a batch of rank {b} needs a layer wider than {b} with as many inputs; {name} is {m} wide"
    if method == "sampling" and hopeless(target, budget, HOPELESS):
        expected = theory.expected_proposals(theory.half_rates(m, b))
        return f"a batch of {b} needs about {expected:.0e} proposals at width {m}: set a budget to try all the same"
    return ""


def hopeless(target: LayerView, budget: Budget, most: float) -> bool:
    """Whether sampling without a budget is expected to take more than `most` proposals."""
    if budget.seconds is not None or budget.proposals is not None:
        return False
    m, b = target.observed.L.shape
    return theory.expected_proposals(theory.half_rates(m, b)) > most


def reconstruct(target: LayerView, found: Candidates, stats: Stats) -> Reconstruction:
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
    target: LayerView, q: Float[Tensor, "b b"], G: Float[Tensor, "m b"], X: Float[Tensor, "n b"], stats: Stats
) -> Reconstruction:
    """The batch with its labels, certified by the layer and all that follows it."""
    with torch.no_grad():
        Z = target.layer.linear(X.mT)
        outputs = target.layer.tail(Z).shape[1]
    labels = recover_labels(target.layer, Z, G.mT, target.unit(outputs), target.loss)
    certificate, residuals = certify(target, q, X.mT, labels)
    reason = f"the whole batch of {len(labels)}: every gradient reproduced to {certificate.residual:.0e}"
    if not certificate.holds:
        reason = f"recovered, but not certified: {certificate.why_not()}"
    return _result(target, X.mT, reason, stats, certificate, labels=labels, residuals=residuals)


def _by_one_layer(
    target: LayerView, q: Float[Tensor, "b b"], X: Float[Tensor, "n b"], unknown: str, stats: Stats
) -> Reconstruction:
    """The inputs without labels, certified by the layer alone."""
    certificate = certify_layer(target, q, X.mT)
    signs = f"{target.layer.name} alone, every sign of its pre-activations and every zero of its gradient"
    reason = f"the whole batch of {len(q)}, certified by {signs}; no labels: {unknown}"
    if not certificate.holds:
        reason = f"recovered, but not certified: {certificate.why_not()}; no labels: {unknown}"
    return _result(target, X.mT, reason, stats, certificate)


def _unknown_rest(target: LayerView) -> str:
    """Why the server cannot compute what follows the layer, in words; empty where it can."""
    if target.layer.tail is None:
        return f"the outputs depend on more than {target.layer.name}, by a branch around it"
    return ""


def _rest_is_sent(target: LayerView) -> bool:
    """Whether the update has a gradient of anything that follows the layer."""
    return any(name in target.gradients for name in weight_names(target.layer.tail))


def _result(
    target: LayerView,
    X: Float[Tensor, "k n"],
    reason: str,
    stats: Stats,
    certificate: Certificate | None = None,
    *,
    labels: Int[Tensor, " k"] | None = None,
    residuals: Float[Tensor, " k"] | None = None,
) -> Reconstruction:
    inputs = X.unflatten(1, target.input_shape).contiguous()
    residuals = X.new_full((len(X),), math.inf) if residuals is None else residuals
    verdict = {"certified": torch.zeros_like(residuals, dtype=torch.bool), "complete": False}
    if certificate is not None:
        verdict = {"certified": certificate.certified, "complete": certificate.holds}
        verdict["error_bound"] = certificate.error_bound
    told = {"reason": reason, "stats": stats, "limit": target.accuracy.recovered}
    return Reconstruction(inputs, labels, target.low.rank, residuals, **verdict, **told)


def nothing(target: LayerView, reason: str, stats: Stats) -> Reconstruction:
    """No sample at all: an image that the zero pattern contradicts is never returned."""
    R = target.observed.R
    return _result(target, R.new_zeros(0, R.shape[1]), reason, stats)
