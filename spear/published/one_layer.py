"""The attack on one layer, whatever finds the columns of its Q: from the server's view to the certified batch."""

import math
from dataclasses import replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.certificate import TWO_CLASSES, Certificate
from spear.models.streaming import weight_names
from spear.published import theory
from spear.published.certificate import (
    LEAST_SPARE,
    certify,
    certify_layer,
    recover_labels,
    shown_units,
    spare_zeros,
)
from spear.published.greedy import Candidates, disaggregate, matching_coefficient
from spear.published.lowrank import MIN_GAP
from spear.published.view import LayerView, Observed, under_noise
from spear.reconstruction import Budget, Reconstruction, Refusal, Stats, Terms

EXACT_GAP = 1e6  # between the batch's singular values and the noise's, under which single zeros are mistaken
INDEPENDENT = 1e-6  # singular value of unit directions under which they do not span the gradient
PLAUSIBLE = 0.75  # matching coefficient from which a reconstruction under noise is returned, uncertified
AFFORDABLE = 1e9  # proposals that "auto" goes on with where another method ended without the whole batch
LABELLED = 0.1  # relative distance of a sample's own gradient to that of its label, from which no label fits
FITTING = 1e-6  # the same, up to which a label does: what else does not fit is no matter of the loss
CANCEL = "a column of G whose samples' weights cancel has no input of its own"
HOPELESS = 1e17  # proposals, were all drawn uniformly, that no budget pays for: years of sampling
BEYOND = 1e30  # times a budget of proposals that nothing makes up for, neither walks nor a network of few active units


@runtime_checkable
class Method(Protocol):
    """A search for the columns of Q with its own options: `Sampling`, `Guided`, `Dictionary`, `Coupled`."""

    name: ClassVar[str]
    stands_noise: ClassVar[bool]

    def search(
        self, observed: Observed, terms: Terms, device: str | torch.device | None = None, **goal: float
    ) -> Candidates:
        """Directions, and the best basis among them."""


def attack_layer(
    view: LayerView, method: Method, terms: Terms, device: str | torch.device | None = None
) -> Reconstruction:
    """The attack on one layer, by any search for the columns of its Q."""
    seen = under_noise(view) if method.stands_noise and _shows_noise(view) else None
    try:
        if seen is None:
            _check_reach(view, method, terms.budget)
        return _attack(seen or view, method, terms, device, PLAUSIBLE if seen else 1)
    except Refusal as refusal:
        return nothing(view, str(refusal), terms.stats(), method.name)


def _attack(
    view: LayerView, method: Method, terms: Terms, device: str | torch.device | None, goal: float | int
) -> Reconstruction:
    found = method.search(view.observed, terms, device, **({} if goal == 1 else {"goal": goal}))
    stats = terms.stats(found.proposals, found.rounds)
    if found.matching < goal:
        live, m = len(view.observed.alive().L), len(view.observed.L)
        reached = f"{len(found.basis)} of {view.low.rank} directions, matching coefficient {found.matching:.6f}"
        reached += f"; of {m} neurons {live} tell anything, the others see no sample" if live < m else ""
        found = _alone(view, found) if view.low.rank == 1 else found
        if goal == 1 and by_zeros(view, found):
            return replace(_by_zeros_alone(view, found, stats), method=method.name)
        return nothing(view, f"{method.name}: {found.spent}: {reached}", stats, method.name)
    return replace(reconstruct(view, found, stats), method=method.name)


def _shows_noise(view: LayerView) -> bool:
    """Whether what lies beyond the rank is more than rounding, and too much for an exact zero pattern."""
    low = view.low
    return low.gap < MIN_GAP or (low.gap < EXACT_GAP and low.noise > 100 * view.eps * low.largest)


def _check_reach(view: LayerView, method: Method, budget: Budget) -> None:
    """Raises `Refusal` where a search would be pointless."""
    low, (m, b), name = view.low, view.observed.L.shape, view.layer.name
    if low.gap < MIN_GAP:
        raise Refusal(f"the gradient of {name} shows no rank: no gap among its {low.rank} singular values")
    if b >= m or b > view.observed.R.shape[1]:
        raise Refusal(f"a batch of rank {b} needs a layer wider than {b} with as many inputs; {name} is {m} wide")
    if method.name == "sampling" and hopeless(view, budget, HOPELESS):
        expected = theory.expected_proposals(theory.half_rates(m, b))
        needed = f"needs about {expected:.0e} uniform proposals at width {m}"
        raise Refusal(f"a batch of {b} {needed}: set a budget to try all the same")
    if method.name == "sampling" and budget.proposals and b - 1 > math.log2(BEYOND * budget.proposals):
        raise Refusal(f"a batch of {b} needs about 2^{b - 1} proposals: {budget.proposals:,} are far from enough")


def hopeless(view: LayerView, budget: Budget, most: float) -> bool:
    """Whether sampling without a budget is expected to take more than `most` proposals."""
    m, b = view.observed.L.shape
    return not budget.limited and theory.expected_proposals(theory.half_rates(m, b)) > most


def reconstruct(view: LayerView, found: Candidates, stats: Stats) -> Reconstruction:
    """The batch behind a full set of directions, with what certifies it: everything that is known of the model."""
    q, name = found.q[found.basis], view.layer.name
    G, X = disaggregate(view.observed, q)
    if not bool(X.isfinite().all()):
        return nothing(view, CANCEL, stats, "")
    if view.observed.d is None:
        why = f"{name} has no bias, so each input is known up to a positive factor only (here: unit length)"
        return _result(view, X.mT, f"recovered, but not certified: {why}", stats)
    unknown = _unknown_rest(view)
    if not unknown:
        whole = _with_labels(view, q, G, X, stats)
        if whole.certified.any():
            return whole
        if _rest_is_sent(view):
            explained = bool((whole.residuals < LABELLED).all()) or _shows_noise(view)
            causes = f"another loss than {view.loss}, unequal weights in it, several steps, or another model"
            said = f"none explains the gradients, which speaks for {causes} than the client's"
            alone = _by_one_layer(view, q, X, said, stats)
            labelled = bool((whole.residuals < max(FITTING, view.eps**0.5)).all())
            return whole if labelled or (explained and not bool(alone.certified.any())) else alone
        unknown = f"the update holds nothing of what follows {name}, and the model's own rest does not fit it"
    return _by_one_layer(view, q, X, unknown, stats)


def _with_labels(
    view: LayerView, q: Float[Tensor, "b b"], G: Float[Tensor, "m b"], X: Float[Tensor, "n b"], stats: Stats
) -> Reconstruction:
    """The batch with its labels, certified by the layer and all that follows it; at another scale where that fits."""
    with torch.no_grad():
        Z = view.layer.linear(X.mT)
        outputs = view.layer.tail(Z).shape[1]
    best = first = None
    told, exact = view.unit(outputs), LABELLED if _shows_noise(view) else max(FITTING, view.eps**0.5)
    for unit in (told, *shown_units(view.layer, Z, G.mT, view.loss)):
        seen = replace(view, scale=view.scale * unit / told)
        labels = recover_labels(view.layer, Z, G.mT, unit, view.loss)
        certificate, residuals = certify(seen, q, X.mT, labels, whole=unit == told)
        if unit != told and (reserve := _at_another_scale(view, outputs)):
            certificate = replace(certificate, reserve=reserve)
        if best is None or float(residuals.max()) < float(best[3].max()):
            best = unit, labels, certificate, residuals
        first = first or best
        if bool((residuals < (LABELLED if unit == told else exact)).all()):
            break
    unit, labels, certificate, residuals = best if bool((best[3] < exact).all()) else first
    reason = f"the whole batch of {len(labels)}: every gradient reproduced to {certificate.residual:.0e}"
    if not certificate.holds:
        reason = f"recovered, but not certified: {certificate.why_not()}"
    reason += "" if unit == told else f"; the update is {unit / told:.6g} times their {view.reduction}"
    return _result(view, X.mT, reason, stats, certificate, labels=labels, residuals=residuals)


def _at_another_scale(view: LayerView, outputs: int) -> str:
    """What leaves a batch uncertain whose scale in the loss was read off it; empty where nothing does."""
    if outputs < 3:
        return TWO_CLASSES
    alone = f"its scale was read off {view.layer.name} alone, and with it the length of each input"
    return "" if _rest_is_sent(view) else alone


def _by_one_layer(
    view: LayerView, q: Float[Tensor, "b b"], X: Float[Tensor, "n b"], unknown: str, stats: Stats
) -> Reconstruction:
    """The inputs without labels, certified by the layer alone."""
    certificate = certify_layer(view, q, X.mT)
    signs = f"{view.layer.name}, every sign of its pre-activations and every zero of its gradient"
    signs += f", and what {', '.join(view.layer.readers)} reads" if view.layer.readers else ""
    reason = f"the whole batch of {len(q)}, certified by {signs}; no labels: {unknown}"
    if not certificate.holds:
        reason = f"recovered, but not certified: {certificate.why_not()}; no labels: {unknown}"
    return _result(view, X.mT, reason, stats, certificate)


def by_zeros(view: LayerView, found: Candidates) -> bool:
    """Whether directions span the gradient and are each fixed by more zeros than that takes, whatever the weights."""
    if view.observed.d is None or len(found.basis) < view.low.rank:
        return False
    q = found.q[found.basis]
    return bool(torch.linalg.svdvals(q)[-1] > INDEPENDENT) and spare_zeros(view.observed, q) >= LEAST_SPARE


def _alone(view: LayerView, found: Candidates) -> Candidates:
    """The direction of a single sample: there is but one, whatever the weights."""
    q = view.observed.L.new_ones(1, 1)
    matching = float(matching_coefficient(view.observed, q))
    return replace(found, q=q, basis=torch.zeros(1, dtype=torch.long, device=q.device), matching=matching)


def _by_zeros_alone(view: LayerView, found: Candidates, stats: Stats) -> Reconstruction:
    """The inputs that the gradient gives, dL/dW over dL/dβ of each column, where the weights do not fit them."""
    X = disaggregate(view.observed, found.q[found.basis])[1]
    if not bool(X.isfinite().all()):
        return nothing(view, CANCEL, stats, "")
    share = f"its zeros are the units that the weights leave inactive in {100 * found.matching:.1f} % of entries only"
    causes = "older or newer weights than the client's, dropout, or more than ReLU behind it"
    return _result(view, X.mT, f"recovered from the gradient alone, not certified: {share}: {causes}", stats)


def _unknown_rest(view: LayerView) -> str:
    """Why the server cannot compute what follows the layer, in words; empty where it can."""
    if view.layer.tail is None:
        return view.layer.unknown
    return ""


def _rest_is_sent(view: LayerView) -> bool:
    """Whether the update has a gradient of anything that follows the layer."""
    return any(name in view.gradients for name in weight_names(view.layer.tail))


def _result(
    view: LayerView,
    X: Float[Tensor, "k n"],
    reason: str,
    stats: Stats,
    certificate: Certificate | None = None,
    *,
    labels: Int[Tensor, " k"] | None = None,
    residuals: Float[Tensor, " k"] | None = None,
) -> Reconstruction:
    inputs = X.unflatten(1, view.input_shape).contiguous()
    residuals = X.new_full((len(X),), math.inf) if residuals is None else residuals
    verdict = {"certified": torch.zeros_like(residuals, dtype=torch.bool), "complete": False}
    if certificate is not None:
        verdict = {"certified": certificate.certified, "complete": certificate.holds}
        verdict["error_bound"] = certificate.error_bound
    told = {"reason": reason, "stats": stats, "limit": view.accuracy.recovered}
    return Reconstruction(inputs, labels, view.low.rank, residuals, **verdict, **told)


def nothing(view: LayerView, reason: str, stats: Stats, method: str) -> Reconstruction:
    """No sample at all: an image that the zero pattern contradicts is never returned."""
    R = view.observed.R
    return replace(_result(view, R.new_zeros(0, R.shape[1]), reason, stats), method=method)
