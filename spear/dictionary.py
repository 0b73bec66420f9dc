"""Sparse vectors in a subspace: the columns of G from the gradient alone (the idea of SPEAR++).

G = L Q has b sparse columns in the span of L, and complete dictionary learning is the search for them. Learners move
all starts at once; each takes unit directions q (k, b), the rows of which are starts, and returns unit directions.
`spear.columns` polishes what they find, tests it and collects the columns.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from spear.columns import Lengths, collect, unit
from spear.filtering import Observed
from spear.search import Budget, Found, Progress

LENGTHS = Lengths(shortest=100, longest=900)

Learner = Callable[..., Float[Tensor, "j b"]]


def soft_threshold(
    L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], *, steps: int = 400, weight: float = 0.7
) -> Float[Tensor, "k b"]:
    """Alternating soft thresholding: s = shrink(L q), q = L^T s, scaled to unit length (Qu, Sun, Wright 2014).

    `weight` is the threshold in units of the root mean square of L q. Two products of (k, m, b) a step.
    """
    threshold = weight / math.sqrt(len(L))
    for _ in range(steps):
        q = unit(torch.nn.functional.softshrink(q @ L.mT, threshold) @ L)
    return q


def l4_maximise(L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], *, steps: int = 100) -> Float[Tensor, "b b"]:
    """All directions at once, as an orthogonal matrix: the one under which L is spikiest, max |L A^T|_4.

    Matching, stretching and projection: A becomes the polar factor of (A L^T)^3 L (Zhai, Yang, Liao, Wright, Ma 2020).
    Starts are completed to an orthogonal matrix. The true directions are orthogonal only nearly: a polish is needed.
    """
    A = torch.linalg.qr(q.mT, mode="complete")[0].mT
    for _ in range(steps):
        left, _, right = torch.linalg.svd((A @ L.mT) ** 3 @ L)
        A = left @ right
    return A


def reweighted(L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], *, steps: int = 40) -> Float[Tensor, "k b"]:
    """Iteratively reweighted least squares: q is the smallest eigenvector of L^T diag(1 / |L q|) L, as its weights move.

    Weights are smoothed by a bound that falls from the root mean square of L q to 1e-4 of it (Daubechies, DeVore,
    Fornasier, Guentuerk 2010; for a unit vector: Tsakiris, Vidal 2018). One inverse iteration a step: k systems of b.
    """
    for bound in torch.logspace(0, -4, steps).tolist():
        bound = bound / math.sqrt(len(L))
        weight = 1 / (bound**2 + (q @ L.mT) ** 2).sqrt()
        gram = torch.cat([L.mT @ (part[:, :, None] * L) for part in weight.split(max(1, 2**24 // L.numel()))])
        q = unit(torch.linalg.solve(gram, q))
    return q


def subgradient(
    L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], *, steps: int = 400, size: float = 0.5
) -> Float[Tensor, "k b"]:
    """Riemannian subgradient descent of |L q|_1 on the sphere, with steps that fall like 1 / sqrt(t) (Bai, Jiang, Sun
    2019)."""
    for t in range(1, steps + 1):
        slope = torch.sign(q @ L.mT) @ L / math.sqrt(len(L))
        slope = slope - (slope * q).sum(1, keepdim=True) * q
        q = unit(q - size / math.sqrt(t) * slope)
    return q


def search(
    observed: Observed,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None = None,
    *,
    learner: Learner = soft_threshold,
    lengths: Lengths = LENGTHS,
) -> Found:
    """All columns of Q, found as sparse vectors in the span of L."""
    L = observed.L.float()

    def descend(q: Tensor, free: Tensor, steps: int) -> Tensor:
        return learner(L, q.float(), steps=steps)

    return collect(observed, descend, lengths, budget, seed, progress)
