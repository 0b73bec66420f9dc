"""Batches from gradients with noise: added for privacy, or made by rounding. Rank, level, samples, expected error.

Projections from the input find the samples one by one, since a sample's subspaces stand the noise well; maximum
likelihood refines them together. Nothing here is certified: each sample carries its expected error instead.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from spear.deployments.likelihood import Estimate, Noisy, measure, refine, sample_weights
from spear.directions import away_from, unit_rows
from spear.federated.update import SharedUpdate, as_gradient
from spear.network.factors import Factors
from spear.network.problem import NetworkView, Targets, open_network, passes, plain
from spear.network.projection import NEEDED, Limits, Projections, applicable, class_sines, each_class
from spear.published.lowrank import LowRank, rank_under_noise
from spear.reconstruction import Reconstruction, Refusal, Stats, Terms

SAME = 0.97  # cosine of two pre-activation vectors under noise that are one sample's
LIMITS = Limits(rough=0.6, alike=0.995, sine=0.35, same=SAME)  # noise leaves a sine of its own, labels judge the rest
ROUNDS, FEWEST = 8, 48  # of starts, and starts in each at least: one in three arrives under weak noise
IDLE = 2  # rounds in a row that found nothing
SPARE = 8  # dimensions that starts keep although all found samples are taken out of them
FAINTEST = 1e-4  # of the largest entry of all [x; 1]: what their 1 counts for at least
FITS = 1.15  # a residual that many times larger than expected is no noise
MOVED = 0.65  # what a round moves a sample is its error before and after: measured, over both in quadrature
TRIALS = 3  # searches, each without what the update supports of those before
ROUNDING = 1e-12  # error of the linear algebra here, relative to the first singular value
EDGE, SETTLING = 1.02, 10  # a little above the edge of pure noise; rounds in which rank and level settle
SQUARED = 1e-6  # of the largest singular value: smaller ones are lost in the Gram matrix, whose unit is its square
LOUD = 30  # roundings of an entry: what is under that is rounding, no noise
SHORT, LONG = 1.5, 3  # times the edge of pure noise: its spectrum ends there; that of noise in proportion to entries,
CLEAR = 10  # which must lie that far below the batch's
RELATED = 0.6  # sine to the first gradient of a label's back-propagated vector: wrong images have none so near
DROPS = 4  # rounds of refinement without the samples that the update does not support
ALIKE, OFF, WORST = 0.6, 0.35, 0.5  # cosine, size and expected error up to which the update supports a sample


def level(J: Float[Tensor, "m n"], sigma: float | None = None, most: int | None = None) -> tuple[LowRank, float]:
    """The part of a gradient that stands out of noise, and the noise's standard deviation per entry.

    `sigma` is the level where it is known, `most` the largest rank there can be. Rows and columns that are zero carry
    no noise and are not counted.
    """
    m, n = int(J.any(1).sum()), int(J.any(0).sum())
    s, L = _left(J)
    bound = min(most or len(s), m - 1, n - 1)
    rank = max(1, min(rank_under_noise(s[: min(m, n)], (m, n), sigma), bound))
    rounding = ROUNDING * float(s[0]) / (m * n) ** 0.5
    for _ in range(SETTLING):
        seen = max(float(s[rank:].norm()) / max((m - rank) * (n - rank), 1) ** 0.5, rounding)
        before, above = rank, rank_under_noise(s, (m, n), EDGE * (seen if sigma is None else sigma))
        rank = max(1, min(above, bound))
        if rank == before:
            break
    beyond = float(s[rank]) if rank < len(s) else 0.0
    low = LowRank(rank, L[:, :rank], L[:, :rank].mT @ J, float(s[rank - 1]) / max(beyond, 1e-300), beyond)
    return low, seen if sigma is None else sigma


def _left(J: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "m k"]]:
    """Singular values and left singular vectors; by the smaller Gram matrix where squaring loses nothing."""
    wide = J if J.shape[0] <= J.shape[1] else J.mT
    values, U = torch.linalg.eigh(wide @ wide.mT)
    s, U = values.flip(0).clamp_min(0).sqrt(), U.flip(1)
    if s.median() < SQUARED * s[0]:
        U, s, _ = torch.linalg.svd(torch.linalg.qr(wide.mT, mode="r")[1].mT, full_matrices=False)
    if wide is J:
        return s, U
    return s, torch.linalg.qr(J @ U / s.clamp_min(1e-300 + ROUNDING * s[0]))[0]


def open_noisy(problem: NetworkView, *, sigma: float | None, weighted: bool) -> Noisy:
    """The noisy problem behind gradients: spaces of every hidden layer, noise levels, weights of the samples.

    `sigma` is the noise per entry where it is disclosed, `weighted` says that samples were clipped, and so have
    weights of their own, at most the common one.
    """
    count = problem.batch_size
    if not all(bool(g.any()) for g in problem.weight_gradients):
        raise ValueError("a gradient has rank 0: it is zero everywhere")
    found = [level(problem.augmented(k), sigma, count) for k in range(problem.last + 1)]
    unit = problem.unit(count or found[0][0].rank)
    lows, sigmas = zip(*found, strict=True)
    return Noisy(problem, lows, sigmas, None if weighted else unit, unit)


def is_visible(noisy: Noisy) -> bool:
    """Whether what the samples leave of the first gradient looks like noise: above rounding, its spectrum short.

    Noise in proportion to the entries, as half precision leaves it, has a longer spectrum: it must lie far below.
    """
    low, sigma, J = noisy.lows[0], noisy.sigmas[0], noisy.problem.augmented(0)
    rounding = max(LOUD * noisy.problem.precision, 10 * ROUNDING) * float(J.norm()) / J.numel() ** 0.5
    edge = sigma * (J.shape[0] ** 0.5 + J.shape[1] ** 0.5)
    longest = (LONG if low.smallest > CLEAR * low.noise else SHORT) * edge
    return sigma > rounding and low.noise < longest and edge < low.smallest


def recover(noisy: Noisy, terms: Terms) -> Reconstruction:
    """Find, refine, drop what the update does not support, and search on without what it does.

    Nothing is certified; each sample has its expected error. The budget bounds the search; the refinement of what was
    found is not cut short.
    """
    try:
        _check_reach(noisy)
    except Refusal as refusal:
        return _reconstruction(noisy, None, str(refusal), terms.stats())
    estimate, used, trials = _search(noisy, terms)
    reason = _reason(noisy, estimate)
    if estimate is not None and estimate.fit > FITS * estimate.expected_fit:
        estimate, reason = None, f"{reason}: what was found does not explain the update"
    return _reconstruction(noisy, estimate, reason, terms.stats(used, trials))


def _search(noisy: Noisy, terms: Terms) -> tuple[Estimate | None, int, int]:
    """The best estimate, the starts used, and the trials."""
    used, trials, generator = 0, 0, terms.generator()
    inputs = noisy.problem.weights[0].new_zeros(0, noisy.problem.weights[0].shape[1])
    estimate = None
    while trials < TRIALS and not (trials and terms.budget.spent(used)):
        new, used = candidates(noisy, inputs, used=used, terms=terms, generator=generator)
        inputs, trials = torch.cat([inputs, new]), trials + 1
        if len(inputs) == noisy.rank:
            estimate = _supported(noisy, inputs)
            if estimate is not None and len(estimate.labels) == noisy.rank:
                break
            inputs = inputs[:0] if estimate is None else estimate.inputs
    if len(inputs) and len(inputs) < noisy.rank:
        estimate = _supported(noisy, inputs)
    return estimate, used, trials


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


def _supported(noisy: Noisy, inputs: Float[Tensor, "s n"]) -> Estimate | None:
    """The refined samples whose measured gradient has the direction and size of their own; none: `None`.

    Where samples are missing, one round has to do, since what they add to the update is only guessed; the others are
    known less well than the noise alone would allow: by how far they moved.
    """
    whole = len(inputs) == noisy.rank
    raw, estimate = inputs, refine(noisy, inputs, label(noisy, inputs), rounds=15 if whole else 1)
    if whole:
        estimate = refine(noisy, estimate.inputs, label(noisy, estimate.inputs))
    for _ in range(DROPS):
        good = _is_good(estimate)
        if bool(good.all()) or not bool(good.any()):
            break
        raw = raw[good]
        estimate = refine(noisy, raw, estimate.labels[good], rounds=1)
    if not bool(good.all()):
        return None
    if len(raw) < noisy.rank:
        moved = (estimate.inputs - raw).norm(dim=1) / raw.norm(dim=1)
        estimate = replace(estimate, error=MOVED * torch.hypot(estimate.error, moved))
        estimate = estimate.only(_is_good(estimate))
    return estimate if len(estimate.labels) else None


def _is_good(estimate: Estimate) -> Bool[Tensor, " s"]:
    seen, own = estimate.measured, estimate.deltas
    scale = (seen * own).sum(1) / own.pow(2).sum(1)
    alike = (F.cosine_similarity(seen, own) > ALIKE) & ((scale - 1).abs() < OFF)
    return alike & (estimate.error < WORST) & estimate.inputs.isfinite().all(1)


def denoise(
    model: nn.Module, update: SharedUpdate, batch_size: int | None, device: str | torch.device | None, terms: Terms
) -> Reconstruction:
    """What can be read from a gradient that was rounded or had noise added: nothing certified.

    Raises `Refusal` for a model that is no chain of linear layers.
    """
    problem = plain(open_network(model, as_gradient(update), batch_size=batch_size, device=device))
    return recover(open_noisy(problem, sigma=update.noise or None, weighted=update.clip is not None), terms)
