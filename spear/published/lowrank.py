"""The gradient of a linear layer has the rank of the batch: finding that rank, and a factorisation dL/dW = L R."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spear.models.streaming import Blocks

MIN_GAP = 1e3  # ratio of successive singular values that counts as a gap: those of noise fall by far less
OVERSAMPLING = 8  # directions beyond the rank that a random range is given (Halko, Martinsson, Tropp 2011: 5 to 10)
VISIBLE = 1e2  # singular values above this many roundings of the largest belong to the batch


@dataclass(frozen=True)
class LowRank:
    """A gradient J (m, n) seen through its singular values: J = L R up to rounding.

    `rank` is the batch size; `L` (m, b) has orthonormal columns, `R` (b, n) = L^T J has the singular values as row
    norms. `gap` is the ratio of the last singular value that belongs to the batch to the first that does not, and
    `noise` the latter (both in J's unit).
    """

    rank: int
    L: Float[Tensor, "m b"]
    R: Float[Tensor, "b n"]
    gap: float
    noise: float

    @property
    def largest(self) -> float:
        """The first singular value, in J's unit."""
        return float(torch.linalg.vector_norm(self.R[0]))

    @property
    def smallest(self) -> float:
        """The b-th singular value, in J's unit."""
        return float(torch.linalg.vector_norm(self.R[-1]))

    def entry_noise(self, n: int) -> float:
        """The standard deviation of independent noise in the entries of an m x n gradient whose norm is `noise`."""
        return self.noise / (math.sqrt(len(self.L)) + math.sqrt(n))


def augment(weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"]) -> Float[Tensor, "m n+1"]:
    """J = [dL/dW | dL/dbeta] = G [X^T | 1]: the bias is a weight whose input is 1."""
    return torch.cat([weight, bias[:, None]], 1)


def decompose(
    J: Float[Tensor, "m n"] | Blocks, rank: int | None = None, *, eps: float | None = None, expected: int = 0
) -> LowRank:
    """Factorise a gradient at its numerical rank, or at a given one (SPEAR, the low-rank theorem).

    A randomised range finder doubles its sketch until the rest of J is rounding: O(m n b) instead of O(m^2 n). `eps` is
    the relative rounding of J as it was sent: with it, singular values that fade into rounding without a gap are
    counted as far as they are visible. `expected` is a guess of the rank, which saves sketches.

    Raises `ValueError` for a gradient of rank 0 and for a given rank that exceeds either side of J.
    """
    if rank is not None and not 0 < rank <= min(J.shape):
        raise ValueError(f"rank {rank} is not between 1 and {min(J.shape)}, the smaller side of the gradient")
    J = J if isinstance(J, Blocks) else Blocks(J, None, J)
    if not J.any():
        raise ValueError("the gradient has rank 0: it is zero everywhere")
    basis = range_basis(J, size=max(64, expected + 2 * OVERSAMPLING), eps=eps)
    compressed = J.after(basis)
    triangle = torch.linalg.qr(compressed.mT, mode="r")[1]  # the singular values and left vectors are the triangle's
    U, s, _ = torch.linalg.svd(triangle.mT, full_matrices=False)
    if rank is None:
        rank, gap = detect_rank(s, eps=eps)
    else:
        gap = float(s[rank - 1] / s[rank]) if rank < len(s) and s[rank] > 0 else math.inf
    noise = float(s[rank]) if rank < len(s) else 0.0
    return LowRank(rank, basis @ U[:, :rank], U[:, :rank].mT @ compressed, gap, noise)


def range_basis(J: Blocks, *, size: int = 64, eps: float | None = None) -> Float[Tensor, "m k"]:
    """An orthonormal basis of J's columns up to rounding (Halko, Martinsson, Tropp 2011, Algorithm 4.1), grown by
    doubling.

    A sketch is wide enough once its last `OVERSAMPLING` singular values are rounding, or J is not smaller than it.
    """
    generator = torch.Generator().manual_seed(0)
    while size < min(J.shape) / 2:
        sketch = torch.randn(J.shape[1], size, generator=generator, dtype=J.like.dtype).to(J.like.device)
        basis, triangle = torch.linalg.qr(J.times(sketch))
        s = torch.linalg.svdvals(triangle)
        rank, gap = detect_rank(s, eps=eps)
        reached = eps is None or s[-1] <= VISIBLE * eps * s[0]
        if reached and gap >= MIN_GAP and rank <= size - OVERSAMPLING:
            return basis
        size *= 2
    m, n = J.shape
    return torch.linalg.qr(J.whole())[0] if m > n else torch.eye(m, dtype=J.like.dtype, device=J.like.device)


def detect_rank(s: Float[Tensor, " k"], *, eps: float | None = None) -> tuple[int, float]:
    """The rank behind decreasing singular values, and the gap that shows it: the largest ratio of successive ones.

    Values under 0.03 eps of the largest are raised to it, or the exact zeros of dead neurons would fake a gap. Where
    even the last value stands above rounding, no gap is seen: the rank is k and the gap 1.

    With the `eps` of the data (default: of their dtype), a spectrum that reaches `VISIBLE` eps has its gap there, not
    among the values above: confident samples may be many orders weaker than others. Without a gap there, the values
    above it are counted, and the ratio that follows them is the gap.
    """
    floor = 0.03 * (eps or torch.finfo(s.dtype).eps)
    s = (s / s[0]).clamp_min(floor)
    if len(s) == 1:
        return 1, 1.0
    ratio = s[:-1] / s[1:]
    if eps is not None and s[-1] <= VISIBLE * eps:
        visible = int((s > VISIBLE * eps).sum())
        lowest = visible - 1 + int(ratio[visible - 1 :].argmax())
        index = lowest if ratio[lowest] >= MIN_GAP else visible - 1
        return index + 1, float(ratio[index])
    index = int(ratio.argmax())
    return (index + 1, float(ratio[index])) if ratio[index] >= MIN_GAP else (len(s), 1.0)


def rank_under_noise(s: Float[Tensor, " k"], shape: tuple[int, int], sigma: float | None = None) -> int:
    """How many singular values of an m x n gradient rise above noise of standard deviation `sigma` per entry.

    The edge of pure noise is sigma (sqrt m + sqrt n). Without `sigma` it is estimated from the median singular value,
    with the optimal hard threshold of Gavish and Donoho (2014), approximated by their cubic in the aspect ratio.
    """
    m, n = min(shape), max(shape)
    if sigma is not None:
        edge = sigma * (math.sqrt(m) + math.sqrt(n))
    else:
        ratio = m / n
        edge = (0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43) * float(s.median())
    return int((s > edge).sum())
