"""Sampling: kernels of random sets of b - 1 rows of L, kept where L q has many zeros (SPEAR, Section 3.2, Algorithm 1).

The textbook form (`naive`), the kernels of whole blocks of rows by one inversion (`block_kernels`), and walks that test
kernels without computing them (`spear.tableau`). Work comes in rounds, independent of each other and of where they run.
Directions are rows here: `q` (h, b) holds h unit vectors, each a candidate for a column of Q.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear import parallel, tableau

SAME_DIRECTION = 1 - 1e-7
LOOSE = 30  # times the tolerance: the zeros that a direction may have before it is polished
BLOCKS_UP_TO = 12  # largest b at which inverting blocks finds all columns before walks do
BLOCKS = 1024  # blocks of a round
MOST = 4096  # directions that a round keeps
CANDIDATES = 64  # directions that are polished or compared at once
HELD_OUT = 12  # rows on which the kernels of blocks are tested first
CHAIN_MEMORY = 2**23  # bytes that the chains of a round keep busy: what a cache holds
STEPS = 64  # pivots of each chain in a round
AHEAD = 64  # rounds that an executor is given before their turn
SHARES = (0.45, 0.3, 1.0)  # of the rows, that pools are drawn from, in rounds 0, 1, 2, ... cyclically


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
    q = _unit(torch.cat([solution, solution.new_ones(len(solution), 1)], 1))
    weak = ~(q[:, -1].abs() > 1e-4)
    q[weak] = kernels_svd(submatrices[weak])
    return q


def block_kernels(blocks: Float[Tensor, "p b b"]) -> Float[Tensor, "p b b"]:
    """The b kernels of each block by one inversion: row j is the unit kernel of the block without its row j.

    Rows that are not finite belong to singular blocks.
    """
    return _unit(torch.linalg.inv_ex(blocks)[0].mT)


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
        kept.append(_sparse(L, kernels(L[rows]), threshold, tolerance))
    q = torch.cat([L.new_zeros(0, b), *kept])
    return Proposals(proposals, len(q), q.double(), _zeros(L, q, tolerance).sum(1))


def search(
    L: Float[Tensor, "m b"],
    *,
    threshold: int,
    seed: int = 0,
    device: str | torch.device | None = None,
    tolerance: float = 1e-7,
    limit: int | None = None,
    until: float = math.inf,
    executor: Executor | None = None,
    chunk_bytes: int = 2**30,
) -> Iterator[Proposals]:
    """Proposals of rounds 0, 1, 2, ... in this order, until the clock (`time.monotonic`) shows `until`; see `round`.

    On the CPU each of torch's threads works on one round; an `executor` computes the same rounds elsewhere, to the bit.
    On other devices several rounds are one, their number doubling up to `chunk_bytes` of memory.
    Where only `limit` kernels are asked for, fewer than walks test in a round, rounds invert blocks, one at a time.
    """
    b = L.shape[1]
    options = {"threshold": threshold, "seed": seed, "device": device, "tolerance": tolerance, "limit": limit}
    work = functools.partial(_rounds_from, L.detach(), **options)
    if executor is not None or _device(L, device).type == "cpu":
        ahead = 1 if _few(b, limit) else AHEAD if executor else torch.get_num_threads()
        yield from parallel.in_order(work, ahead=ahead, until=until, executor=executor)
        return
    first, count = 0, 1
    while time.monotonic() < until:
        yield work(first, count)
        first, count = first + count, min(2 * count, max(1, chunk_bytes // _round_bytes(b)))


def round(
    L: Float[Tensor, "m b"],
    index: int,
    *,
    threshold: int,
    seed: int = 0,
    device: str | torch.device | None = None,
    tolerance: float = 1e-7,
) -> Proposals:
    """One round of sampling: what round number `index` of `seed` finds, wherever and beside whatever it is computed.

    Directions have at least `threshold` zeros in L q, an entry being zero under `tolerance` times the largest; they are
    polished (`refine`) and differ by more than sign. `device` (default: that of L) is where kernels are tested; what
    passes is verified in float64 on the CPU.

    Two rounds of three draw rows that vanish together more often than others; the third draws uniformly, as published.
    """
    return rounds(L, range(index, index + 1), threshold=threshold, seed=seed, device=device, tolerance=tolerance)


def rounds(
    L: Float[Tensor, "m b"],
    indices: range,
    *,
    threshold: int,
    seed: int = 0,
    device: str | torch.device | None = None,
    tolerance: float = 1e-7,
    limit: int | None = None,
) -> Proposals:
    """What `round` finds for all `indices`, without repetitions: side by side on a GPU, one by one on the CPU."""
    exact, where = L.detach().to("cpu", torch.float64), _device(L, device)
    count, hits, found = 0, 0, []
    for part in [indices[i : i + 1] for i in range(len(indices))] if where.type == "cpu" else [indices]:
        proposed, q = _propose(exact, part, seed, where, tolerance, limit)
        q = _sparse(exact, q, threshold, LOOSE * tolerance)
        polished = refine(exact, distinct(exact, q, LOOSE * tolerance), tolerance=tolerance)
        count, hits = count + proposed, hits + len(q)
        found.append(_sparse(exact, polished, threshold, tolerance))
    q = distinct(exact, torch.cat(found), tolerance)
    return Proposals(count, hits, q.to(L.device), _zeros(exact, q, tolerance).sum(1).to(L.device))


def refine(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], *, tolerance: float = 1e-7) -> Float[Tensor, "h b"]:
    """Each direction to machine precision: the smallest right singular vector of L restricted to the zero rows of L q.

    The result does not depend on the submatrix that q came from. The rows that are zero under a multiple of the
    tolerance fix a first estimate, its zero rows the second. A direction with fewer than b - 1 zeros stays as it is.
    """
    for factor in (LOOSE, 1):
        q = torch.cat([q[:0], *(_polish(L, part, factor * tolerance) for part in q.split(CANDIDATES))])
    return q


def _polish(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], tolerance: float) -> Float[Tensor, "h b"]:
    zero = _zeros(L, q, tolerance)
    triangle = torch.linalg.qr(zero[:, :, None] * L, mode="r")[1]  # a row of zeros changes no singular vector
    smallest = torch.linalg.svd(triangle, full_matrices=True)[2][:, -1]
    return smallest.where(zero.sum(1, keepdim=True) >= max(1, L.shape[1] - 1), q)


def distinct(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], tolerance: float) -> Float[Tensor, "k b"]:
    """The unit directions that differ by more than sign, of each group the one with most zeros in L q.

    Of more than `MOST`, the sparsest: noise lets false directions through in numbers.
    """
    q = q[_zeros(L, q, tolerance).sum(1).argsort(descending=True, stable=True)]
    kept = q[:0]
    for part in q.split(CANDIDATES):
        same = (part @ torch.cat([kept, part]).mT).abs() >= SAME_DIRECTION
        kept = torch.cat([kept, part[~same.tril(len(kept) - 1).any(1)]])[:MOST]
    return kept


def block_round(
    L: Float[Tensor, "m b"], *, blocks: int = BLOCKS, generator: torch.Generator, tolerance: float = 1e-7
) -> tuple[int, Float[Tensor, "h b"]]:
    """The number of kernels of a round of random blocks, and those that vanish on two of the rows held out."""
    m, b = L.shape
    few = min(HELD_OUT, (m - b) // 2)
    order = torch.randperm(m, generator=generator)
    held, others = order[:few], order[few:]
    rows = tableau.draw_pools(L, others, b, blocks, share=1.0, generator=generator)
    q = block_kernels(L[rows.mT]).flatten(0, 1)
    vanishing = (q @ L[held].mT).abs() < 100 * tolerance * L.abs().max()
    return len(q), q[(vanishing.sum(1) >= min(2, few)) & q.isfinite().all(1)]


def chain_rounds(
    L: Float[Tensor, "m b"], indices: range, *, seed: int, device: torch.device, tolerance: float = 1e-7
) -> tuple[int, Float[Tensor, "h b"]]:
    """The number of kernels that the chains of some rounds test (`spear.tableau`), and those found promising."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # there is no float64 on MPS
    started = [
        tableau.start_chains(
            L,
            _chains(L.shape[1]),
            share=SHARES[index % len(SHARES)],
            generator=_generator(seed, index),
            device=device,
            dtype=dtype,
        )
        for index in indices
    ]
    walk = tableau.walk(tableau.exchange_bases(tableau.join(started)), STEPS, tolerance=tolerance)
    return walk.kernels, kernels_lu(L[walk.rows])


def _propose(
    L: Float[Tensor, "m b"], indices: range, seed: int, device: torch.device, tolerance: float, limit: int | None
) -> tuple[int, Float[Tensor, "h b"]]:
    b, norms = L.shape[1], torch.linalg.vector_norm(L, dim=1)
    live = L[norms > tolerance * norms.max()] if b > 1 else L  # a neuron that no sample activates spoils a submatrix
    if b > BLOCKS_UP_TO and len(live) >= b + 2 and not _few(b, limit):
        return chain_rounds(live, indices, seed=seed, device=device, tolerance=tolerance)
    blocks = BLOCKS if limit is None else min(BLOCKS, -(-limit // b))
    each = [
        block_round(live, blocks=blocks, generator=_generator(seed, index), tolerance=tolerance) for index in indices
    ]
    return sum(count for count, _ in each), torch.cat([q for _, q in each])


def _rounds_from(L: Float[Tensor, "m b"], first: int, count: int = 1, **options: object) -> Proposals:
    return rounds(L, range(first, first + count), **options)


def _device(L: Tensor, device: str | torch.device | None) -> torch.device:
    return torch.device(L.device if device is None else device)


def _chains(b: int) -> int:
    """Chains of a round, a power of two: fewer where each is larger, and where few are enough."""
    return 2 ** max(7, min(11, b - 5, int(math.log2(CHAIN_MEMORY / _chain_bytes(b)))))


def _few(b: int, limit: int | None) -> bool:
    """Whether a limit on proposals is below what a round of walks tests."""
    return limit is not None and limit < _chains(b) * STEPS * math.comb(b - 1, 2) * tableau.PAIRS


def _chain_bytes(b: int) -> int:
    return 8 * b * tableau.HELD + b * b * tableau.PAIRS


def _round_bytes(b: int) -> int:
    return _chains(b) * (_chain_bytes(b) + 8 * b * (b + tableau.HELD))


def _generator(seed: int, index: int) -> torch.Generator:
    """Random numbers of one round: on the CPU, wherever it is computed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))


def _unit(q: Float[Tensor, "*p b"]) -> Float[Tensor, "*p b"]:
    return q / torch.linalg.vector_norm(q, dim=-1, keepdim=True)


def _zeros(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], tolerance: float) -> Bool[Tensor, "h m"]:
    entries = (q @ L.mT).abs()
    return entries < tolerance * entries.amax(1, keepdim=True)


def _sparse(L: Float[Tensor, "m b"], q: Float[Tensor, "h b"], threshold: int, tolerance: float) -> Float[Tensor, "k b"]:
    """The sparsity filter, in chunks of directions."""
    parts = q.split(max(1, 2**23 // len(L)))
    return torch.cat([part[_zeros(L, part, tolerance).sum(1) >= threshold] for part in parts])
