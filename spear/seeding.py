"""Sampling where it is likely to hit: rows of L that a guess of a sample's pre-activations puts far below zero.

SPEAR combined with a prior (its large-batch experiment): an approximate image x gives approximate pre-activations
W x + beta; the rows where these are lowest most surely vanish in that sample's column of G, and b - 1 of them that all
do have q_i for their kernel. A hit is exact, however blurred the image was: errors matter through the *choice* of rows.

In the coordinates of `Observed` a guess is a column v of V = Q^-T, with pre-activations B v. Two things sharpen it.
Only its part in the row space of the gradient enters. And V^T Q = 1: a sample that is not solved has a v orthogonal to
all q that are, so that each one found removes a part of every guess's error. A row of L is a guess too, and needs no
prior: near initialisation q_i and v_i are nearly parallel, and samples that activate a neuron lend it their q.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear import filtering, sampling
from spear.federated import SharedUpdate
from spear.filtering import Observed
from spear.inversion import Reconstruction, Stats, reconstruct
from spear.inversion import attack as sample_uniformly
from spear.lowrank import MIN_GAP
from spear.sampling import Proposals
from spear.search import Budget, Found, Progress, choose, merge, thresholds
from spear.target import Target, prepare

ROUND = 1000  # proposals of a round
IDLE = 30  # rounds without a new direction after which guesses are given up
BLUR = 0.5  # standard deviation of the share of a second row of L that is mixed into a guess
FOCUS = 8  # how strongly draws favour the lowest pre-activations: 0 would be half of all rows alike
CHUNK_BYTES = 2**27  # of submatrices in work at once


def attack(
    model: nn.Module,
    update: SharedUpdate,
    approximate: Float[Tensor, "k *input_shape"] | None = None,
    *,
    layer: str | None = None,
    batch_size: int | None = None,
    time_limit: float | int | None = None,
    max_proposals: int | None = None,
    false_rejection: float = 1e-9,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Reconstruction:
    """The batch behind a client's update from one layer, by sampling rows that guesses of the batch suggest.

    `approximate` holds inputs near some of the samples, from `spear.baselines` for instance; without, or where they
    lead nowhere, rows of the gradient's own column space serve as guesses, and once these have found nothing for long,
    the remaining budget goes to uniform sampling. Results are certified as those of `spear.attack` are: a bad guess
    costs time and nothing else. Other options, budgets and errors as for `spear.attack` with `method="sampling"`.

    Raises `ValueError` for approximations of another size than the layer's inputs.
    """
    budget = Budget(time.monotonic(), time_limit, max_proposals)
    target = prepare(model, update, layer=layer, batch_size=batch_size, device=device)
    found = Found(target.observed.L[:0], torch.arange(0), 0.0, 0, 0, "")
    if target.low.gap >= MIN_GAP and target.low.rank < min(len(target.observed.L), target.observed.R.shape[1] + 1):
        found = search(target.observed, _flat(target, approximate), budget, false_rejection, seed, progress)
    stats = Stats(time.monotonic() - budget.started, found.proposals, found.rounds)
    if found.matching == 1:
        return reconstruct(target, found, stats)
    limits = {
        "time_limit": None if time_limit is None else max(0.0, time_limit - stats.seconds),
        "max_proposals": None if max_proposals is None else max(0, max_proposals - found.proposals),
    }
    options = {"layer": layer, "batch_size": batch_size, "false_rejection": false_rejection, "device": device}
    result = sample_uniformly(model, update, method="sampling", seed=seed, progress=progress, **options, **limits)
    led = f"guesses led to {len(found.basis)} of {target.low.rank} directions; uniform sampling: {result.reason}"
    total = Stats(
        stats.seconds + result.stats.seconds,
        found.proposals + result.stats.proposals,
        found.rounds + result.stats.rounds,
    )
    return replace(result, reason=led, stats=total)


def search(
    observed: Observed,
    approximate: Float[Tensor, "k n"] | None,
    budget: Budget,
    false_rejection: float,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Found:
    """Rounds of guided proposals, filtered and chosen from as in `spear.search`, until lambda = 1, the budget is spent
    or `IDLE` rounds found nothing new."""
    generator = torch.Generator(observed.L.device).manual_seed(seed)
    pool = None if approximate is None else guesses(observed, approximate)
    threshold, b = thresholds(observed, false_rejection)[0], observed.L.shape[1]
    q, basis, matching = choose(observed, observed.L[:0], threshold)
    proposals, rounds, idle, spent = 0, 0, 0, ""
    while matching < 1 and idle < IDLE and not (spent := budget.spent(proposals)):
        found = propose(observed, pool, q[basis], ROUND, threshold=threshold, generator=generator)
        proposals, rounds, before = proposals + found.count, rounds + 1, len(q)
        q = merge(observed, q, found.directions, threshold)
        idle = 0 if len(q) > before else idle + 1
        if not idle:
            q, basis, matching = choose(observed, q, threshold)
        if progress is not None:
            progress(Progress(len(basis), b, proposals, time.monotonic() - budget.started))
    return Found(q, basis, matching, proposals, rounds, spent)


def guesses(observed: Observed, inputs: Float[Tensor, "k n"]) -> Float[Tensor, "k b"]:
    """Columns v of V as unit rows from approximate inputs: x = R^T v, and 1 = <d, v> where there is a bias.

    Least squares leave out what of x lies outside the row space of the gradient, and is none of the batch's.
    """
    system, values = observed.R.mT, inputs.mT
    if observed.d is not None:
        system = torch.cat([system, observed.d[None]])
        values = torch.cat([values, values.new_ones(1, len(inputs))])
    v = torch.linalg.lstsq(system, values).solution.mT
    return v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)


def propose(
    observed: Observed,
    pool: Float[Tensor, "k b"] | None,
    found: Float[Tensor, "f b"],
    count: int,
    *,
    threshold: int,
    generator: torch.Generator,
) -> Proposals:
    """`count` proposals from guesses, half of them from the `pool` where there is one, the others from rows of L.

    Guesses are made orthogonal to the directions `found`. Returned directions have at least `threshold` zeros, are
    polished and differ by more than sign.
    """
    L, tolerance, kept, hits = observed.L, observed.tolerance, [], 0
    for size in _chunks(count, L.shape[1]):
        v = _away_from(found, _draw_guesses(observed, pool, size, generator))
        kernels = sampling.kernels_lu(L[draw_rows(v @ observed.B.mT, L.shape[1] - 1, generator=generator)])
        kept.append(kernels[filtering.sparsity_filter(L, kernels, threshold, tolerance=tolerance)])
        hits += len(kept[-1])
    q = sampling.refine(L, sampling.distinct(L, torch.cat(kept), tolerance), tolerance=tolerance)
    return Proposals(count, hits, q, filtering.zero_rows(L, q, tolerance=tolerance).sum(1))


def draw_rows(
    Z: Float[Tensor, "p m"], size: int, *, focus: float | int = FOCUS, generator: torch.Generator
) -> Int[Tensor, "p size"]:
    """For each row of pre-activations, `size` different neurons among its lowest: uniform among the K lowest.

    K is drawn anew each time, between `size` and half of the neurons: size + (m / 2 - size) u^focus, u uniform.
    """
    count, m = Z.shape
    u = torch.rand(count, 1, generator=generator, dtype=Z.dtype, device=Z.device)
    most = (size + max(0.0, m / 2 - size) * u**focus).ceil()
    place = Z.argsort(dim=1).argsort(dim=1)
    lot = torch.rand(count, m, generator=generator, dtype=Z.dtype, device=Z.device)
    return torch.where(place < most, lot, 2).topk(size, largest=False).indices


def _draw_guesses(
    observed: Observed, pool: Float[Tensor, "k b"] | None, count: int, generator: torch.Generator
) -> Float[Tensor, "count b"]:
    """Rows of L, or of the pool, each with a random share of another row of L; with the sign that 1 = <d, v> asks."""
    L = observed.L / torch.linalg.vector_norm(observed.L, dim=1, keepdim=True).clamp_min(1e-300)
    own = L if pool is None else pool
    first, second = (
        source[torch.randint(len(source), (count,), generator=generator, device=L.device)] for source in (own, L)
    )
    if pool is not None:
        first[::2] = L[torch.randint(len(L), (len(first[::2]),), generator=generator, device=L.device)]
    share = BLUR * torch.randn(count, 1, generator=generator, dtype=L.dtype, device=L.device)
    v = first + share * second
    if observed.d is None:
        return v
    return v * torch.where(v @ observed.d < 0, -1, 1)[:, None]


def _away_from(found: Float[Tensor, "f b"], v: Float[Tensor, "p b"]) -> Float[Tensor, "p b"]:
    basis = torch.linalg.qr(found.mT)[0]
    return v - v @ basis @ basis.mT


def _flat(target: Target, approximate: Float[Tensor, "k *input_shape"] | None) -> Float[Tensor, "f n"] | None:
    """The approximations that are finite numbers, as rows; `None` where there are none."""
    if approximate is None or not len(approximate):
        return None
    flat, n = approximate.detach().flatten(1).to(target.observed.R), target.observed.R.shape[1]
    if flat.shape[1] != n:
        raise ValueError(f"approximations have {flat.shape[1]} entries; {target.layer.name} has {n} inputs")
    finite = flat.isfinite().all(1)
    return flat[finite] if finite.any() else None


def _chunks(count: int, b: int) -> list[int]:
    most = max(1, CHUNK_BYTES // (8 * b * b))
    return [min(most, count - start) for start in range(0, count, most)]
