"""σ of a batch where epsilon tells it roughly: better by the samples that nearly fit.

Each sample solves m equations in 2 (b - 1) + C unknowns; what they leave over tells σ, common to all. To first order in
log σ, with q_i = ∂g_i / ∂log σ and Q_i a basis of the columns of sample i's exact step,

    sum_i q_i ∘ (1 - Q_i Q_iᵀ) (D_i ∘ h_i - g_i - q_i ∘ δ) + τ (δ_0 - δ) / error² = 0

with what epsilon tells as a prior, δ_0 away: it alone tells the one factor that all σ share, on which no sample
depends. τ is the mean square of what is left over.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.certificate import rms
from spear.normalisation.batch_search import BatchSearch
from spear.normalisation.exact_step import ExactStep, Solution, evidence
from spear.normalisation.spaces import BatchSpaces, Found, plane
from spear.normalisation.statistics import Deviation

ROUNDS, STEPS, MOST = 6, 10, 40  # of starts; of σ on one round's masks; masks at once
NEAR = 0.4  # distance of a mask from its pieces under which it tells something of σ
FEWEST = 4  # masks that tell anything
FAR = 0.3  # change of log σ in one step, at most
OUTLIERS = 2  # times the median residual: masks that are no samples'
FITS = 3e-3  # median residual under which they are


@dataclass(frozen=True)
class Calibrated:
    """σ with its error, and the residual that samples have."""

    deviation: Deviation
    residual: float


def calibrated(run: BatchSearch, rough: Deviation, until: float) -> Calibrated | None:
    """σ by a search with rough ones, until the clock shows `until`; `None` where no samples came near enough."""
    run.until, live = until, run.spaces.live
    error, start = rough.error[live].clamp_max(1.0), torch.log(rough.sigma[live])
    eye = torch.eye(len(start), dtype=start.dtype, device=start.device)
    for _ in range(ROUNDS):
        mask, spaces, log, residual = run.near_misses(NEAR)[:MOST], run.spaces, start, torch.inf
        for _ in range(STEPS):
            if len(mask) < FEWEST:
                break
            at, q, own = _at(run, spaces, mask)
            left, residual = mask * at.h - at.g, float(at.residual.median())
            noise = float(left.square().sum() / (left.numel() - own.shape[2] * len(mask)))
            N, wanted = torch.zeros_like(eye), torch.zeros_like(log)
            for basis, one, rest in zip(own, q, left, strict=True):
                N += one[:, None] * (eye - basis @ basis.mT) * one
                wanted += one * (rest - basis @ (basis.mT @ rest))
            prior = noise / error.square()
            factor = torch.linalg.cholesky_ex(N + torch.diag(prior))[0]
            step = torch.cholesky_solve((wanted + prior * (start - log))[:, None], factor)[:, 0]
            log = log + step.clamp(-FAR, FAR)
            spaces = run.spaces.with_deviation((log - start).exp())
            mask = evidence(at.g, at.y, at.h, run.weight, dropped=False) > 0
            mask = mask[at.residual < OUTLIERS * residual]
        if residual < FITS:
            found = _with(rough, live, log, noise * torch.cholesky_inverse(factor))
            worse = max(1.0, rms((log - start) / error))  # times its own estimate that epsilon turns out to be off
            return Calibrated(replace(found, common=worse * found.common), residual)
    return None


def _with(
    rough: Deviation, live: Bool[Tensor, " units"], log: Float[Tensor, " m"], spread: Float[Tensor, "m m"]
) -> Deviation:
    """The deviations from their logarithms on the live units, and the covariance of these."""
    sigma, error, common = rough.sigma.clone(), torch.full_like(rough.error, torch.inf), float(spread.mean().sqrt())
    sigma[live] = log.exp()
    each = spread.diagonal() - 2 * spread.mean(1) + common**2
    error[live] = each.clamp_min(torch.finfo(log.dtype).eps ** 2).sqrt()
    return Deviation(sigma, error, told=False, common=common)


def _at(
    run: BatchSearch, spaces: BatchSpaces, mask: Bool[Tensor, "k m"]
) -> tuple[Solution, Float[Tensor, "k m"], Float[Tensor, "k m c"]]:
    """The exact step of masks, ∂g/∂log σ there, and a basis of what each may be off by."""
    here = plane(spaces, Found.none(spaces, run.heads.shape[1]), run.size)
    at = ExactStep.of(here, run.heads)(mask)
    half = here.g_basis.shape[1] // 2
    sign = torch.where(torch.arange(2 * half, device=mask.device) < half, 1.0, -1.0).to(at.x)
    masked = mask[:, :, None] * run.heads
    own = torch.linalg.qr(torch.cat([here.g_basis.expand(len(mask), -1, -1), masked], 2))[0]
    return at, (at.x * sign) @ here.g_basis.mT, own
