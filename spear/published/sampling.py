"""Sampling: kernels of random sets of b - 1 rows of L, kept where L q has many zeros (SPEAR, Section 3.2, Algorithm 1).

The textbook form (`naive`), the kernels of whole blocks of rows by one inversion (`block_kernels`), and walks that test
kernels without computing them (`spear.published.walks`). Work comes in rounds, independent of each other and of where
they run.
Directions are rows here: `q` (h, b) holds h unit vectors, each a candidate for a column of Q.
"""

import functools
import math
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spear import executors
from spear.published import walks
from spear.published.kernels import LOOSE, Proposals, block_kernels, distinct, kernels_lu, refine, sparse, zeros
from spear.published.view import Observed

BLOCKS_UP_TO = 12  # largest b at which inverting blocks finds all columns before walks do
BLOCKS = 1024  # blocks of a round
HELD_OUT = 12  # rows on which the kernels of blocks are tested first
CHAIN_MEMORY = 2**23  # bytes that the chains of a round keep busy: what a cache holds
FEWEST_CHAINS = 6
STEPS = 64  # pivots of each chain in a round
CHUNK_BYTES = 2**30  # of memory that rounds side by side take on a device
AHEAD = 64  # rounds that an executor is given before their turn
SHARES = (0.0, 0.3, 1.0)  # of the rows, that pools are drawn from, in rounds 0, 1, 2, ... cyclically; at least a pool


def proposal_rounds(
    observed: Observed,
    *,
    threshold: int,
    seed: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    until: float = math.inf,
    executor: Executor | None = None,
) -> Iterator[Proposals]:
    """Proposals of rounds 0, 1, 2, ... in this order, until the clock (`time.monotonic`) shows `until` (`rounds`).

    On the CPU each of torch's threads works on one round; an `executor` computes the same rounds elsewhere, to the bit.
    On other devices several rounds are one, their number doubling up to `CHUNK_BYTES` of memory.
    Where only `limit` kernels are asked for, fewer than walks test in a round, rounds invert blocks, one at a time.
    """
    b = observed.L.shape[1]
    options = {"threshold": threshold, "seed": seed, "device": device, "limit": limit}
    work = functools.partial(_rounds_from, observed, **options)
    if executor is not None or _device(observed.L, device).type == "cpu":
        ahead = 1 if _few(b, limit) else AHEAD if executor else torch.get_num_threads()
        yield from executors.in_order(work, ahead=ahead, until=until, executor=executor)
        return
    first, count = 0, 1
    while time.monotonic() < until:
        yield work(first, count)
        first, count = first + count, min(2 * count, max(1, CHUNK_BYTES // _round_bytes(b)))


def rounds(
    observed: Observed,
    indices: range,
    *,
    threshold: int,
    seed: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
) -> Proposals:
    """What the rounds of these `indices` of `seed` find, without repetitions, wherever they are computed.

    Directions have at least `threshold` zeros in L q, as `observed.tolerance` counts them; they are polished (`refine`)
    and differ by more than sign. `device` (default: that of L) is where kernels are tested, side by side on a GPU, one
    by one on the CPU; what passes is verified in float64 on the CPU.

    Two rounds of three draw rows that the layer's weights let expect to vanish together (`walks.draw_pools`); the third
    draws uniformly, as published.
    """
    where, seen = _device(observed.L, device), _in_double(observed)
    exact, tolerance = seen.L, seen.tolerance
    count, hits, found = 0, 0, []
    for part in [indices[i : i + 1] for i in range(len(indices))] if where.type == "cpu" else [indices]:
        proposed, q = _propose(seen, part, seed, where, limit)
        q = sparse(exact, q, threshold, LOOSE * tolerance)
        polished = refine(exact, distinct(exact, q, LOOSE * tolerance), tolerance=tolerance)
        count, hits = count + proposed, hits + len(q)
        found.append(sparse(exact, polished, threshold, tolerance))
    q = distinct(exact, torch.cat(found), tolerance)
    return Proposals(count, hits, q.to(observed.L.device), zeros(exact, q, tolerance).sum(1).to(observed.L.device))


def block_round(
    observed: Observed, *, blocks: int = BLOCKS, generator: torch.Generator
) -> tuple[int, Float[Tensor, "h b"]]:
    """The number of kernels of a round of random blocks, and those that vanish on two of the rows held out."""
    L, (m, b) = observed.L, observed.L.shape
    few = min(HELD_OUT, (m - b) // 2)
    order = torch.randperm(m, generator=generator)
    held, others = order[:few], order[few:]
    rows = walks.draw_pools(observed, others, b, blocks, share=1.0, generator=generator)
    q = block_kernels(L[rows.mT]).flatten(0, 1)
    vanishing = (q @ L[held].mT).abs() < 100 * observed.tolerance * L.abs().max()
    return len(q), q[(vanishing.sum(1) >= min(2, few)) & q.isfinite().all(1)]


def chain_rounds(
    observed: Observed, indices: range, *, seed: int, device: torch.device
) -> tuple[int, Float[Tensor, "h b"]]:
    """The number of kernels that the chains of some rounds test (`spear.published.walks`), and the promising ones."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # there is no float64 on MPS
    started = [
        walks.start_chains(
            observed,
            _chains(observed.L.shape[1], index),
            share=SHARES[index % len(SHARES)],
            generator=_generator(seed, index),
            device=device,
            dtype=dtype,
        )
        for index in indices
    ]
    walk = walks.walk(walks.exchange_bases(walks.join(started)), STEPS, tolerance=observed.tolerance)
    return walk.kernels, kernels_lu(observed.L[walk.rows])


def _propose(
    observed: Observed, indices: range, seed: int, device: torch.device, limit: int | None
) -> tuple[int, Float[Tensor, "h b"]]:
    b = observed.L.shape[1]
    live = observed.alive() if b > 1 else observed  # a neuron that no sample activates spoils a submatrix
    if b > BLOCKS_UP_TO and len(live.L) >= b + 2 and not _few(b, limit):
        return chain_rounds(live, indices, seed=seed, device=device)
    blocks = BLOCKS if limit is None else min(BLOCKS, -(-limit // b))
    each = [block_round(live, blocks=blocks, generator=_generator(seed, index)) for index in indices]
    return sum(count for count, _ in each), torch.cat([q for _, q in each])


def _rounds_from(observed: Observed, first: int, count: int = 1, **options: object) -> Proposals:
    return rounds(observed, range(first, first + count), **options)


def _in_double(observed: Observed) -> Observed:
    """What sampling reads of a layer, in float64 on the CPU."""
    L, B, d = (
        None if part is None else part.detach().to("cpu", torch.float64)
        for part in (observed.L, observed.B, observed.d)
    )
    return replace(observed, L=L, B=B, d=d)


def _device(L: Tensor, device: str | torch.device | None) -> torch.device:
    return torch.device(L.device if device is None else device)


def _chains(b: int, index: int) -> int:
    """Chains of a round, a power of two: few at first, where few may be enough, and fewer where each is larger."""
    most = max(7, min(11, b - 5, int(math.log2(CHAIN_MEMORY / _chain_bytes(b)))))
    return 2 ** min(FEWEST_CHAINS + index // len(SHARES), most)


def _few(b: int, limit: int | None) -> bool:
    """Whether a limit on proposals is below what a round of walks tests."""
    return limit is not None and limit < _chains(b, 0) * STEPS * math.comb(b - 1, 2) * walks.PAIRS


def _chain_bytes(b: int) -> int:
    return 8 * b * walks.HELD + b * b * walks.PAIRS


def _round_bytes(b: int) -> int:
    return _chains(b, 0) * (_chain_bytes(b) + 8 * b * (b + walks.HELD))


def _generator(seed: int, index: int) -> torch.Generator:
    """Random numbers of one round: on the CPU, wherever it is computed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))
