"""Walks through sets of rows of L that test kernels without computing one: pivots of a tableau, as in a simplex.

A chain holds a basis A of b rows of L and k further rows H, with T such that L_h = sum_j T[j, h] L_{A_j}. As G = L Q,
the same holds for every column of G. Where all rows of A but j and j' vanish in column i, a row h that vanishes there
too has T[j, h] G_{A_j, i} = -T[j', h] G_{A_j', i}: two such rows h, h' have the same ratio T[:, h] / T[:, h'] at j and
at j'. Then the kernel of the b - 1 rows A - j - j' + h is q_i, and it vanishes on h'. So b divisions test the kernels
of C(b, 2) sets of b - 1 rows on one row held out, and ratios that agree are equal integers once cut to 16 bits.
A pivot swaps A_j with h: O(k b) operations for C(b-1, 2) new sets per row of H. All chains of a chunk pivot on the
same (j, h), no restriction as their rows are in random order, and lie side by side in memory: each step is a few
operations on long contiguous slices.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.published.view import Observed

HELD = 12  # rows k that are held out
PAIRS = 3  # pairs (h, h') among them that are compared after a pivot
AGREEING = 3  # rows, of those held out, that must vanish before a kernel is computed
MANTISSA = 23  # bits of a float32


@dataclass
class Tableau:
    """c chains, changed by pivots: entries T (b, k, c), the rows of L in the basis (b, c) and those held out (k, c)."""

    entries: Float[Tensor, "b k c"]
    basis: Int[Tensor, "b c"]
    held: Int[Tensor, "k c"]


@dataclass(frozen=True)
class Walk:
    """What a walk came by: the number of `kernels` tested, and sets of b - 1 `rows` of L whose kernel is promising."""

    kernels: int
    rows: Int[Tensor, "h c"]


def reference_basis(L: Float[Tensor, "m b"], *, generator: torch.Generator) -> Int[Tensor, " b"]:
    """A random, well-conditioned set of b rows: the pivots of an LU factorisation of L, rotated at random."""
    mixed = L @ torch.randn(L.shape[1], L.shape[1], dtype=L.dtype, generator=generator)
    rows = list(range(len(L)))
    for place, other in enumerate(torch.linalg.lu_factor(mixed)[1].tolist()):
        rows[place], rows[other - 1] = rows[other - 1], rows[place]
    return torch.tensor(rows[: L.shape[1]])


def draw_pools(
    observed: Observed,
    rest: Int[Tensor, " r"],
    size: int,
    chains: int,
    *,
    share: float,
    generator: torch.Generator,
) -> Int[Tensor, "size c"]:
    """`size` different rows for each chain, out of the rows `rest`.

    Pools are cut from random permutations. With a `share` under 1 a permutation has only that share of the rows, those
    most likely to vanish together in some column: a row of L, itself drawn at random, is a mixture of the v of the
    samples that activate its neuron, and near the v of the largest; of that v as of the mixture, B v is lowest there.
    """
    width = max(size, int(share * len(rest)))
    pools = width // size
    groups = -(-chains // pools)
    order = torch.rand(groups, width, generator=generator).argsort(dim=1, stable=True)
    if share < 1:
        guesses = observed.signed(observed.L[torch.randint(len(observed.L), (groups,), generator=generator)])
        lowest = (guesses @ observed.B[rest].mT).topk(width, largest=False).indices
        order = lowest.gather(1, order)
    return rest[order[:, : pools * size].reshape(-1, size)[:chains].mT]


def start_chains(
    observed: Observed,
    chains: int,
    *,
    share: float,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> Tableau:
    """Chains on a common random basis, each with a pool of b + k other rows held out (fewer where L has fewer)."""
    L, (m, b) = observed.L, observed.L.shape
    basis = reference_basis(L, generator=generator)
    rest = torch.ones(m, dtype=torch.bool).index_fill(0, basis, False).nonzero()[:, 0]
    pools = draw_pools(observed, rest, min(b + HELD, m - b), chains, share=share, generator=generator).to(device)
    coordinates = torch.linalg.solve(L[basis].mT, L.mT).to(device, dtype)
    entries = coordinates[:, pools.flatten()].unflatten(1, pools.shape)
    return Tableau(entries, basis[:, None].repeat(1, chains).to(device, torch.int32), pools.int())


def join(tableaus: list[Tableau]) -> Tableau:
    """The chains of several tableaus side by side."""
    if len(tableaus) == 1:
        return tableaus[0]
    parts = zip(*((t.entries, t.basis, t.held) for t in tableaus), strict=True)
    return Tableau(*(torch.cat(part, -1) for part in parts))


def exchange_bases(tableau: Tableau) -> Tableau:
    """Swap the common basis, row by row, for rows of each chain's pool, and drop it: k rows stay held out."""
    size = len(tableau.held)
    for column in range(size - min(HELD, size)):
        pivot(tableau, column, 0)
        tableau = Tableau(tableau.entries[:, 1:], tableau.basis, tableau.held[1:])
    return Tableau(tableau.entries.contiguous(), tableau.basis, tableau.held.clone())


def pivot(tableau: Tableau, column: int, row: int) -> Bool[Tensor, " c"]:
    """Swap one row of the basis with one that is held out, in place; chains whose pivot is near zero sit still.

    Solving for the row that leaves gives T' = T - (t_h + e_h) (t_j - e_j)^T / T[j, h], with t_h the coefficients of the
    row that enters and t_j those at the one that leaves: the special cases of the pivot's own row and column are in the
    unit vectors. Returns which chains moved.
    """
    T = tableau.entries
    enters, leaves = T[:, row].clone(), T[column].clone()
    inverse = enters[column].reciprocal()
    moved = inverse.abs() < torch.finfo(T.dtype).eps ** -0.25
    enters[column] -= 1
    leaves[row] += 1
    leaves *= inverse.where(moved, 0)
    T.addcmul_(enters[:, None], leaves[None], value=-1)
    swap = (tableau.held[row] - tableau.basis[column]) * moved
    tableau.basis[column] += swap
    tableau.held[row] -= swap
    return moved


def walk(tableau: Tableau, steps: int, *, tolerance: float) -> Walk:
    """Pivot `steps` times; after each, compare the ratios of a few pairs of held-out rows, not the row just swapped.

    `tolerance` is the relative size under which entries of G count as zero. Each pair (h, h') tests a kernel for every
    two columns, and C(b-1, 2) of these are new after a pivot: those with the column it was on were there before.
    """
    b, k, c = tableau.entries.shape
    compare = Comparison(b, min(PAIRS, k // 2), c, _shift(tolerance, tableau.entries.dtype), tableau.entries.device)
    rows, moves = 2 * compare.pairs, torch.zeros(c, dtype=torch.int64, device=tableau.entries.device)
    seen, found = [], []
    for step in range(steps):
        row = (step + step // b) % k
        moves += pivot(tableau, step % b, row)
        first = 0 if row >= rows else k - rows
        chains = compare.chains(tableau.entries[:, first : first + rows])
        seen.append(_snapshot(tableau, chains, first))
        if step == steps - 1 or sum(t.basis.shape[1] for t in seen) > c:  # often, under a tolerance that lets much pass
            found.append(promising(join(seen), compare.pairs, compare.shift))
            seen = []
    return Walk(int(moves.sum()) * math.comb(b - 1, 2) * compare.pairs, torch.cat(found).cpu().unique(dim=0))


def _shift(tolerance: float, dtype: torch.dtype) -> int:
    """Low bits of a float32 ratio to ignore, so that equal ratios agree: a basis amplifies the noise of its rows."""
    noise = 100 * max(tolerance, 10 * torch.finfo(dtype).eps)
    return min(max(MANTISSA - 16, MANTISSA + math.ceil(math.log2(noise))), MANTISSA - 4)


def _snapshot(tableau: Tableau, chains: Int[Tensor, " f"], first: int) -> Tableau:
    """A copy of some chains, their held-out rows turned such that those compared come first."""
    entries = tableau.entries[:, :, chains].roll(-first, 1)
    return Tableau(entries, tableau.basis[:, chains], tableau.held[:, chains].roll(-first, 0))


class Comparison:
    """Finds chains in which two of the b ratios T[:, h] / T[:, h'] agree for any pair (h, h'), and owns the buffers.

    The ratio at j is compared with those at j + 1, ..., j + b // 2 (cyclically), all at once.
    """

    def __init__(self, b: int, pairs: int, chains: int, shift: int, device: torch.device):
        self.pairs, self.shift = pairs, shift
        self.codes = torch.empty(2 * b, pairs, chains, dtype=torch.int16, device=device)
        self.equal = torch.empty(b // 2, b, pairs, chains, dtype=torch.int16, device=device)

    def chains(self, rows: Float[Tensor, "b p c"]) -> Int[Tensor, " f"]:
        """The chains with a coincidence; row h is compared with row h + pairs, p = 2 pairs."""
        b = len(rows)
        self.codes[:b] = codes(rows, self.shift)
        self.codes[b:] = self.codes[:b]
        torch.eq(self.codes[:b], windows(self.codes), out=self.equal)
        packed = self.equal.view(torch.int64).flatten(0, 2)  # four counters in a word
        return packed.sum(0).view(torch.int16).nonzero()[:, 0]


def codes(rows: Float[Tensor, "b p f"], shift: int) -> Int[Tensor, "b p//2 f"]:
    """The ratio of row h to row h + p / 2 for each h as an integer: 16 bits of its float32 above the lowest `shift`."""
    first, second = rows.chunk(2, 1)
    return (first / second).float().view(torch.int32).bitwise_right_shift_(shift).short()


def windows(codes: Int[Tensor, "b2 pairs c"]) -> Int[Tensor, "b2//4 b2//2 pairs c"]:
    """A view with codes[j + d] at (d - 1, j), d up to b // 2, of the codes of b columns that are stored twice."""
    twice, pairs, c = codes.shape
    return codes.as_strided((twice // 4, twice // 2, pairs, c), (pairs * c, pairs * c, c, 1), pairs * c)


def promising(seen: Tableau, pairs: int, shift: int) -> Int[Tensor, "h k"]:
    """Sets of b - 1 rows of L, one per chain at most, whose kernel vanishes on enough of the rows held out.

    Each chain has a coincidence, as like as not by accident: the two columns must agree on further rows.
    """
    b, k, _ = seen.entries.shape
    chain, j, other, h = _coincidences(seen.entries[:, : 2 * pairs], shift)
    x, y = seen.entries[j, :, chain], seen.entries[other, :, chain]
    left, right = x * y.gather(1, h[:, None]), y * x.gather(1, h[:, None])
    vanishing = (left - right).abs() < 2.0 ** (shift + 1 - MANTISSA) * (left.abs() + right.abs())
    vanishing.scatter_(1, h[:, None], True)
    good = (vanishing.sum(1) >= min(AGREEING, k)).nonzero()[:, 0]
    good = good[_firsts(chain[good])]
    stays = torch.ones(len(good), b, dtype=torch.bool, device=good.device)
    stays.scatter_(1, torch.stack([j[good], other[good]], 1), False)
    core = seen.basis[:, chain[good]].mT[stays].view(-1, b - 2)
    rows = torch.cat([core, seen.held[h[good], chain[good]][:, None]], 1)
    return rows.sort(1).values.long()


def _coincidences(rows: Float[Tensor, "b p f"], shift: int) -> tuple[Int[Tensor, " q"], ...]:
    """Chain, two columns and first row of every pair of rows in which exactly two ratios agree."""
    b, f = len(rows), rows.shape[2]
    code = codes(rows, shift)
    equal = (code == windows(torch.cat([code, code]))).flatten(0, 1).flatten(1)
    place = torch.arange(len(equal), device=rows.device)
    distance, column = place // b + 1, place % b
    once = ((2 * distance < b) | (column < distance)).float()  # at distance b / 2 a pair is met from either side
    count, distance, column = (torch.stack([once, once * distance, once * column]) @ equal.float()).long()
    single = (count == 1).nonzero()[:, 0]
    return single % f, column[single], (column + distance)[single] % b, single // f


def _firsts(index: Int[Tensor, " p"]) -> Int[Tensor, " q"]:
    """Positions at which a value occurs for the first time."""
    order = index.argsort(stable=True)
    value = index[order]
    first = torch.ones_like(value, dtype=torch.bool)
    first[1:] = value[1:] != value[:-1]
    return order[first]
