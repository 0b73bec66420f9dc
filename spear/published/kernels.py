"""Kernels of random sets of b - 1 rows of L: the textbook sampler, and the steps that all samplers share.

Directions are rows here: `q` (h, b) holds h unit vectors, each a candidate for a column of Q.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear import directions
from spear.directions import unit_rows, zero_entries

SAME_DIRECTION = 1 - 1e-7  # |cosine| of two directions that are one kernel, met twice
LOOSE = 30  # times the tolerance: the zeros that a direction may have before it is polished
MOST = 4096  # directions that a round keeps
CANDIDATES = 64  # directions that are polished or compared at once


@dataclass(frozen=True)
class Proposals:
    """What sampling came by: `count` kernels tested, `hits` sets of rows that have a sparse one, and these directions.

    `directions` (h, b) are float64 unit vectors with `zeros` (h,) zeros in L q.
    """

    count: int
    hits: int
    directions: Float[Tensor, "h b"]
    zeros: Int[Tensor, " h"]


def sample_rows(
    count: int,
    width: int,
    size: int,
    *,
    generator: torch.Generator | None = None,
    device: str | torch.device | None = None,
) -> Int[Tensor, "count size"]:
    """`count` sets of `size` different rows out of `width`, each uniform, in random order.

    Drawn on the device of the generator, and returned on `device`. Raises `ValueError` for a size above the width.
    """
    if size > width:
        raise ValueError(f"cannot draw {size} different rows out of {width}")
    drawn_on = None if generator is None else generator.device
    return torch.rand(count, width, generator=generator, device=drawn_on).topk(size).indices.to(device or "cpu")


def kernels_svd(submatrices: Float[Tensor, "p c b"]) -> Float[Tensor, "p b"]:
    """The unit kernel vector of each matrix, by singular value decomposition: the textbook form."""
    return torch.linalg.svd(submatrices, full_matrices=True)[2][:, -1]


def kernels_lu(submatrices: Float[Tensor, "p c b"]) -> Float[Tensor, "p b"]:
    """The unit kernel vector of each matrix, by a linear system that sets its last coordinate to 1.

    Where that coordinate is nearly zero, or the matrix lacks rank, `kernels_svd` takes over.
    """
    head, tail = submatrices[:, :, :-1], submatrices[:, :, -1:]
    solution = torch.linalg.solve_ex(head, -tail)[0][:, :, 0]
    q = unit_rows(torch.cat([solution, solution.new_ones(len(solution), 1)], 1))
    weak = ~(q[:, -1].abs() > 1e-4)
    q[weak] = kernels_svd(submatrices[weak])
    return q


def block_kernels(blocks: Float[Tensor, "p b b"]) -> Float[Tensor, "p b b"]:
    """The b kernels of each block by one inversion: row j is the unit kernel of the block without its row j.

    Rows that are not finite belong to singular blocks.
    """
    return unit_rows(torch.linalg.inv_ex(blocks)[0].mT)


def naive(
    L: Float[Tensor, "m b"],
    proposals: int,
    *,
    threshold: int,
    generator: torch.Generator | None = None,
    kernels: Callable[[Float[Tensor, "p c b"]], Float[Tensor, "p b"]] = kernels_svd,
    tolerance: float = 1e-7,
    chunk: int = 10_000,
) -> Proposals:
    """The published sampler: draw b - 1 rows, compute their kernel q, keep it if L q has at least `threshold` zeros.

    `chunk` proposals are evaluated in parallel. Every hit is returned, repetitions included, in the order drawn.
    """
    m, b = L.shape
    kept = []
    for start in range(0, proposals, chunk):
        rows = sample_rows(min(chunk, proposals - start), m, b - 1, generator=generator, device=L.device)
        kept.append(sparse(L, kernels(L[rows]), threshold, tolerance))
    q = torch.cat([L.new_zeros(0, b), *kept])
    return Proposals(proposals, len(q), q.double(), zeros(L, q, tolerance).sum(1))


def refine(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], *, tolerance: float = 1e-7) -> Float[Tensor, "h b"]:
    """Each direction to machine precision: the smallest right singular vector of L restricted to the zero rows of L q.

    The result does not depend on the submatrix that q came from. The rows that are zero under a multiple of the
    tolerance fix a first estimate, its zero rows the second. A direction with fewer than b - 1 zeros stays as it is.
    """
    for factor in (LOOSE, 1):
        q = torch.cat([q[:0], *(_polish(L, part, factor * tolerance) for part in q.split(CANDIDATES))])
    return q


def _polish(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], tolerance: float) -> Float[Tensor, "h b"]:
    zero = zeros(L, q, tolerance)
    triangle = torch.linalg.qr(zero[:, :, None] * L, mode="r")[1]  # a row of zeros changes no singular vector
    smallest = torch.linalg.svd(triangle, full_matrices=True)[2][:, -1]
    return smallest.where(zero.sum(1, keepdim=True) >= max(1, L.shape[1] - 1), q)


def distinct(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], tolerance: float) -> Float[Tensor, "k b"]:
    """The unit directions that differ by more than sign, of each group the one with most zeros in L q.

    Of more than `MOST`, the sparsest: noise lets false directions through in numbers.
    """
    q = q[zeros(L, q, tolerance).sum(1).argsort(descending=True, stable=True)]
    kept = q[:0]
    for part in q.split(CANDIDATES):
        kept = torch.cat([kept, part[directions.distinct(part, SAME_DIRECTION, known=kept)]])[:MOST]
    return kept


def zeros(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], tolerance: float) -> Bool[Tensor, "h m"]:
    return zero_entries(q @ L.mT, tolerance)


def sparse(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], threshold: int, tolerance: float) -> Float[Tensor, "k b"]:
    """The sparsity filter, in chunks of directions."""
    parts = q.split(max(1, 2**23 // len(L)))
    return torch.cat([part[zeros(L, part, tolerance).sum(1) >= threshold] for part in parts])
