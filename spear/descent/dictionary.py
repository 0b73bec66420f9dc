"""Sparse vectors in a subspace: the columns of G from the gradient alone (the idea of SPEAR++).

G = L Q has b sparse columns in the span of L, and complete dictionary learning is the search for them. Learners move
all starts at once; each takes unit directions q (k, b), the rows of which are starts, and returns unit directions.
`spear.descent.columns` polishes what they find, tests it and collects the columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spear.descent.columns import Lengths, collect, draw
from spear.directions import complement, unit_rows
from spear.published.greedy import Candidates
from spear.published.view import Observed
from spear.reconstruction import Terms

LENGTHS = Lengths(shortest=100, longest=2700)
Learner = Callable[..., Float[Tensor, "j b"]]


def soft_threshold(
    L: Float[Tensor, "m b"], q: Float[Tensor, "k b"], *, steps: int = 400, first: float = 0.7, last: float = 0.1
) -> Float[Tensor, "k b"]:
    """Alternating soft thresholding: s = shrink(L q), q = L^T s, scaled to unit length (Qu, Sun, Wright 2014).

    The threshold falls from `first` to `last`, in units of the root mean square of L q. Two products of (k, m, b) a
    step.
    """
    for weight in torch.logspace(math.log10(first), math.log10(last), steps).tolist():
        q = unit_rows(F.softshrink(q @ L.mT, weight / math.sqrt(len(L))) @ L)
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
    """Iteratively reweighted least squares: q becomes the smallest eigenvector of L^T diag(1 / |L q|) L.

    Weights are smoothed by a bound that falls from the root mean square of L q to 1e-4 of it (Daubechies, DeVore,
    Fornasier, Guentuerk 2010; for a unit vector: Tsakiris, Vidal 2018). One inverse iteration a step: k systems of b.
    """
    for bound in torch.logspace(0, -4, steps).tolist():
        bound = bound / math.sqrt(len(L))
        weight = 1 / (bound**2 + (q @ L.mT) ** 2).sqrt()
        gram = torch.cat([L.mT @ (part[:, :, None] * L) for part in weight.split(max(1, 2**24 // L.numel()))])
        q = unit_rows(torch.linalg.solve(gram, q))
    return q


def subgradient(
    L: Float[Tensor, "m b"],
    q: Float[Tensor, "k b"],
    *,
    steps: int = 400,
    first: float = 4.0,
    last: float = 0.02,
    spread: float = 10.0,
) -> Float[Tensor, "k b"]:
    """Riemannian subgradient descent of |L q|_1 on the sphere, its steps falling geometrically (Bai, Jiang, Sun 2019).

    A long first step leaves poor minima behind, a short one stays near its start and so finds more different columns:
    the starts take theirs from `first` down to `first` / `spread`. All end with a step of `last`.
    """
    begin = first * spread ** -torch.linspace(0, 1, len(q), dtype=q.dtype, device=q.device)[:, None]
    for t in range(steps):
        size = begin * (last / begin) ** (t / max(1, steps - 1))
        slope = torch.sign(q @ L.mT) @ L / math.sqrt(len(L))
        q = unit_rows(q - size * (slope - (slope * q).sum(1, keepdim=True) * q))
    return q


@dataclass(frozen=True)
class Dictionary:
    """One layer's gradient as sparse vectors in a subspace, by one of the learners here; it stands noise."""

    name: ClassVar[str] = "dictionary"
    stands_noise: ClassVar[bool] = True
    learner: Learner = subgradient

    def search(
        self, observed: Observed, terms: Terms, device: str | torch.device | None = None, goal: float | int = 1
    ) -> Candidates:
        """All columns of Q, or of noisy ones as many as explain the layer to lambda = `goal`; where `observed` is."""
        return find_columns(observed, terms, goal=goal, learner=self.learner)


def find_columns(
    observed: Observed,
    terms: Terms,
    *,
    goal: float | int = 1,
    learner: Learner = subgradient,
    lengths: Lengths = LENGTHS,
) -> Candidates:
    """All columns of Q, found as sparse vectors in the span of L."""
    L = observed.L.float()

    def descend(known: Tensor, count: int, steps: int, generator: torch.Generator) -> Tensor:
        return learner(L, draw(observed, complement(known), count, generator).float(), steps=steps)

    return collect(observed, (descend,), lengths, terms, name="dictionary", goal=goal)
