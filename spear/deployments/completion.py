"""Pruned gradients: the entries that arrived determine the others, since the gradient of a layer has a batch's rank.

A gradient J (m, n) of rank b has b (m + n - b) unknowns. Alternating least squares on the entries that arrived, one
batched system for all rows, then one for all columns (Jain, Netrapalli, Sanghavi 2013, low-rank matrix completion by
alternating minimisation), from rank 1 upwards: while the rank is too small, the residual stalls and another direction
is taken from it; at the batch's rank it falls to rounding. Rows and columns of which fewer entries than that arrived
stay out. What is sent because it is large (top-k) can be completed like what is sent by chance: the entries that do
arrive are exact, and the smallest rank that fits them all has no freedom left.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from spear.accuracy import Accuracy

SPARE = 4  # entries of a row or column beyond the rank
STALLED = 0.9  # a residual that falls by less in one step has settled
GAP = 8.0  # ratio of successive singular values past which the further ones are left over from the growth
HELD_OUT = 0.02  # share of the entries that take no part, and tell whether the others were completed rightly
LEAST = 3  # entries held out that can confirm anything
FIRM = 3e-2  # least pivot of normal equations, of at most 1, that do not amplify rounding by more than some hundreds
SPREADS = 10  # turns of rows and columns at most
CONFIRMED = 1e3  # times the tolerance: the residual of entries held out up to which they were
WIDE = 2.0  # columns per row from which a random part of them, as many as there are rows, shows the column space
CHUNK = 2**24  # entries of the normal equations that are held at once
STEPS = 200  # of a factorisation: at the rank of a batch it settles within some dozens
RIDGE = 1e-13  # of the largest product: keeps normal equations of a few entries positive definite
FAR = 0.1  # residual above which most of the rank is still missing: then it grows by a quarter, else by a tenth
OVERSAMPLED, PASSES = 4, 3  # directions beyond those wanted, and passes, of the subspace iteration
FREEDOM = 0.9  # unknowns over entries up to which a rank is thought to be determined
NEARLY_ALL = 0.9  # share of the entries that the core must hold, to stand for them all
EXACT = Accuracy.of_dtype(torch.float64).completed


@dataclass(frozen=True)
class Completed:
    """A completed gradient `J` of rank `rank`, zero outside the `rows` (m,) and `columns` (n,) that are determined.

    `held_out` is the relative residual of entries that arrived but took no part, `exact` whether it is rounding.
    """

    J: Float[Tensor, "m n"]
    rank: int
    rows: Bool[Tensor, " m"]
    columns: Bool[Tensor, " n"]
    held_out: float
    exact: bool


def core(kept: Bool[Tensor, "m n"], rank: int) -> tuple[Bool[Tensor, " m"], Bool[Tensor, " n"]]:
    """The largest set of rows and columns with at least rank + SPARE entries of each among the others."""
    rows, columns = (torch.ones(size, dtype=torch.bool, device=kept.device) for size in kept.shape)
    while True:
        enough = (kept[:, columns].sum(1) >= rank + SPARE) & rows
        wide = (kept[enough].sum(0) >= rank + SPARE) & columns
        if torch.equal(enough, rows) and torch.equal(wide, columns):
            return rows, columns
        rows, columns = enough, wide


def masked_least_squares(
    A: Float[Tensor, "m r"], J: Float[Tensor, "m c"], kept: Float[Tensor, "m c"]
) -> tuple[Float[Tensor, "r c"], Float[Tensor, " c"]]:
    """Column by column the least squares of A x = J on the rows that `kept` marks with 1; and each one's least pivot.

    By normal equations, columns in chunks, with one step of iterative refinement; A has orthonormal columns.
    """
    rank = A.shape[1]
    i, k = torch.triu_indices(rank, rank, device=A.device)
    pairs, parts, pivots = A[:, i] * A[:, k], [], []
    for columns in torch.arange(J.shape[1], device=A.device).split(max(1, CHUNK // rank**2)):
        weight, right = kept[:, columns], J[:, columns]
        packed = weight.T @ pairs
        gram = packed.new_empty(len(columns), rank, rank)
        gram[:, i, k] = gram[:, k, i] = packed
        gram.diagonal(dim1=1, dim2=2).add_(RIDGE * packed.abs().amax(1, keepdim=True) + 1e-300)
        factor = torch.linalg.cholesky(gram)
        x = torch.zeros_like(right[:rank])
        for _ in range(2):
            rest = A.T @ (weight * (right - A @ x))
            x = x + torch.cholesky_solve(rest.T[:, :, None], factor)[:, :, 0].T
        parts.append(x)
        pivots.append(factor.diagonal(dim1=1, dim2=2).amin(1))
    return torch.cat(parts, 1), torch.cat(pivots)


@dataclass
class _Growth:
    """Column and row factors Q (orthonormal) and B of a matrix, while their rank grows."""

    V: Float[Tensor, "n r"]
    least: int = 1
    before: float = float("inf")

    def step(
        self, J: Float[Tensor, "m n"], kept: Float[Tensor, "m n"]
    ) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """Q from the rows, then B from that: one round of alternating least squares."""
        Q = torch.linalg.qr(masked_least_squares(self.V, J.T, kept.T)[0].T)[0]
        return Q, masked_least_squares(Q, J, kept)[0]

    def adapt(self, rest: Float[Tensor, "m n"], B: Float[Tensor, "r n"], residual: float, most: int) -> None:
        """Prepare the next step: fewer directions past a gap, more where the residual has settled."""
        _, s, rows = torch.linalg.svd(B, full_matrices=False)
        self.V, rank = rows.T, len(s)
        ratio = s[:-1] / s[1:].clamp_min(1e-300)
        ratio[: max(self.least - 1, rank // 2)] = 0
        if residual < FAR and rank > 1 and float(ratio.max()) > GAP:
            kept = int(ratio.argmax()) + 1
            self.V, self.least, self.before = self.V[:, :kept], kept + 1, float("inf")
            return
        settled = residual > STALLED * self.before
        self.before = residual
        if settled and rank < most:
            more = min(max(1, rank // (4 if residual > FAR else 10)), most - rank)
            self.V = torch.linalg.qr(torch.cat([self.V, strongest(rest, more)], 1))[0]
            self.before = float("inf")


def strongest(rest: Float[Tensor, "m n"], count: int) -> Float[Tensor, "n count"]:
    """The leading right singular vectors, by subspace iteration."""
    start = torch.randn(len(rest), count + OVERSAMPLED, generator=Generator().manual_seed(0), dtype=rest.dtype).to(
        rest.device
    )
    for _ in range(PASSES):
        right = torch.linalg.qr(rest.T @ start)[0]
        start = torch.linalg.qr(rest @ right)[0]
    return right @ torch.linalg.svd(rest @ right, full_matrices=False)[2][:count].T


def factorise(
    J: Float[Tensor, "m n"],
    kept: Bool[Tensor, "m n"],
    *,
    most: int,
    tolerance: float,
    until: float = math.inf,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """Factors of J from the entries `kept`, of the least rank up to `most` at which the residual does not settle.

    Steps end when the clock (`time.monotonic`) shows `until`.
    """
    weight = kept.to(J)
    sent = weight * J
    growth = _Growth(strongest(sent, 1))
    for _ in range(STEPS):
        Q, B = growth.step(sent, weight)
        rest = weight * (sent - Q @ B)
        residual = float(rest.norm() / sent.norm())
        if residual < tolerance and residual > growth.before / 2:  # rounding: no further
            break
        if time.monotonic() > until:
            break
        growth.adapt(rest, B, residual, most)
    return Q, B


def most_rank(kept: Bool[Tensor, "m n"]) -> int:
    """The largest rank whose unknowns, r (m + n - r), are a tenth fewer than the entries of live rows and columns."""
    m, n, entries = int(kept.any(1).sum()), int(kept.any(0).sum()), int(kept.sum())
    ranks = torch.arange(min(m, n))
    return int(((ranks * (m + n - ranks)) < FREEDOM * entries).sum()) - 1


def complete(
    J: Float[Tensor, "m n"],
    kept: Bool[Tensor, "m n"],
    *,
    most: int | None = None,
    tolerance: float = EXACT,
    until: float = math.inf,
    generator: Generator,
) -> Completed:
    """The whole gradient from the entries `kept`; its rank, at most `most`, is found.

    `tolerance` is the residual of an exact completion, `until` when to stop on the clock `time.monotonic`. A wide
    gradient is completed on some of its columns first. Raises `ValueError` where nothing arrived.
    """
    if not (kept & (J != 0)).any():
        raise ValueError("the gradient has rank 0: it is zero everywhere")
    taking_part = kept & (torch.rand(kept.shape, generator=generator).to(J.device) >= HELD_OUT)
    parts, (m, n) = [kept.any(0)], J.shape
    if n > WIDE * m:
        some = parts[0] & (torch.rand(n, generator=generator).to(J.device) < m / n)
        parts = [some, *parts] if most_rank(kept[:, some]) >= (most or 1) else parts
    for columns in parts:
        rank = max(1, min(most_rank(kept[:, columns]), most or min(J.shape)))
        solve = partial(factorise, most=rank, tolerance=tolerance, until=until)
        part = _core_part(J, kept, taking_part, columns, rank, until, solve)
        held_out = part.off(kept & ~taking_part)
        if held_out < CONFIRMED * tolerance:
            part = part.spread(until)
            return part.completed(held_out, exact=bool(part.rows.any()))
    return part.completed(held_out, exact=False)


def _core_part(
    J: Float[Tensor, "m n"],
    kept: Bool[Tensor, "m n"],
    taking_part: Bool[Tensor, "m n"],
    columns: Bool[Tensor, " n"],
    most: int,
    until: float,
    solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> "_Part":
    """The factors of the rows and `columns` that have enough entries for the rank found, which is `most` at most."""
    allowed = kept & columns
    rows, columns = core(allowed, most)
    if not kept[rows][:, columns].sum() > NEARLY_ALL * allowed.sum():
        rows, columns = allowed.any(1), allowed.any(0)
    while True:
        last = time.monotonic() > until
        factors = solve(J[rows][:, columns], taking_part[rows][:, columns])
        inner = core(allowed, len(factors[1]))
        fewer = rows & inner[0], columns & inner[1]
        if last or not fewer[0].any() or (torch.equal(fewer[0], rows) and torch.equal(fewer[1], columns)):
            return _Part(J, kept.to(J), rows, columns, *factors)
        rows, columns = fewer


@dataclass(frozen=True)
class _Part:
    """Factors of the rows and columns of J that are determined: Q and B have a row, a column for each of them."""

    J: Float[Tensor, "m n"]
    kept: Float[Tensor, "m n"]
    rows: Bool[Tensor, " m"]
    columns: Bool[Tensor, " n"]
    Q: Float[Tensor, "k r"]
    B: Float[Tensor, "r l"]

    def spread(self, until: float) -> "_Part":
        """With every row and column that is determined by those that are, in turn, until the clock shows `until`."""
        part = self.firm()
        for _ in range(SPREADS):
            if min(part.rows.sum(), part.columns.sum()) < len(part.B):
                return part.nowhere()
            columns, B = _determined(part.Q, part.J[part.rows], part.kept[part.rows])
            if columns.sum() < len(B):
                return part.nowhere()
            V = torch.linalg.qr(B.T)[0]
            rows, A = _determined(V, part.J[:, columns].T, part.kept[:, columns].T)
            if rows.sum() < len(B):
                return part.nowhere()
            Q, triangle = torch.linalg.qr(A.T)
            before, part = part, replace(part, rows=rows, columns=columns, Q=Q, B=triangle @ V.T)
            same = torch.equal(before.rows, rows) and torch.equal(before.columns, columns)
            if same or time.monotonic() > until:
                break
        return part

    def firm(self) -> "_Part":
        """Without rows and columns that the entries bind weakly: a small residual says little about them."""
        V, there = torch.linalg.qr(self.B.T)[0], self.kept[self.rows][:, self.columns]
        wanted = self.J[self.rows][:, self.columns]
        first = masked_least_squares(V, wanted.T, there.T)[1] > FIRM
        second = masked_least_squares(self.Q, wanted, there)[1] > FIRM
        rows, columns = self.rows.clone(), self.columns.clone()
        rows[self.rows], columns[self.columns] = first, second
        if min(first.sum(), second.sum()) < len(self.B):
            return self.nowhere()
        Q, triangle = torch.linalg.qr(self.Q[first])
        return replace(self, rows=rows, columns=columns, Q=Q, B=triangle @ self.B[:, second])

    def nowhere(self) -> "_Part":
        """Without any row or column."""
        none = torch.zeros_like(self.rows), torch.zeros_like(self.columns)
        return replace(self, rows=none[0], columns=none[1], Q=self.Q[:0], B=self.B[:, :0])

    def completed(self, held_out: float, *, exact: bool) -> Completed:
        """The whole gradient, zero where it is not determined."""
        whole = torch.zeros_like(self.J)
        whole[self.rows[:, None] & self.columns] = (self.Q @ self.B).flatten()
        return Completed(whole, len(self.B), self.rows, self.columns, held_out, exact)

    def off(self, entries: Bool[Tensor, "m n"]) -> float:
        """The relative residual of those of the entries that are determined; infinite where they are too few."""
        there = entries[self.rows][:, self.columns]
        if there.sum() < LEAST:
            return float("inf")
        wanted = self.J[self.rows][:, self.columns]
        return float(((self.Q @ self.B - wanted) * there).norm() / (wanted * there).norm().clamp_min(1e-300))


def _determined(
    A: Float[Tensor, "m r"], J: Float[Tensor, "m n"], kept: Float[Tensor, "m n"]
) -> tuple[Bool[Tensor, " n"], Float[Tensor, "r k"]]:
    """Which columns of A x = J the entries determine without amplifying their rounding, and the solutions for those."""
    enough = kept.sum(0) >= A.shape[1] + SPARE
    x, pivot = masked_least_squares(A, J[:, enough], kept[:, enough])
    firm = pivot > FIRM
    columns = enough.clone()
    columns[enough] = firm
    return columns, x[:, firm]
