"""From near a column to the column: which rows vanish, by L q and by the signs of z at once.

A row of a column of G is either zero, where z < 0, or of any size, where z > 0. Near a column both L q and z are known
with an error, and together tell the one from the other far better than |L q| alone: expectation maximisation of a
mixture of a narrow and a wide normal density, whose weights are the chances that z, read with its error, is negative.
What such rows annihilate best is the lowest eigenvector of their Gram matrix, which no round forms: Lanczos' method
takes a few products with L, of all directions at once. Vectors are rows: q (k, b) of unit length, z (k, m) of root mean
square 1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import distinct, unit_rows

VISITS = 20  # rounds of the maximisation
NARROWING = 0.65  # of the narrow density, in each round beyond what its rows say
DOUBT = 0.2  # standard deviation of the error of z
LEAST = 1e-3  # width of the narrow density, in root mean squares of L q: what single precision tells
ARRIVED = 0.005  # the same at a column, at most: most come to the least; elsewhere it is 0.006 and more
PATIENCE, STALLED = 2, 0.9  # rounds that must bring the width down by that factor, from the fourth on
ALIKE = 0.8  # |cosine| of directions that are near one column
KRYLOV = 12  # products with the Gram matrix in a round
EXHAUSTED = 1e-5  # length of the next of Lanczos' vectors, of an image's, from which it is rounding


def sharpen(
    L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], z: Float[Tensor, "k m"]
) -> tuple[Float[Tensor, "k b"], Float[Tensor, " k"]]:
    """Each direction as the vector that the rows which vanish annihilate best, and what is left of these rows.

    That is the width of the narrow density, relative to the root mean square of L q. A round takes two products of
    (k, m, b) for each of the `KRYLOV`; a direction stops where rounding begins, or where the width no longer falls.
    """
    root, widths = math.sqrt(len(L)), []
    odds = torch.special.log_ndtr(-z / DOUBT) - torch.special.log_ndtr(z / DOUBT)
    r = root * q @ L.mT
    zero = (r.abs() < -z / 2).to(r)
    narrow = _spread(zero, r).clamp(LEAST, 0.5)
    ends, left, going = q.clone(), narrow[:, 0].clone(), torch.arange(len(q), device=q.device)
    for visit in range(VISITS):
        wide = torch.maximum(_spread(1 - zero, r), 2 * narrow)
        zero = torch.sigmoid(odds[going] - (r / narrow).square() / 2 + (r / wide).square() / 2 + (wide / narrow).log())
        weight = zero + (1 - zero) * (narrow / wide).square()
        q = lowest(L, weight, q)
        r = root * q @ L.mT
        narrow = (NARROWING * _spread(zero, r)).clamp_min(LEAST)
        ends[going], left[going] = q, narrow[:, 0]
        widths = [*widths[-PATIENCE:], left.clone()]
        falling = (visit <= PATIENCE) | (widths[-1] < STALLED * widths[0])[going]
        on = ((narrow[:, 0] > LEAST) & falling).nonzero()[:, 0]  # the only wait for the device in a round
        going, q, r, zero, narrow = going[on], q[on], r[on], zero[on], narrow[on]
        if not len(going):
            break
    return ends, left


def lowest(L: Float[Tensor, "m b"], weight: Float[Tensor, "k m"], q: Float[Tensor, "k b"]) -> Float[Tensor, "k b"]:
    """Of each, the lowest Ritz vector of A = L^T diag(weight) L in the Krylov space q, A q, A^2 q, ... (Lanczos 1950).

    L is orthonormal and weights are at most 1, and so are the eigenvalues.
    """
    basis, images, alive = q[:, None], [], [torch.ones_like(q[:, 0])]
    for number in range(size := min(KRYLOV, q.shape[1])):
        images.append((weight * (basis[:, -1] @ L.mT)) @ L)
        if number < size - 1:
            rest = images[-1][:, :, None]
            for _ in range(2):  # rounding leaves much of the others in the first remainder
                rest = rest - basis.mT @ (basis @ rest)
            alive.append((torch.linalg.vector_norm(rest[:, :, 0], dim=1) > EXHAUSTED).to(q))
            basis = torch.cat([basis, unit_rows(rest.mT) * alive[-1][:, None, None]], 1)
    inner = basis @ torch.stack(images, 2)
    above = 2 * (1 - torch.stack(alive, 1)).diag_embed()  # all eigenvalues, where there is no vector
    vectors = torch.linalg.eigh((inner + inner.mT) / 2 + above)[1]
    return unit_rows((vectors[:, :, :1].mT @ basis)[:, 0])


def columns_near(
    L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], z: Float[Tensor, "k m"], *, tolerance: float
) -> Float[Tensor, "j b"]:
    """The columns that directions are near: of directions that are alike, the sparsest is tried.

    `tolerance` is the size of noise in an entry of L q.
    """
    order = (q @ L.mT).abs().sum(1).argsort()
    one = order[distinct(q[order], ALIKE)]
    sharp, left = sharpen(L, q[one], z[one])
    return sharp[left < max(ARRIVED, 2 * tolerance)]


def _spread(weight: Float[Tensor, "k m"], r: Float[Tensor, "k m"]) -> Float[Tensor, "k 1"]:
    """Root mean square of r under the weights."""
    return ((weight * r.square()).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)).sqrt()
