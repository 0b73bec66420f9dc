"""Filtering: which directions have the zeros of a column of Q, are fixed by them, and are not there yet.

Directions are rows here: `q` (h, b) holds h candidates for columns of the disaggregation matrix Q, each up to a factor.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.directions import distinct, unit_rows
from spear.published import sparsity
from spear.published.sparsity import zero_pattern
from spear.published.view import Observed

SAME_DIRECTION = 1 - 1e-6  # |cosine| of two polished directions that are one; images apart differ by far more
FULL_LEVERAGE = 1 - 1e-6  # share of the rank that only a row carries without which it is lost
CROWD = 8  # candidates for each column that are kept: noise lets false ones through in numbers
AT_ONCE = 2**20  # entries of gathered rows: more is slower, by what caches hold
FEWEST_ZEROS = 0.15  # share of a layer's rows: networks that were trained leave down to 0.21 of them zero


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
    return distinct(q, SAME_DIRECTION)


def determined(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], *, tolerance: float = 1e-7) -> Bool[Tensor, " h"]:
    """Which directions are fixed by their zero rows, none of these rows being indispensable.

    Where the masks of two samples overlap, a mixture of their columns vanishes on many rows, and on one more by the
    choice of its ratio: that row alone carries the rank b-1 of the zero rows (leverage 1). In a column of Q with zeros
    to spare none does.
    """
    zero, q = zero_rows(L, q, tolerance=tolerance), unit_rows(q)
    if L.shape[1] == 1 or not len(q):
        return torch.ones_like(zero[:, 0])
    floor, chunk = max(1e-9, (3 * tolerance) ** 2), max(1, AT_ONCE // L.numel())
    parts = zip(zero.split(chunk), q.split(chunk), strict=True)
    return torch.cat([_determined(L, rows, kernel, floor) for rows, kernel in parts])


def _determined(
    L: Float[Tensor, "m b"], zero: Bool[Tensor, "h m"], q: Float[Tensor, "h b"], floor: float
) -> Bool[Tensor, " h"]:
    """The same of directions whose zero rows are held at once, those of each filled up with zeros to equal number."""
    order = zero.byte().argsort(1, descending=True)[:, : int(zero.sum(1).max())]
    A = torch.cat([L, torch.zeros_like(L[:1])])[torch.where(zero.gather(1, order), order, len(L))]
    own = A.mT @ A
    size = own.diagonal(dim1=1, dim2=2).amax(1)
    factor, failed = torch.linalg.cholesky_ex(own + (size[:, None] * q)[:, :, None] * q[:, None])  # q is the kernel
    whole = failed == 0
    inverse = torch.cholesky_inverse(torch.where(whole[:, None, None], factor, torch.eye(L.shape[1]).to(factor)))
    sure = whole & (((A @ inverse) * A).sum(2) <= FULL_LEVERAGE).all(1)
    # the second eigenvalue, the kernel's being the first, is to be above `floor` times the largest: Frobenius norms
    # bound the largest over the second; where that is too much, as under noise, the eigenvalues decide
    doubtful = torch.linalg.matrix_norm(inverse) * torch.linalg.matrix_norm(own) * floor >= 1
    asked = (sure & doubtful).nonzero()[:, 0]
    values = torch.linalg.eigvalsh(own[asked])
    return sure.index_put((asked,), values[:, 1] > floor * values[:, -1])


def leverage(L: Float[Tensor, "m b"], rows: Bool[Tensor, "h m"]) -> Float[Tensor, "h m"]:
    """How much of the rank of the rows A each of them carries, l (A^T A)^+ l^T, where A has a kernel; 0 elsewhere."""
    values, vectors = torch.linalg.eigh(gram(L, rows))
    spread = vectors[:, :, 1:] / values[:, None, 1:].clamp_min(1e-300).sqrt()
    return ((L @ spread) ** 2).sum(2) * rows


def gram(L: Float[Tensor, "m b"], rows: Bool[Tensor, "h m"]) -> Float[Tensor, "h b b"]:
    """L_A^T L_A for every set of rows A: by products of L's columns where there are more sets than these."""
    if len(rows) < L.shape[1]:
        parts = [L[part] for part in rows]
        return torch.stack([part.mT @ part for part in parts]) if parts else L.new_zeros(0, *2 * L.shape[1:])
    products = (L[:, :, None] * L[:, None, :]).flatten(1)
    return (rows.to(L.dtype) @ products).unflatten(1, (L.shape[1], L.shape[1]))


def thresholds(observed: Observed, false_rejection: float) -> tuple[int, int]:
    """How many zeros to ask of a direction: as many as at initialisation, and as few as a trained network leaves.

    A neuron that no sample activates is a zero of every direction, true or false: `observed` is to be without those.
    """
    m, b = observed.L.shape
    least = b + 2
    usual = max(least, sparsity.threshold(m, false_rejection=false_rejection))
    return usual, max(least, min(usual, 2 * b, round(FEWEST_ZEROS * m)))


def merge(
    observed: Observed, q: Float[Tensor, "h b"], new: Float[Tensor, "k b"], threshold: int
) -> Float[Tensor, "j b"]:
    """The candidates q and those of the `new` directions that are sparse enough, determined, and not there yet."""
    if not len(new):
        return q
    new = new[sparsity_filter(observed.L, new, threshold, tolerance=observed.tolerance)]
    new = new[determined(observed.L, new, tolerance=observed.tolerance)]
    both = torch.cat([q, new])
    both = both[deduplicate(both)]
    if len(both) <= CROWD * both.shape[1]:
        return both
    zeros = zero_rows(observed.L, both, tolerance=observed.tolerance).sum(1)
    return both[zeros.argsort(descending=True, stable=True)[: CROWD * both.shape[1]]]
