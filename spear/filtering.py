"""From sampled directions to the batch: filter, de-duplicate, reject mixtures, choose greedily, recover the scales.

Directions are rows here: `q` (h, b) holds h candidates for columns of the disaggregation matrix Q, each up to a factor.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.sparsity import zero_pattern

SAME_DIRECTION = 1 - 1e-6
FULL_LEVERAGE = 1 - 1e-6
CHUNK = 256
MOST_ENTRIES = 2**24  # of the copies of L that are held at once


@dataclass(frozen=True)
class Observed:
    """What the server sees of one layer, in the coordinates of its gradient's column space.

    G = L Q for the unknown Q (b, b), X^T = Q^-1 R and Z = B Q^-T with B = W R^T + beta d^T. `d` = L^T dL/dbeta = Q 1
    fixes the scale of every column; it is `None` where the layer has no bias, and each column of Q stays free up to a
    positive factor. An entry of a column of G counts as zero under `tolerance` times the column's largest entry.
    """

    L: Float[Tensor, "m b"]
    R: Float[Tensor, "b n"]
    B: Float[Tensor, "m b"]
    d: Float[Tensor, " b"] | None
    tolerance: float = 1e-7

    def alive(self) -> "Observed":
        """The same without the neurons that no sample activates: they are zeros of every direction, true or false."""
        norms = torch.linalg.vector_norm(self.L, dim=1)
        live = norms > self.tolerance * norms.max()
        return replace(self, L=self.L[live], B=self.B[live])


def zero_rows(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], *, tolerance: float = 1e-7) -> Bool[Tensor, "h m"]:
    """Which entries of L q are zero, relative to the largest one of each direction."""
    return zero_pattern(L @ q.mT, tolerance=tolerance).mT


def sparsity_filter(
    L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], threshold: int, *, tolerance: float = 1e-7
) -> Bool[Tensor, " h"]:
    """Keep directions with at least `threshold` zeros in L q (SPEAR, filtering by sparsity)."""
    return zero_rows(L, q, tolerance=tolerance).sum(1) >= threshold


def deduplicate(q: Float[Tensor, "h b"]) -> Int[Tensor, " k"]:
    """Indices of the first of every group of unit directions that are equal up to sign."""
    same = (q @ q.mT).abs() > SAME_DIRECTION
    return (~same.tril(-1).any(1)).nonzero()[:, 0]


def determined(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], *, tolerance: float = 1e-7) -> Bool[Tensor, " h"]:
    """Which directions are fixed by their zero rows, none of these rows being indispensable.

    Where the masks of two samples overlap, a mixture of their columns vanishes on many rows, and on one more by the
    choice of its ratio: that row alone carries the rank b-1 of the zero rows (leverage 1). In a column of Q with zeros
    to spare none does.
    """
    zero = zero_rows(L, q, tolerance=tolerance)
    if L.shape[1] == 1:
        return torch.ones_like(zero[:, 0])
    values, vectors = torch.linalg.eigh(gram(L, zero))
    floor = max(1e-9, (3 * tolerance) ** 2) * values[:, -1]
    return (values[:, 1] > floor) & (_leverage(L, zero, values, vectors).amax(1) <= FULL_LEVERAGE)


def leverage(L: Float[Tensor, "m b"], rows: Bool[Tensor, "h m"]) -> Float[Tensor, "h m"]:
    """How much of the rank of the rows A each of them carries, l (A^T A)^+ l^T, where A has a kernel; 0 elsewhere."""
    return _leverage(L, rows, *torch.linalg.eigh(gram(L, rows)))


def _leverage(
    L: Float[Tensor, "m b"], rows: Bool[Tensor, "h m"], values: Float[Tensor, "h b"], vectors: Float[Tensor, "h b b"]
) -> Float[Tensor, "h m"]:
    spread = vectors[:, :, 1:] / values[:, None, 1:].clamp_min(1e-300).sqrt()
    return ((L @ spread) ** 2).sum(2) * rows


def gram(L: Float[Tensor, "m b"], rows: Bool[Tensor, "h m"]) -> Float[Tensor, "h b b"]:
    """L_A^T L_A for every set of rows A: by products of L's columns where there are more sets than these."""
    if len(rows) < L.shape[1]:
        parts = rows.split(max(1, MOST_ENTRIES // L.numel()))
        return torch.cat([L.mT @ (part[:, :, None] * L) for part in parts])
    products = (L[:, :, None] * L[:, None, :]).flatten(1)
    return (rows.to(L.dtype) @ products).unflatten(1, (L.shape[1], L.shape[1]))


def greedy_basis(q: Float[Tensor, "h b"], zeros: Int[Tensor, " h"]) -> Int[Tensor, " k"]:
    """Indices of a basis: directions by decreasing number of zeros, each taken if independent of those before it.

    k = b where the candidates span R^b, less otherwise (SPEAR, the first greedy stage).
    """
    rest, chosen = q.clone(), []
    for index in zeros.argsort(descending=True, stable=True).tolist():
        norm = torch.linalg.vector_norm(rest[index])
        if norm > 1e-6 and len(chosen) < q.shape[1]:
            unit = rest[index] / norm
            for _ in range(2):  # twice is enough, for orthogonality to rounding
                rest = rest - (rest @ unit)[:, None] * unit
            chosen.append(index)
    return torch.tensor(chosen, dtype=torch.long, device=q.device)


def recover_scales(observed: Observed, q: Float[Tensor, "b b"]) -> Float[Tensor, " b"]:
    """The factors c of the columns, Q = Qbar diag(c), from the bias gradient (SPEAR, recovering the scales).

    As dL/dbeta = G 1 and G = L Qbar diag(c), Qbar c = d. Without a bias the factors are those that give the columns of
    X unit length, with the sign under which Z > 0 agrees better with the zero pattern of G.
    """
    V = torch.linalg.inv(q)
    if observed.d is not None:
        return V.mT @ observed.d
    active = ~zero_rows(observed.L, q, tolerance=observed.tolerance).mT
    agreement = ((observed.B @ V > 0) == active).to(q.dtype).mean(0)
    return torch.linalg.vector_norm(observed.R.mT @ V, dim=0) * torch.where(agreement < 0.5, -1, 1)


def disaggregate(observed: Observed, q: Float[Tensor, "b b"]) -> tuple[Float[Tensor, "m b"], Float[Tensor, "n b"]]:
    """G = L Q and X with X^T = Q^-1 R, from the directions of all columns (SPEAR, disaggregation)."""
    Q = q.mT * recover_scales(observed, q)
    return observed.L @ Q, torch.linalg.solve(Q, observed.R).mT


def matching_coefficient(observed: Observed, q: Float[Tensor, "*p b b"]) -> Float[Tensor, "*p"]:
    """lambda: the share of the m b entries in which Z > 0 agrees with G != 0; 1 at the truth (SPEAR).

    Leading dimensions of `q` are alternatives, compared in one batch; a singular set of directions counts as 0.
    """
    V = torch.linalg.inv_ex(q)[0].nan_to_num(0, 0, 0)
    active = ~zero_rows(observed.L, q.flatten(0, -2), tolerance=observed.tolerance).unflatten(0, q.shape[:-1]).mT
    if observed.d is None:
        agreement = ((observed.B @ V > 0) == active).to(q.dtype).mean(-2)
        return torch.maximum(agreement, 1 - agreement).mean(-1)
    Z = observed.B @ V * torch.sign(observed.d @ V)[..., None, :]
    return ((Z > 0) == active).to(q.dtype).mean((-2, -1))


def second_stage(
    observed: Observed, q: Float[Tensor, "h b"], basis: Int[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], float]:
    """Swap single directions of a basis against unused candidates while lambda grows (SPEAR, the second greedy stage).

    Returns the indices of the best set and its lambda; stops at lambda = 1. Each sweep tries all b (h - b) swaps in
    batches.
    """
    best = float(matching_coefficient(observed, q[basis]))
    while best < 1 and len(q) > len(basis):
        trials = _swaps(basis, len(q))
        value = torch.cat([matching_coefficient(observed, q[part]) for part in trials.split(CHUNK)])
        if float(value.max()) <= best:
            break
        basis, best = trials[value.argmax()], float(value.max())
    return basis, best


def _swaps(basis: Int[Tensor, " b"], count: int) -> Int[Tensor, "s b"]:
    """The basis with one of its b indices replaced by one of the other `count` - b, in every way."""
    index = torch.arange(count, device=basis.device)
    unused = index[~torch.isin(index, basis)]
    place, other = torch.meshgrid(index[: len(basis)], unused, indexing="ij")
    trials = basis.repeat(place.numel(), 1)
    return trials.scatter(1, place.reshape(-1, 1), other.reshape(-1, 1))


def last_columns(observed: Observed, q: Float[Tensor, "f b"]) -> Float[Tensor, "k b"]:
    """The last one or two columns of Q, without sampling: q holds the b-1 or b-2 others.

    The columns of V = Q^-T that are missing are orthogonal to every q that is known. With one missing it is that
    direction; with two, v = N w turns in a plane, and the signs of z = B v change at no more than 2m angles. Each sign
    pattern tells which rows of G are zero, and so its kernel: those that have one are returned (unit rows), to be
    filtered like any other candidate.
    """
    N = torch.linalg.qr(q.mT, mode="complete")[0][:, len(q) :]
    w = q.new_tensor([[1.0], [-1.0]]) if N.shape[1] == 1 else _directions(observed.B @ N)
    v = w @ N.mT
    if observed.d is not None:
        v = v[v @ observed.d > 0]
    kept = [_kernels(observed, part @ observed.B.mT <= 0) for part in v.split(CHUNK)]
    return torch.cat(kept)


def _directions(C: Float[Tensor, "m 2"]) -> Float[Tensor, "k 2"]:
    """One unit vector w inside each of the arcs of the circle on which the signs of C w are constant."""
    turn = torch.atan2(-C[:, 0], C[:, 1]).remainder(math.pi).sort().values
    turn = torch.cat([turn, turn + math.pi])
    middle = (turn + torch.cat([turn[1:], turn[:1] + 2 * math.pi])) / 2
    return torch.stack([middle.cos(), middle.sin()], 1)


def _kernels(observed: Observed, zero: Bool[Tensor, "k m"]) -> Float[Tensor, "h b"]:
    """The kernel vectors of the rows of L that are set in `zero`, for the sets that have a kernel."""
    values, vectors = torch.linalg.eigh(gram(observed.L, zero))  # of all rows: the identity
    return vectors[values[:, 0] <= max(1e-12, observed.tolerance**2)][:, :, 0]
