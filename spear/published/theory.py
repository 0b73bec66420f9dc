"""SPEAR's statements about one linear layer, as small functions.

Symbols: X (n x b) holds one sample per column, Z = W X + beta 1^T (m x b), G = dL/dZ (m x b). A *proposal* is the
kernel of b - 1 rows of L, drawn uniformly without replacement; zeta_i is the number of zeros in column i of G.
"""

import math

import numpy as np
import scipy  # its parts load when they are first used
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.published.sparsity import FALSE_REJECTION, threshold


def linear_gradients(
    G: Float[Tensor, "*batch m b"], X: Float[Tensor, "*batch n b"]
) -> tuple[Float[Tensor, "*batch m n"], Float[Tensor, "*batch m"]]:
    """The gradients of a linear layer: dL/dW = G X^T and dL/dbeta = G 1 (SPEAR, low-rank decomposition)."""
    return G @ X.mT, G.sum(-1)


def single_sample(dW: Float[Tensor, "m n"], dbeta: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
    """The input at b = 1, from one division: x = (dL/dW)_k / (dL/dbeta)_k, row k of largest |dL/dbeta|.

    Raises `ValueError` where the bias gradient vanishes, and where dL/dW is not dL/dbeta x^T to rounding: more than one
    sample.
    """
    k = dbeta.abs().argmax()
    if dbeta[k] == 0:
        raise ValueError("the bias gradient is zero: no neuron of this layer was active")
    x = dW[k] / dbeta[k]
    residual = (dW - torch.outer(dbeta, x)).norm() / dW.norm().clamp_min(torch.finfo(dW.dtype).tiny)
    if residual > math.sqrt(torch.finfo(dW.dtype).eps):
        raise ValueError(f"not the gradient of one sample: a share of {float(residual):.1e} is not of rank 1")
    return x


def success_probability(zeros: Int[Tensor, "*columns"], width: int, batch: int) -> Float[Tensor, "*columns"]:
    """C(zeta, b - 1) / C(m, b - 1): the chance that b - 1 random rows all vanish in a column with zeta zeros.

    The proposal is then q_i, provided that the rows have rank b - 1 (`full_rank_probability`). 0 for zeta < b - 1.
    Computed and returned in float64 on the CPU.
    Raises `ValueError` for b outside 1 to m, or a count outside 0 to m (m = `width`).
    """
    _check_batch(width, batch)
    if zeros.numel() and (int(zeros.min()) < 0 or int(zeros.max()) > width):
        raise ValueError(f"a column of {width} entries has between 0 and {width} zeros")
    c, n = batch - 1, zeros.cpu().double()
    log = torch.lgamma(n + 1) - torch.lgamma((n - c).clamp_min(0) + 1)
    log = log - math.lgamma(width + 1) + math.lgamma(width - c + 1)
    return torch.where(n < c, 0.0, log.exp())


def independent_rates(batch: int) -> Float[Tensor, " b"]:
    """Success probability of a proposal per column, for zeros that are independent at rate one half: 2^-(b-1)."""
    return torch.full((batch,), 2.0 ** (1 - batch), dtype=torch.float64)


def half_rates(width: int, batch: int) -> Float[Tensor, " b"]:
    """Success probability of a proposal per column, for exactly m // 2 zeros in every column."""
    return success_probability(torch.full((batch,), width // 2), width, batch)


def expected_proposals(rates: Float[Tensor, " b"]) -> float:
    """Expected number of proposals until every column was met once, column i with probability `rates[i]` each time.

    Coupon collecting with unequal rates: the integral over t > 0 of 1 - prod_i(1 - exp(-p_i t)), exact where one
    proposal meets at most one column; H_b / p for equal rates p. Infinite where a rate is 0.

    Raises `ValueError` for no rates, or a rate outside [0, 1].
    """
    rates = _checked(rates)
    if rates.min() == 0:
        return math.inf
    # In u = log t the integrand is analytic and falls off exponentially to both sides: the trapezoidal rule converges
    # faster than any power of the step.
    u = torch.linspace(*_log_range(rates), 2000, dtype=torch.float64)
    return float(torch.trapezoid(-torch.expm1(_log_met(rates, u.exp())) * u.exp(), u))


def proposal_quantiles(rates: Float[Tensor, " b"], levels: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Quantiles of the number of proposals until every column was met once; `levels` in (0, 1), `rates` as above.

    Solves prod_i(1 - exp(-p_i t)) = level by bisection: proposals at the times of a Poisson process of rate 1, which
    differs from counting them by a relative 1 / sqrt(t). Infinite where a rate is 0. Raises as `expected_proposals`
    does, and for a level outside (0, 1).
    """
    rates = _checked(rates)
    if bool(((levels <= 0) | (levels >= 1)).any()):
        raise ValueError("levels of quantiles lie strictly between 0 and 1")
    if rates.min() == 0:
        return torch.full_like(levels, math.inf)
    target = levels.cpu().double().log()
    low, high = (torch.full_like(target, end) for end in _log_range(rates))
    for _ in range(60):
        middle = (low + high) / 2
        reached = _log_met(rates, middle.exp()) >= target
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high.exp().to(levels)


def full_rank_probability(rows: int, batch: int) -> float:
    """Approximate chance that `rows` zero rows of a column leave rank b - 1 in the other b - 1 columns of G.

    For independent half zeros with generic values, the rank is low almost only because fewer than b - 1 of the rows are
    not zero, or because a column is zero in all r rows that are not. Exact for b <= 2. At `rows` = b - 1 it is the
    chance that a proposal whose rows all vanish in one column is unique, the factor that `success_probability` omits.
    """
    c = batch - 1
    r = np.arange(c, rows + 1)
    zero_entry = (2.0 ** (c - 1) - 1) / (2.0**c - 1) if c else 0.0  # the chance of a zero in a row that is not zero
    return float(scipy.stats.binom.pmf(r, rows, 1 - 2.0**-c) @ (1 - zero_entry**r) ** c)


def failure_bound(width: int, batch: int, *, false_rejection: float = FALSE_REJECTION) -> float:
    """Upper bound on the probability that SPEAR fails, for independent half zeros and generic values of G.

    Column i fails if it has fewer zeros than the filter asks for, or than b - 1, or if its zero rows have rank under
    b - 1. Generic rows have rank b - 1 unless some s of the other columns live on fewer than s of them (Hall's
    theorem), so the union bound is, with N ~ Bin(m, 1/2),

        b * (P(N < t) + E[sum_s C(b-1, s) P(Bin(N, 1 - 2^-s) < s); N >= t]),    t = max(threshold, b - 1).

    Raises `ValueError` for b outside 1 to m or a rate outside [0, 1]. (SPEAR, section on the failure probability.)
    """
    _check_batch(width, batch)
    least = _least_zeros(width, batch, false_rejection)
    N, s = np.arange(least, width + 1)[:, None], np.arange(1, batch)
    log_sets = scipy.stats.binom.logcdf(s - 1, N, 1 - 2.0**-s) + _log_choose(batch - 1, s)
    low_rank = np.exp(log_sets).sum(1).clip(max=1)
    weights = scipy.stats.binom.pmf(N[:, 0], width, 0.5)
    return min(1.0, batch * float(scipy.stats.binom.cdf(least - 1, width, 0.5) + weights @ low_rank))


def failure_approximation(width: int, batch: int, *, false_rejection: float = FALSE_REJECTION) -> float:
    """The probability that SPEAR fails, for columns that fail independently, and rank as in `full_rank_probability`.

    Raises as `failure_bound` does.
    """
    _check_batch(width, batch)
    least = _least_zeros(width, batch, false_rejection)
    N = np.arange(least, width + 1)
    low_rank = np.array([1 - full_rank_probability(int(rows), batch) for rows in N])
    column = float(scipy.stats.binom.cdf(least - 1, width, 0.5) + scipy.stats.binom.pmf(N, width, 0.5) @ low_rank)
    return -math.expm1(batch * math.log1p(-min(column, 1 - 1e-16)))


def failure_simulation(
    width: int,
    batch: int,
    *,
    trials: int,
    false_rejection: float = FALSE_REJECTION,
    generator: torch.Generator | None = None,
) -> float:
    """Share of `trials` random G (independent half zeros, normal values) in which SPEAR fails in some column.

    A column fails as in `failure_bound`; the rank is computed. Memory grows with width * batch, not with the trials.
    Raises as `failure_bound` does, and for trials under 1.
    """
    _check_batch(width, batch)
    if trials < 1:
        raise ValueError(f"a simulation needs at least 1 trial, not {trials}")
    least = _least_zeros(width, batch, false_rejection)
    return sum(_fails(width, batch, least, generator) for _ in range(trials)) / trials


def _fails(width: int, batch: int, least: int, generator: torch.Generator | None) -> bool:
    values = torch.randn(width, batch, dtype=torch.float64, generator=generator)
    zero = torch.rand(width, batch, generator=generator) < 0.5
    if int(zero.sum(0).min()) < least:
        return True
    G = values * ~zero
    rows = zero.T[:, :, None] * G  # (b, m, b): column i's zero rows, the others set to zero; its own column vanishes
    return int(torch.linalg.matrix_rank(rows).min()) < batch - 1


def _least_zeros(width: int, batch: int, false_rejection: float) -> int:
    return max(threshold(width, false_rejection=false_rejection), batch - 1)


def _log_met(rates: Float[Tensor, " b"], t: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """log prod_i(1 - exp(-p_i t)), the chance that every column was met by time t."""
    return torch.log(-torch.expm1(-rates[:, None] * t)).sum(0)


def _log_range(rates: Float[Tensor, " b"]) -> tuple[float, float]:
    """log t before which it is certain in double precision that a column is missing, and after which none is."""
    return -40 - math.log(float(rates.max())), math.log(800 / float(rates.min()))


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    return np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])


def _check_batch(width: int, batch: int) -> None:
    if not 1 <= batch <= width:
        raise ValueError(f"a batch of {batch} needs a layer at least that wide; the width is {width}")


def _checked(rates: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    if rates.numel() == 0 or bool(((rates < 0) | (rates > 1) | rates.isnan()).any()):
        raise ValueError("success probabilities are numbers in [0, 1], at least one")
    return rates.cpu().double()
