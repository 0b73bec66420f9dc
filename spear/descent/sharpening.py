"""From near a column to the column: which rows vanish, by L q and by the signs of z at once.

A row of a column of G is either zero, where z < 0, or of any size, where z > 0. Near a column both L q and z are known
with an error, and together tell the one from the other far better than |L q| alone: expectation maximisation of a
mixture of a narrow and a wide normal density, whose weights are the chances that z, read with its error, is negative.
Vectors are rows: q (k, b) of unit length, z (k, m) of root mean square 1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import distinct, unit_rows

VISITS = 9  # rounds of the maximisation
NARROWING = 0.6  # of the narrow density, in each round beyond what its rows say
DOUBT = 0.2  # standard deviation of the error of z
LEAST = 1e-3  # width of the narrow density, in root mean squares of L q: what single precision tells
ARRIVED = 0.01  # the same at a column, at most; elsewhere it is 0.02 and more
PATIENCE, HOPEFUL = 4, 2  # rounds after which a direction goes on only if it is within so many times that
ALIKE = 0.8  # |cosine| of directions that are near one column
BLOCK = 8  # directions at a time, the most promising first, until a block leads to no column
RIDGE = 1e-6  # relative to the mean eigenvalue: single precision
INVERSE_STEPS = 3  # of inverse iteration in each round


def sharpen(
    L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], z: Float[Tensor, "k m"], *, enough: float = ARRIVED
) -> tuple[Float[Tensor, "k b"], Float[Tensor, " k"]]:
    """Each direction as the vector that the rows which vanish annihilate best, and what is left of these rows.

    That is the width of the narrow density, relative to the root mean square of L q. A round takes the product of two
    (m, b) matrices and a Cholesky factor of b for each direction that is still on its way: one stops where rounding
    begins, or if `PATIENCE` rounds did not bring it near what is `enough`.
    """
    root = math.sqrt(len(L))
    odds = torch.special.log_ndtr(-z / DOUBT) - torch.special.log_ndtr(z / DOUBT)
    r = root * q @ L.mT
    zero = (r.abs() < -z / 2).to(r)
    narrow = _spread(zero, r).clamp(LEAST, 0.5)
    ends, left, going = q.clone(), narrow[:, 0].clone(), torch.arange(len(q), device=q.device)
    for visit in range(VISITS):
        wide = torch.maximum(_spread(1 - zero, r), 2 * narrow)
        zero = torch.sigmoid(odds[going] - (r / narrow).square() / 2 + (r / wide).square() / 2 + (wide / narrow).log())
        weight = zero + (1 - zero) * (narrow / wide).square()
        gram = L.mT @ (weight[:, :, None] * L)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(1, keepdim=True)
        factor = torch.linalg.cholesky_ex(gram)[0]
        for _ in range(INVERSE_STEPS):
            q = unit_rows(torch.cholesky_solve(q[:, :, None], factor)[:, :, 0])
        r = root * q @ L.mT
        narrow = (NARROWING * _spread(zero, r)).clamp_min(LEAST)
        ends[going], left[going] = q, narrow[:, 0]
        on = (narrow[:, 0] > LEAST) & ((narrow[:, 0] < HOPEFUL * enough) | (visit + 1 < PATIENCE))
        on = on.nonzero()[:, 0]  # the only wait for the device in a round
        going, q, r, zero, narrow = going[on], q[on], r[on], zero[on], narrow[on]
        if not len(going):
            break
    return ends, left


def columns_near(
    L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], z: Float[Tensor, "k m"], *, tolerance: float
) -> Float[Tensor, "j b"]:
    """The columns that directions are near, tried in blocks, the sparsest first, until a block leads to none.

    Of directions that are alike the sparsest is tried. `tolerance` is the size of noise in an entry of L q.
    """
    order = (q @ L.mT).abs().sum(1).argsort()
    order, found = order[distinct(q[order], ALIKE)], [q[:0]]
    for block in order.split(BLOCK):
        enough = max(ARRIVED, 2 * tolerance)
        sharp, left = sharpen(L, q[block], z[block], enough=enough)
        arrived = left < enough
        found.append(sharp[arrived])
        if not len(found[-1]):
            break
    return torch.cat(found)


def _spread(weight: Float[Tensor, "k m"], r: Float[Tensor, "k m"]) -> Float[Tensor, "k 1"]:
    """Root mean square of r under the weights."""
    return ((weight * r.square()).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)).sqrt()
