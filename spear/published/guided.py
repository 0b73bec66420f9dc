"""Sampling where it is likely to hit: rows of L that a guess of a sample's pre-activations puts far below zero.

SPEAR combined with a prior (its large-batch experiment): an approximate image x gives approximate pre-activations
W x + beta; the rows where these are lowest most surely vanish in that sample's column of G, and b - 1 of them that all
do have q_i for their kernel. A hit is exact, however blurred the image was: errors matter through the *choice* of rows.

In the coordinates of `Observed` a guess is a column v of V = Q^-T, with pre-activations B v. Two things sharpen it.
Only its part in the row space of the gradient enters. And V^T Q = 1: a sample that is not solved has a v orthogonal to
all q that are, so that each one found removes a part of every guess's error. A row of L is a guess too, and needs no
prior: near initialisation q_i and v_i are nearly parallel, and samples that activate a neuron lend it their q.
"""

from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.published import filtering, theory
from spear.published.algorithm import Sampling, find_columns
from spear.published.filtering import merge, thresholds
from spear.published.greedy import Candidates, choose
from spear.published.kernels import Proposals, distinct, kernels_lu, refine
from spear.published.view import Observed
from spear.reconstruction import Terms

ROUND = 1000  # proposals of a round
IDLE = 30  # rounds without a new direction after which guesses are given up
REACH = 1e9  # proposals up to which uniform sampling goes on from there
BLUR = 0.5  # standard deviation of the share of a second row of L that is mixed into a guess
FOCUS = 8  # how strongly draws favour the lowest pre-activations: 0 would be half of all rows alike
CHUNK_BYTES = 2**27  # of submatrices in work at once


@dataclass(frozen=True)
class Guided:
    """Sampling where guesses point: `approximate` inputs (k, *input_shape) near some of the samples, or rows of L.

    The other options are those of `Sampling`, which goes on where guesses lead nowhere.
    """

    name: ClassVar[str] = "guided"
    stands_noise: ClassVar[bool] = False
    approximate: Float[Tensor, "k *input_shape"] | None = None
    false_rejection: float = 1e-9
    executor: Executor | None = None

    def search(self, observed: Observed, terms: Terms, device: str | torch.device | None = None) -> Candidates:
        """All columns of Q (`find_columns_guided`)."""
        return find_columns_guided(observed, terms, self, device)


def find_columns_guided(
    observed: Observed, terms: Terms, options: Guided = Guided(), device: str | torch.device | None = None
) -> Candidates:
    """All columns of Q by rounds of guided proposals, filtered and chosen from as in `spear.published.algorithm`.

    After `IDLE` rounds without a new direction sampling goes on uniformly, where that is within `REACH` at all: a bad
    guess costs time and nothing else. Raises `ValueError` for approximations of another size than the layer's inputs.
    """
    found = _guided(observed, _finite(observed, options.approximate), terms, options)
    m, b = observed.L.shape
    if found.matching == 1 or found.spent or theory.expected_proposals(theory.half_rates(m, b)) > REACH:
        return found if found.spent else replace(found, spent=f"{IDLE} rounds of guesses found nothing new")
    rest = None if terms.budget.proposals is None else terms.budget.proposals - found.proposals
    left = replace(terms, budget=replace(terms.budget, proposals=rest))
    last = find_columns(observed, left, Sampling(options.false_rejection, options.executor), device)
    return replace(last, proposals=found.proposals + last.proposals, rounds=found.rounds + last.rounds)


def _guided(observed: Observed, approximate: Float[Tensor, "k n"] | None, terms: Terms, options: Guided) -> Candidates:
    """Rounds of guided proposals until lambda = 1, the budget is spent or guesses lead nowhere."""
    observed = observed.alive()
    generator = terms.generator()
    pool = None if approximate is None else guesses(observed, approximate)
    threshold, b = thresholds(observed, options.false_rejection)[0], observed.L.shape[1]
    q, basis, matching = choose(observed, observed.L.new_zeros(0, b), threshold)
    proposals, rounds, idle, spent = 0, 0, 0, ""
    while matching < 1 and idle < IDLE and not (spent := terms.budget.spent(proposals)):
        found = propose(observed, pool, q[basis], ROUND, threshold=threshold, generator=generator)
        proposals, rounds, before = proposals + found.count, rounds + 1, len(q)
        q = merge(observed, q, found.directions, threshold)
        idle = 0 if len(q) > before else idle + 1
        if not idle:
            q, basis, matching = choose(observed, q, threshold)
        terms.report(options.name, len(basis), b, proposals)
    return Candidates(q, basis, matching, proposals, rounds, spent)


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
        kernels = kernels_lu(L[draw_rows(v @ observed.B.mT, L.shape[1] - 1, generator=generator)])
        kept.append(kernels[filtering.sparsity_filter(L, kernels, threshold, tolerance=tolerance)])
        hits += len(kept[-1])
    q = refine(L, distinct(L, torch.cat(kept), tolerance), tolerance=tolerance)
    return Proposals(count, hits, q, filtering.zero_rows(L, q, tolerance=tolerance).sum(1))


def draw_rows(
    Z: Float[Tensor, "p m"], size: int, *, focus: float | int = FOCUS, generator: torch.Generator
) -> Int[Tensor, "p size"]:
    """For each row of pre-activations, `size` different neurons among its lowest: uniform among the K lowest.

    K is drawn anew each time, between `size` and half of the neurons: size + (m / 2 - size) u^focus, u uniform.
    """
    count, m = Z.shape
    u = torch.rand(count, 1, generator=generator, dtype=Z.dtype).to(Z.device)
    most = (size + max(0.0, m / 2 - size) * u**focus).ceil()
    highest = Z.sort(dim=1).values.gather(1, most.long() - 1)
    lot = torch.rand(count, m, generator=generator, dtype=Z.dtype).to(Z.device)
    return torch.where(highest >= Z, lot, 2).topk(size, largest=False).indices


def _draw_guesses(
    observed: Observed, pool: Float[Tensor, "k b"] | None, count: int, generator: torch.Generator
) -> Float[Tensor, "count b"]:
    """Rows of L, or of the pool, each with a random share of another row of L; with the sign that 1 = <d, v> asks."""
    L = observed.L / torch.linalg.vector_norm(observed.L, dim=1, keepdim=True).clamp_min(1e-300)
    own = L if pool is None else pool
    first, second = (
        source[torch.randint(len(source), (count,), generator=generator).to(L.device)] for source in (own, L)
    )
    if pool is not None:
        first[::2] = L[torch.randint(len(L), (len(first[::2]),), generator=generator).to(L.device)]
    share = BLUR * torch.randn(count, 1, generator=generator, dtype=L.dtype).to(L.device)
    return observed.signed(first + share * second)


def _away_from(found: Float[Tensor, "f b"], v: Float[Tensor, "p b"]) -> Float[Tensor, "p b"]:
    basis = torch.linalg.qr(found.mT)[0]
    return v - v @ basis @ basis.mT


def _finite(observed: Observed, approximate: Float[Tensor, "k *input_shape"] | None) -> Float[Tensor, "f n"] | None:
    """The approximations that are finite numbers, as rows; `None` where there are none."""
    if approximate is None or not len(approximate):
        return None
    flat, n = approximate.detach().flatten(1).to(observed.R), observed.R.shape[1]
    if flat.shape[1] != n:
        raise ValueError(f"approximations have {flat.shape[1]} entries; the layer has {n} inputs")
    finite = flat.isfinite().all(1)
    return flat[finite] if finite.any() else None


def _chunks(count: int, b: int) -> list[int]:
    most = max(1, CHUNK_BYTES // (8 * b * b))
    return [min(most, count - start) for start in range(0, count, most)]
