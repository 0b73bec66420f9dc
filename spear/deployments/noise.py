"""Batches from gradients with noise: added for privacy, or made by rounding. Rank, level, samples, expected error.

Projections from the input find the samples one by one, since a sample's subspaces stand the noise well; maximum
likelihood refines them together. Nothing here is certified: each sample carries its expected error instead.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from spear.deployments.likelihood import Estimate, Noisy, common_weight, measure, refine, sample_weights
from spear.deployments.opening import Opening, open_noisy
from spear.deployments.sign import multiple, turned_to
from spear.directions import away_from, unit_rows
from spear.federated.update import SharedUpdate, as_gradient
from spear.network.factors import Factors
from spear.network.problem import Targets, open_network, passes, plain
from spear.network.projection import NEEDED, Limits, Projections, applicable, class_sines, each_class
from spear.reconstruction import Reconstruction, Refusal, Stats, Terms

SAME = 0.97  # cosine of two pre-activation vectors under noise that are one sample's
LIMITS = Limits(rough=0.6, alike=0.995, sine=0.35, same=SAME)  # noise leaves a sine of its own, labels judge the rest
ROUNDS, FEWEST = 8, 48  # of starts, and starts in each at least: one in three arrives under weak noise
IDLE = 2  # rounds in a row that found nothing
SPARE = 8  # dimensions that starts keep although all found samples are taken out of them
FAINTEST = 1e-4  # of the largest entry of all [x; 1]: what their 1 counts for at least
FITS, NEARLY = 1.15, 1.3  # a residual that many times larger than expected is no noise alone; not by samples missing
ODD = 0.1  # how far the 1 of [x; 1] may be off, by the first layer, with a weight that all layers' biases show
SAME_WEIGHT, CLEARLY = 0.01, 3  # by how much a weight is another: relative, in deviations of its median
MOST_OFF = 2  # times the rank: a batch is of that size at most, else the weight has another cause
MOVED = 0.65  # what a round moves a sample is its error before and after: measured, over both in quadrature
TRIALS = 8  # searches, each without what the update supports of those before
RELATED = 0.6  # sine to the first gradient of a label's back-propagated vector: wrong images have none so near
DROPS = 4  # rounds of refinement without the samples that the update does not support
ALIKE, OFF, WORST = 0.6, 0.35, 0.5  # cosine, size and expected error up to which the update supports a sample


def recover(opening: Opening, terms: Terms) -> Reconstruction:
    """Find, refine, drop what the update does not support, and search on without what it does.

    Nothing is certified; each sample has its expected error. Where the number of samples was not disclosed, the weight
    of those found tells it. Samples that do not explain the update are returned if they nearly do, each with an error
    that is larger by that. The budget bounds the search, and cuts the refinement of what was found short.
    """
    noisy = opening.noisy()
    try:
        _check_reach(noisy)
    except Refusal as refusal:
        return _reconstruction(noisy, None, str(refusal), terms.stats())
    noisy, estimate, used, trials = _search(noisy, terms)
    size = _size(noisy)
    if estimate is not None and size != noisy.rank and not terms.budget.spent(used):
        other, found, more, again = _search(opening.noisy(size), terms)
        used, trials = used + more, trials + again
        if _merit(found) >= _merit(estimate):
            noisy, estimate = other, found
    noisy, estimate = _reweighed(noisy, estimate, terms.budget.latest)
    estimate, reason = _borne_out(estimate, _reason(noisy, estimate) + multiple(noisy, estimate))
    return _reconstruction(noisy, estimate, reason, terms.stats(used, trials))


def _borne_out(estimate: Estimate | None, reason: str) -> tuple[Estimate | None, str]:
    """What is returned of an estimate, by how well it explains the update, and the reason with that."""
    if estimate is None or estimate.misfit <= FITS:
        return estimate, reason
    reason = f"{reason}: what was found does not explain the update"
    if not estimate.misfit <= NEARLY:
        return None, reason
    larger = replace(estimate, error=estimate.error * estimate.misfit**2)
    return larger, f"{reason}, each sample is known less well by that"


def _size(noisy: Noisy) -> int:
    """The size of a batch that was not disclosed, by the weight of the samples found: in a mean one over it."""
    problem = noisy.problem
    if noisy.weight is None or problem.batch_size or problem.reduction != "mean":
        return noisy.rank
    size = round(problem.unit(1) / noisy.weight)
    return size if noisy.rank <= MOST_OFF * size and size <= MOST_OFF * noisy.rank else noisy.rank


def _weighed(noisy: Noisy, inputs: Float[Tensor, "s n"]) -> Noisy:
    """With the samples' common weight as the update itself has it, where that is clearly another than was thought.

    A rate, a count or a norm for clipping that was not disclosed, or wrongly, shows there.
    """
    if noisy.weight is None or not len(inputs):
        return noisy
    counts = F.one_hot(label(noisy, inputs), noisy.problem.classes).to(inputs)
    own = passes(noisy.problem, inputs, Targets(counts, noisy.weight, 0.0)).deltas[0]
    seen, _ = measure(noisy.problem, 0, noisy.problem.augmented(0), inputs)
    factor = (seen * own).sum(1) / own.pow(2).sum(1)
    middle = factor.median()
    spread = (factor - middle).abs().median() / len(factor) ** 0.5
    if float((middle - 1).abs()) < max(SAME_WEIGHT, CLEARLY * float(spread)) or not middle > 0:
        return noisy
    return replace(noisy, weight=noisy.weight * float(middle), most=noisy.most * float(middle))


def _reweighed(noisy: Noisy, estimate: Estimate | None, until: float) -> tuple[Noisy, Estimate | None]:
    """A whole batch's common weight, where it was read off, by the bias gradients of all layers; its error too."""
    problem = noisy.problem
    told = problem.unit(problem.batch_size or noisy.rank)
    if estimate is None or noisy.weight in (None, told) or len(estimate.labels) < noisy.rank:
        return noisy, estimate
    factor, off = common_weight(noisy, estimate.inputs, estimate.labels)
    noisy = replace(noisy, weight=noisy.weight * factor, most=noisy.most * factor)
    estimate = refine(noisy, estimate.inputs, estimate.labels, until=until)
    ones = torch.linalg.pinv(estimate.deltas.mT) @ problem.augmented(0)[:, -1]
    length = float(ones.median())
    if length > ODD and abs(length - 1) > ODD:  # layers of unlike weight: the first alone makes the inputs
        noisy = replace(noisy, weight=noisy.weight * length, most=noisy.most * length)
        estimate = refine(noisy, estimate.inputs / length, estimate.labels, until=until)
    return noisy, replace(estimate, error=torch.hypot(estimate.error, torch.full_like(estimate.error, off)))


def _merit(estimate: Estimate | None) -> tuple[bool, int]:
    """What makes an estimate better than another: that it explains the update nearly, and the number of samples."""
    return (False, 0) if estimate is None else (estimate.misfit <= NEARLY, len(estimate.labels))


def _search(noisy: Noisy, terms: Terms) -> tuple[Noisy, Estimate | None, int, int]:
    """The best estimate, with its weights; the starts used, and the trials.

    Each trial searches in what is left without the samples of the last that the update supports. They end with the
    whole batch, or once `IDLE` in a row found no more.
    """
    used, trials, idle, generator = 0, 0, 0, terms.generator()
    inputs = noisy.problem.weights[0].new_zeros(0, noisy.problem.weights[0].shape[1])
    best = None
    while trials < TRIALS and idle < IDLE and not (trials and terms.budget.spent(used)):
        new, used = candidates(noisy, inputs, used=used, terms=terms, generator=generator)
        inputs, trials = torch.cat([inputs, new]), trials + 1
        noisy = _weighed(turned_to(noisy, inputs), inputs)
        estimate, good = _supported(noisy, inputs, terms.budget.latest) if len(inputs) else (None, inputs[:, 0] > 0)
        inputs = inputs[good]
        best, idle = (estimate, 0) if _merit(estimate) > _merit(best) else (best, idle + 1)
        if len(inputs) == noisy.rank:
            break
    return noisy, best, used, trials


def _reconstruction(noisy: Noisy, estimate: Estimate | None, reason: str, stats: Stats) -> Reconstruction:
    problem = noisy.problem
    empty = problem.weights[0].new_zeros(0, problem.weights[0].shape[1])
    inputs = empty if estimate is None else estimate.inputs
    return Reconstruction(
        problem.shaped(inputs),
        None if estimate is None else estimate.labels,
        noisy.rank,
        empty[:, 0] if estimate is None else estimate.residuals,
        torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device),
        False,
        reason,
        stats,
        expected_error=None if estimate is None else estimate.error,
        method="noise",
    )


def _check_reach(noisy: Noisy) -> None:
    """Raises `Refusal` where projections cannot be expected to find anything."""
    problem, rank = noisy.problem, noisy.rank
    if not applicable(problem):
        raise Refusal(f"noisy gradients need {NEEDED}")
    width = min(len(w) for w in problem.weights[:2])
    if rank > 0.4 * width:
        needed = f"layers wider than {int(rank / 0.4)}; the narrowest is {width}"
        raise Refusal(f"a batch of rank {rank} under noise needs {needed}")


def _reason(noisy: Noisy, estimate: Estimate | None) -> str:
    seen = f"{noisy.rank} samples stand out of noise of {noisy.sigmas[0]:.1e} per entry"
    if estimate is None:
        return f"{seen}; none was found"
    fit = f"residual {estimate.fit:.3f} times the noise, {estimate.expected_fit:.3f} expected of a right answer"
    off = f"expected relative error {float(estimate.error.median()):.1e}, at worst {float(estimate.error.max()):.1e}"
    return f"{seen}; {len(estimate.labels)} recovered but for the noise: {off}; {fit}"


def candidates(
    noisy: Noisy,
    known: Float[Tensor, "s n"],
    *,
    used: int,
    terms: Terms,
    generator: Generator,
) -> tuple[Float[Tensor, "k n"], int]:
    """Inputs that fit the first two gradients, less the known samples, as the noise lets them; and the starts so far.

    Each round starts away from what was found; `IDLE` that find nothing end the search.
    """
    projections = Projections.of(noisy.problem, *_without(noisy, known))
    r = left = len(projections.rows)
    found, sines, idle = projections.lift.new_zeros(0, r), projections.lift.new_zeros(0), 0
    for _ in range(ROUNDS):
        if len(found) >= left or idle == IDLE or not left or terms.budget.spent(used):
            break
        c = projections.draw(max(FEWEST, 2 * left), generator)
        c = unit_rows(away_from(found[: max(0, r - SPARE)], c))
        used += len(c)
        new, sine = _converged(projections, c, found)
        good = _labelled(noisy, _inputs(projections, new))
        idle = 0 if bool(good.any()) else idle + 1
        found, sines = torch.cat([found, new[good]]), torch.cat([sines, sine[good]])
        terms.report("noise", min(len(known) + len(found), noisy.rank), noisy.rank, used)
    best = sines.argsort()[:left]
    return _inputs(projections, found[best]), used


def _converged(
    projections: Projections, c: Float[Tensor, "k r"], found: Float[Tensor, "f r"]
) -> tuple[Float[Tensor, "j r"], Float[Tensor, " j"]]:
    """Where the starts end, if that fits and was not found before; and the sine that is left."""
    end = projections.climb(c, LIMITS)
    c, sine = projections.settle(end[_is_new(end, found)], LIMITS)
    new = _is_new(c, found)
    return c[new], sine[new]


def _is_new(c: Float[Tensor, "k r"], found: Float[Tensor, "f r"]) -> Bool[Tensor, " k"]:
    return (c @ found.T < SAME).all(1)


def _inputs(projections: Projections, c: Float[Tensor, "k r"]) -> Float[Tensor, "k n"]:
    """The input of every c, its scale kept in bounds: noise can make the 1 of [x; 1] anything."""
    rows = projections.extended(c)
    return rows[:, :-1] / rows[:, -1:].clamp_min(FAINTEST * float(rows.abs().max()) if len(rows) else 0)


def _without(noisy: Noisy, known: Float[Tensor, "s n"]) -> tuple[Factors, Factors]:
    """The first two gradients less the known samples' own."""
    first, second = Factors.of(noisy.lows[0]), Factors.of(noisy.lows[1])
    if not len(known):
        return first, second
    problem = noisy.problem
    counts = F.one_hot(label(noisy, known), problem.classes).to(known)
    run = passes(problem, known, Targets(counts, 1.0, 0.0))
    weights = sample_weights(noisy, known, list(run.deltas))[:, None]
    own = [(weights * run.deltas[k], problem.extend(k, run.inputs[k])) for k in (0, 1)]
    return first.without(*own[0]), second.without(*own[1])


def _labelled(noisy: Noisy, inputs: Float[Tensor, "s n"]) -> Bool[Tensor, " s"]:
    """Which candidates have a label whose back-propagated vector is near the span of the first gradient."""
    return class_sines(noisy.problem, inputs, noisy.lows[0].L).amin(1) < RELATED


def label(noisy: Noisy, inputs: Float[Tensor, "s n"]) -> Int[Tensor, " s"]:
    """The class whose back-propagated vector is nearest in direction to the one measured in the update."""
    seen, _ = measure(noisy.problem, 0, noisy.problem.augmented(0), inputs)
    return torch.stack([F.cosine_similarity(seen, d) for d in each_class(noisy.problem, inputs)]).argmax(0)


def _supported(noisy: Noisy, inputs: Float[Tensor, "s n"], until: float) -> tuple[Estimate | None, Bool[Tensor, " s"]]:
    """The refined samples whose measured gradient has the direction and size of their own, and which these are.

    Where samples are missing, one round has to do, since what they add to the update is only guessed; the others are
    known less well than the noise alone would allow: by how far they moved. Where there is none: `None`. Rounds end
    when the clock shows `until`.
    """
    whole, kept = len(inputs) == noisy.rank, torch.arange(len(inputs), device=inputs.device)
    estimate = refine(noisy, inputs, label(noisy, inputs), rounds=15 if whole else 1, until=until)
    if whole:
        estimate = refine(noisy, estimate.inputs, label(noisy, estimate.inputs), until=until)
    for _ in range(DROPS):
        good = _is_good(estimate)
        if bool(good.all()) or not bool(good.any()):
            break
        kept = kept[good]
        estimate = refine(noisy, inputs[kept], estimate.labels[good], rounds=1)
    there = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    if not bool(good.all()):
        return None, there
    if len(kept) < noisy.rank:
        moved = (estimate.inputs - inputs[kept]).norm(dim=1) / inputs[kept].norm(dim=1)
        estimate = replace(estimate, error=MOVED * torch.hypot(estimate.error, moved))
        good = _is_good(estimate)
        estimate, kept = estimate.only(good), kept[good]
    there[kept] = True
    return (estimate if len(kept) else None), there


def _is_good(estimate: Estimate) -> Bool[Tensor, " s"]:
    alike = (F.cosine_similarity(estimate.measured, estimate.deltas) > ALIKE) & ((estimate.scale - 1).abs() < OFF)
    return alike & (estimate.error < WORST) & estimate.inputs.isfinite().all(1)


def denoise(
    model: nn.Module, update: SharedUpdate, batch_size: int | None, device: str | torch.device | None, terms: Terms
) -> Reconstruction:
    """What can be read from a gradient that was rounded or had noise added: nothing certified.

    Raises `Refusal` for a model that is no chain of linear layers.
    """
    problem = plain(open_network(model, as_gradient(update), batch_size=batch_size, device=device))
    return recover(open_noisy(problem, update), terms)
