"""All columns of Q by descent: starts, a search that leads each towards a column, a polish, and deflation.

Where sampling draws rows until b - 1 of them vanish together, the methods here move whole directions. They differ in
the search (`spear.descent.dictionary`, `spear.descent.layer`) and share this loop. Directions are rows: `q` (h, b).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.directions import distinct, unit_rows
from spear.published import filtering, sparsity
from spear.published.filtering import CROWD, thresholds
from spear.published.greedy import Candidates, choose
from spear.published.view import Observed
from spear.reconstruction import Terms

SMALL = 0.3  # times the root mean square of L q: an entry this small may be a zero
TRIM = 0.72  # share of the small entries that the polish trusts: the smallest
ROUNDS = 8  # of the polish: by then the trusted share is a fifth of the first
SHRINK = 0.8  # factor by which that share falls in each round: not all that is small is zero
LOOSE = 2  # times the tolerance: what counts as zero in the last polish
REST = 0.1  # times the tolerance: entries of L q that move by less, at the last polish, are at rest
RIDGE = 1e-13  # keeps the Gram matrix of rows with a kernel positive definite
CONVERGING = 0.5  # factor by which a round of the polish must bring the residual down, from the third on
SPARE = 3  # zeros that a column must have beyond b - 1 (or the polish could make them)
ALIKE = 0.95  # |cosine| of two search results that lead to the same column
LEAST_STARTS = 16
CURIOSITY = 1.2  # factor by which the promise of a search that waits grows in each round
HOPE = 0.1  # columns that a round counts for where it found none: one failure is no proof
Search = Callable[[Float[Tensor, "f b"], int, int, torch.Generator], Float[Tensor, "k b"]]


@dataclass(frozen=True)
class Lengths:
    """The steps that a search may take, `shortest` to `longest`: `factor` times as many where few starts succeed.

    `few` and `many` are shares of the starts of a round, each of a search's ends counting for those that led to it.
    A round has as many starts as columns are left, at most `starts`: fewer, and what they find confines others sooner.
    After `idle` rounds in a row of the longest search without a new column there is no hope.
    """

    shortest: int
    longest: int
    factor: int = 3
    few: float = 0.5
    many: float = 0.95
    starts: int = 64
    idle: int = 10

    def next(self, steps: int, success: float) -> int:
        """Longer if that can pay, shorter if it is not needed; `success`: the share of starts that led to a column."""
        if success < self.few:
            return min(steps * self.factor, self.longest)
        return max(steps // self.factor, self.shortest) if success > self.many else steps


@dataclass(frozen=True)
class Arm:
    """A search, the steps it takes at present, the rounds it had, and the new columns that a start and step brings.

    The last round counts for half of that `gain`, the one before for a quarter, and so on; one without a new column
    for all of it, so that another search has its turn.
    """

    search: Search
    steps: int
    rounds: int = 0
    gain: float = math.inf
    waited: int = 0

    @property
    def promise(self) -> float:
        """Its gain, and more for every round that it has waited."""
        return self.gain * CURIOSITY**self.waited


def collect(
    observed: Observed,
    searches: Sequence[Search],
    lengths: Lengths,
    terms: Terms,
    *,
    name: str = "descent",
    goal: float | int = 1,
) -> Candidates:
    """Directions, round by round, until they explain the layer (lambda = `goal`), or hope or the budget is gone.

    A search leads a number of starts of its own towards columns, given those that are known, that number, and a number
    of steps. What it finds is polished and tested; every column found confines the rest. Of several searches the one
    that lately brought most takes the next round. `proposals` counts starts; `name` is the method that is told of.
    """
    observed = observed.alive()
    b = observed.L.shape[1]
    generator = terms.generator()
    least = thresholds(observed, sparsity.FALSE_REJECTION)[1]
    q, basis, matching = choose(observed, observed.L.new_zeros(0, b), least, last=1)
    ways, starts, rounds, idle, spent = [Arm(search, lengths.shortest) for search in searches], 0, 0, 0, ""
    while matching < goal and not (spent := terms.budget.spent(starts)):
        known = q[basis] if len(basis) < b else q[:0]
        count = min(lengths.starts, max(LEAST_STARTS, b - len(known)))
        way = max(ways, key=lambda w: (w.promise, -w.rounds))
        ends = way.search(known, count, way.steps, generator)
        new, hits = settle(observed, ends, least)
        before, reached, q = len(q), (len(basis), matching), torch.cat([q, new])
        q = q[different(q, observed.tolerance)][: CROWD * b]
        starts, rounds = starts + count, rounds + 1
        if len(q) > before:
            q, basis, matching = choose(observed, q, least, last=1)
        stuck = way.steps == lengths.longest or len(basis) == b
        idle = 0 if (len(basis), matching) > reached else idle + stuck
        gain = max(len(basis) - reached[0], HOPE) / (count * way.steps)
        if len(basis) > reached[0] and not math.isinf(way.gain):
            gain = (way.gain + gain) / 2
        ways = _judged(ways, way, lengths.next(way.steps, hits / count), gain)
        terms.report(name, len(basis), b, starts)
        if idle == lengths.idle and matching < goal:
            spent = f"{idle} rounds of {lengths.longest:,} steps found no further column"
            break
    return Candidates(q, basis, matching, starts, rounds, spent)


def _judged(ways: Sequence[Arm], used: Arm, steps: int, gain: float) -> list[Arm]:
    """The ways after a round of one of them: that one with its gain, the others have waited for one round more."""
    after = Arm(used.search, steps, used.rounds + 1, gain)
    return [after if w is used else replace(w, waited=w.waited + 1) for w in ways]


def different(q: Float[Tensor, "h b"], tolerance: float) -> Int[Tensor, " k"]:
    """Indices of the first of every group of directions that noise of that size could have made of one."""
    return distinct(q, min(filtering.SAME_DIRECTION, 1 - tolerance))


def draw(
    observed: Observed, free: Float[Tensor, "b r"], count: int, generator: torch.Generator
) -> Float[Tensor, "k b"]:
    """Starts: random rows of L in the space of the columns of V that are left, with the sign that V has.

    Row j of L is sum_i G_ji v_i: a mixture of the samples that activate neuron j. As V^T d = 1, the sign is known.
    """
    rows = torch.randint(len(observed.L), (count,), generator=generator).to(observed.L.device)
    v = (observed.L[rows] @ free) @ free.mT
    noise = torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device) @ free @ free.mT
    size = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    v = torch.where(size > 1e-9, v, noise)  # the row of a neuron that only known samples activate is zero
    return unit_rows(observed.signed(v))


def settle(observed: Observed, ends: Float[Tensor, "k b"], least: int) -> tuple[Float[Tensor, "j b"], int]:
    """The columns that search results lead to, polished and tested, and the number of results that led to one."""
    L, tolerance = observed.L, observed.tolerance
    ends = ends[torch.linalg.vector_norm(ends, dim=1) > 0]  # known columns may leave nothing of a start
    first, group = groups(ends.to(L.dtype))
    q, exact = polish(L, first, tolerance=tolerance)
    exact &= filtering.sparsity_filter(L, q, least, tolerance=tolerance)
    sure = exact.clone()
    sure[exact] = filtering.determined(L, q[exact], tolerance=tolerance)
    parts, whole = polish(L, separate(observed, q[exact & ~sure], least), tolerance=tolerance)
    parts = parts[whole & filtering.sparsity_filter(L, parts, least, tolerance=tolerance)]
    parts = parts[filtering.determined(L, parts, tolerance=tolerance)]
    return torch.cat([q[sure], parts]), int(sure[group].sum())


def separate(observed: Observed, q: Float[Tensor, "h b"], least: int) -> Float[Tensor, "k b"]:
    """The columns behind mixtures of two: the sparsest vectors in the plane that a mixture's shared zeros leave.

    A mixture vanishes where both columns do and, by its ratio, on one row more, which alone carries the rank. Without
    that row both columns are in the kernel, and each is where many rows of L vanish at the same angle.
    """
    L, tolerance = observed.L, observed.tolerance
    zero = filtering.zero_rows(L, q, tolerance=tolerance)
    zero &= filtering.leverage(L, zero) <= filtering.FULL_LEVERAGE
    values, vectors = torch.linalg.eigh(filtering.gram(L, zero))
    found = [q[:0]]
    for spectrum, plane in zip(values, vectors[:, :, :2], strict=True):
        if len(spectrum) > 2 and spectrum[1] < RIDGE * 1e3 + tolerance**2 < spectrum[2]:
            found.append(_common_angles(L @ plane, least, tolerance) @ plane.mT)
    return torch.cat(found)


def _common_angles(C: Float[Tensor, "m 2"], least: int, tolerance: float) -> Float[Tensor, "k 2"]:
    """Unit vectors w at which several rows of C w vanish, and `least` with those that vanish everywhere."""
    size = torch.linalg.vector_norm(C, dim=1)
    live = C[size > tolerance * size.max()]
    turn = torch.atan2(-live[:, 0], live[:, 1]).remainder(math.pi).sort().values
    apart = torch.cat([turn[:1] < 0, turn.diff() > LOOSE * tolerance])
    count = apart.cumsum(0).bincount()
    start = torch.cat([count[:1] * 0, count.cumsum(0)[:-1]])
    enough = (count >= SPARE) & (count + len(C) - len(live) >= least)
    value = turn[start + count // 2][enough]
    return torch.stack([value.cos(), value.sin()], 1)


def groups(q: Float[Tensor, "k b"]) -> tuple[Float[Tensor, "g b"], Tensor]:
    """The first of every group of directions that are alike, and the group of each (`distinct` tells no groups)."""
    alike = (q @ q.mT).abs() > ALIKE
    first = (~alike).long().cumprod(1).sum(1)  # those before it are not
    leaders, group = first.unique(return_inverse=True)
    return q[leaders], group


def polish(
    L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], *, tolerance: float = 1e-9
) -> tuple[Float[Tensor, "h b"], Bool[Tensor, " h"]]:
    """Each direction from its smallest rows: the vector that they annihilate best, by inverse iteration; repeated.

    Returns unit directions, and whether their rows vanish to `tolerance` times the largest entry: those are solved
    from all rows that do, until they rest. Trusted rows that nearly leave a plane fix a direction badly, and show it.
    """
    q, residual, chunk = unit_rows(q), torch.full_like(q[:, 0], math.inf), max(1, 2**24 // L.numel())
    going = torch.ones_like(residual, dtype=torch.bool)
    for k in range(ROUNDS):
        for part in going.nonzero()[:, 0].split(chunk):
            r, before = (q[part] @ L.mT).abs(), residual[part]
            small = (r < SMALL * r.square().mean(1, keepdim=True).sqrt()).sum(1)
            count = (TRIM * SHRINK**k * small).long()
            q[part], residual[part] = smallest_rows(L, q[part], count)
            going[part] = (residual[part] > tolerance) & ((residual[part] < CONVERGING * before) | (k < 2))
    exact = residual <= tolerance
    for part in exact.nonzero()[:, 0].split(chunk):
        r, rounds = q[part] @ L.mT, 0
        while len(part) and rounds < ROUNDS:
            size = r.abs().amax(1, keepdim=True)
            q[part] = smallest_rows(L, q[part], (r.abs() <= LOOSE * tolerance * size).sum(1))[0]
            before, r, rounds = r, q[part] @ L.mT, rounds + 1
            moved = ((r - before).abs() > REST * tolerance * size).any(1)
            part, r = part[moved], r[moved]
    return q, exact


def smallest_rows(
    L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], count: Int[Tensor, " h"]
) -> tuple[Float[Tensor, "h b"], Float[Tensor, " h"]]:
    """The unit vector that the `count` smallest rows of L q annihilate best, and what is left, relative to max |L q|.

    Two steps of inverse iteration on the rows' Gram matrix, which squares their condition; one step of refinement takes
    that back.
    """
    if not len(q):
        return q, q[:, 0]
    m, b = L.shape
    count = count.clamp(min(m, b + SPARE), m).tolist()
    order = (q @ L.mT).abs().argsort(1)
    rows = [L[smallest[:k]] for smallest, k in zip(order, count, strict=True)]
    gram = torch.stack([A.mT @ A for A in rows])
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    factor = torch.linalg.cholesky(gram)
    q = q[:, :, None]
    for _ in range(2):
        q = unit_rows(torch.cholesky_solve(q, factor).mT).mT
    left = torch.stack([A.mT @ (A @ x) for A, x in zip(rows, q, strict=True)])
    step = torch.cholesky_solve(left, factor)
    q = unit_rows((q - (step - q * (q.mT @ step))).mT).mT
    left = torch.stack([(A @ x).abs().max() for A, x in zip(rows, q, strict=True)])
    return q[:, :, 0], left / (q[:, :, 0] @ L.mT).abs().amax(1)
