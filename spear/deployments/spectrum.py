"""What stands out of noise: the rank of a gradient, the noise's level, and where the noise is larger than elsewhere.

The singular values of even noise follow the law of Marchenko and Pastur, up to sigma (sqrt m + sqrt n). Rounding is
larger where entries are, so its spectrum is longer; scaled so that every row and every column has the same variance it
is short again (Landa, Zhang, Kluger 2022, Biwhitening reveals the rank of a count matrix). How the variance is
distributed is guessed: evenly, as the entries, as rows or columns, as what values were rounded to; that guess is taken
by which what is left is most like even noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.published.lowrank import LowRank, rank_under_noise

ROUNDING = 1e-12  # error of the linear algebra here, relative to the first singular value
EDGE, SETTLING = 1.02, 10  # a little above the edge of pure noise; rounds in which rank and level settle
SQUARED = 1e-6  # of the largest singular value: smaller ones are lost in the Gram matrix, whose unit is its square
SHORT, LONG = 1.5, 3  # times the edge of pure noise: its spectrum ends there; that of another distribution than found,
CLEAR = 10  # which must lie that far below the batch's
ALIKE = 0.02  # distance between two distributions of singular values that are one, and two values more
BALANCING, FAINTEST = 20, 1e-9  # rounds of scaling rows and columns; of the mean: what a variance counts for at least
POINTS = 2000  # of an integral

Variance = Callable[[], Float[Tensor, "m n"]]  # of each entry's noise, up to a factor; computed where it is needed


@dataclass(frozen=True)
class Standing:
    """The part `low` of a gradient that stands out of noise, whose standard deviation per entry is `sigma` (RMS).

    `beyond` is the noise's largest singular value and `least` the batch's smallest, both over the edge of even noise.
    """

    low: LowRank
    sigma: float
    beyond: float
    least: float

    @property
    def is_noise(self) -> bool:
        """Whether what the batch leaves looks like noise: its spectrum is short, or far below the batch's."""
        return self.beyond < (LONG if self.least > CLEAR * self.beyond else SHORT) and self.least > 1


def scaled(
    J: Float[Tensor, "m n"], sigma: float | None = None, most: int | None = None, guesses: Sequence[Variance] = ()
) -> "Scaled":
    """A gradient scaled so that its noise is even, and what stands out of that.

    `sigma` is the noise's level where it is known, and then even, `most` the largest rank there can be; `guesses` of
    where the noise is larger are tried beside those that J gives. Rows and columns that are zero have no noise.
    """
    rows, columns = J.any(1), J.any(0)
    live, best = J[rows][:, columns], None
    own = (partial(torch.ones_like, live), live.square, partial(_by, live, 1), partial(_by, live, 0))
    told = [lambda g=g: g()[rows][:, columns] for g in guesses]
    for variance in own[:1] if sigma is not None else (*own[:1], *told, *own[1:]):
        found = Scaled.of(live, (rows, columns), balance(variance()), sigma, most)
        best = found if best is None or found.misfit < best.misfit else best
        if best.is_even:
            break
    return best


def _by(J: Float[Tensor, "m n"], dim: int) -> Float[Tensor, "m n"]:
    """The mean square of each row (`dim` 1) or column (0)."""
    return J.square().mean(dim, keepdim=True).expand_as(J)


def balance(variance: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"]]:
    """Factors on rows and columns by which their mean variances become 1 (Sinkhorn and Knopp)."""
    V = variance / variance.mean() + FAINTEST
    left, right = V.new_ones(len(V)), V.new_ones(V.shape[1])
    for _ in range(BALANCING):
        left = len(right) / (V @ right)
        right = len(left) / (V.mT @ left)
    return left.sqrt(), right.sqrt()


@dataclass(frozen=True)
class Scaled:
    """A gradient `J` without zero rows and columns (`live` are the others), factors on both, its spectrum so scaled.

    `s` and `U` are all singular values and left vectors, of which `rank` rise above noise of `level`. `misfit` is how
    far the others' distribution is from that of even noise.
    """

    J: Float[Tensor, "m n"]
    live: tuple[Bool[Tensor, " rows"], Bool[Tensor, " columns"]]
    left: Float[Tensor, " m"]
    right: Float[Tensor, " n"]
    s: Float[Tensor, " k"]
    U: Float[Tensor, "m k"]
    rank: int
    level: float
    misfit: float

    @classmethod
    def of(
        cls,
        J: Float[Tensor, "m n"],
        live: tuple[Bool[Tensor, " rows"], Bool[Tensor, " columns"]],
        factors: tuple[Float[Tensor, " m"], Float[Tensor, " n"]],
        sigma: float | None,
        most: int | None,
    ) -> "Scaled":
        """With these factors; `sigma` and `most` as for `scaled`."""
        left, right = factors
        s, U = _left(left[:, None] * J * right)
        rank, level = _rank(s, J.shape, sigma, most)
        return cls(J, live, left, right, s, U, rank, level, _misfit(s[rank:], J.shape, rank, level))

    @property
    def is_even(self) -> bool:
        """Whether what is left is as even noise is."""
        return self.misfit < ALIKE + 2 / max(len(self.s) - self.rank, 1)

    @property
    def step(self) -> tuple[float, int]:
        """The largest ratio of successive singular values that rise above the noise, the first aside, and its place."""
        ratio = self.s[1 : self.rank] / self.s[2 : self.rank + 1].clamp_min(1e-300)
        return (float(ratio.max()), int(ratio.argmax()) + 2) if len(ratio) else (0.0, self.rank)

    def standing(self, rank: int | None = None) -> Standing:
        """The part of the gradient of that rank that stands out, unscaled, and the noise."""
        rank, (m, n) = min(rank or self.rank, len(self.s)), self.J.shape
        V = self.U[:, :rank].mT @ (self.left[:, None] * self.J * self.right)
        basis, triangle = torch.linalg.qr(self.U[:, :rank] / self.left[:, None])
        inner, s, right = torch.linalg.svd(triangle @ (V / self.right), full_matrices=False)
        part = basis @ inner
        (rows, columns), new = self.live, self.J.new_zeros
        L, R = new(len(rows), rank), new(rank, len(columns))
        L[rows], R[:, columns] = part, s[:, None] * right
        sigma = float((self.J - part * s @ right).norm()) / max((m - rank) * (n - rank), 1) ** 0.5
        sigma, edge = max(sigma, ROUNDING * float(s[0]) / (m * n) ** 0.5), m**0.5 + n**0.5
        beyond = float(self.s[rank]) / self.level / edge if rank < len(self.s) else 0.0
        noise = beyond * sigma * edge
        low = LowRank(rank, L, R, float(s[-1]) / max(noise, 1e-300), noise)
        return Standing(low, sigma, beyond, float(self.s[rank - 1]) / self.level / edge)


def _rank(s: Float[Tensor, " k"], shape: tuple[int, int], sigma: float | None, most: int | None) -> tuple[int, float]:
    """How many singular values rise above even noise, and its level."""
    m, n = shape
    bound = max(1, min(most or len(s), m - 1, n - 1))
    rank = max(1, min(rank_under_noise(s, shape, sigma), bound))
    rounding = ROUNDING * float(s[0]) / (m * n) ** 0.5
    for _ in range(SETTLING):
        seen = max(float(s[rank:].norm()) / max((m - rank) * (n - rank), 1) ** 0.5, rounding)
        before, above = rank, rank_under_noise(s, shape, EDGE * (seen if sigma is None else sigma))
        rank = max(1, min(above, bound))
        if rank == before:
            break
    return rank, seen if sigma is None else max(sigma, rounding)


def _misfit(s: Float[Tensor, " k"], shape: tuple[int, int], rank: int, level: float) -> float:
    """The largest distance between the distribution of squared singular values and Marchenko and Pastur's."""
    m, n = min(shape) - rank, max(shape) - rank
    if len(s) < 2:
        return 1.0
    low, high = (1 - (m / n) ** 0.5) ** 2, (1 + (m / n) ** 0.5) ** 2
    x = torch.linspace(low, high, POINTS, dtype=s.dtype)
    density = ((x - low) * (high - x)).clamp_min(0).sqrt() / x.clamp_min(1e-300)
    share = density.cumsum(0) / density.sum()
    values = (s.cpu()[:m].flip(0) / level).square() / n
    expected = share[torch.bucketize(values, x).clamp_max(POINTS - 1)]
    seen = (torch.arange(len(values), dtype=s.dtype) + 0.5) / len(values)
    return float((expected - seen).abs().max())


def _left(J: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "m k"]]:
    """Singular values and left singular vectors; by the smaller Gram matrix where squaring loses nothing."""
    wide = J if J.shape[0] <= J.shape[1] else J.mT
    values, U = torch.linalg.eigh(wide @ wide.mT)
    s, U = values.flip(0).clamp_min(0).sqrt(), U.flip(1)
    if s.median() < SQUARED * s[0]:
        U, s, _ = torch.linalg.svd(torch.linalg.qr(wide.mT, mode="r")[1].mT, full_matrices=False)
    if wide is J:
        return s, U
    return s, torch.linalg.qr(J @ U / s.clamp_min(1e-300 + ROUNDING * s[0]))[0]
