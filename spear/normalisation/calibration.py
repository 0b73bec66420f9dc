"""σ of a batch where epsilon tells it roughly: better by the samples that nearly fit.

Each sample solves m equations in 2 (b - 1) + C unknowns; what they leave over tells σ, common to all. To first order in
log σ, with q_i = ∂g_i / ∂log σ and Q_i a basis of the columns of sample i's exact step,

    sum_i q_i ∘ (1 - Q_i Q_iᵀ) (D_i ∘ h_i - g_i - q_i ∘ δ) + τ (δ_0 - δ) / error² = 0

with what epsilon tells as a prior, δ_0 away: it alone tells the one factor that all σ share, on which no sample
depends. τ is the mean square of what is left over.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.normalisation.batch_search import BatchSearch
from spear.normalisation.exact_step import ExactStep, Solution, evidence
from spear.normalisation.spaces import BatchSpaces, Found, plane
from spear.normalisation.statistics import Deviation

ROUNDS, STEPS, MOST = 6, 10, 40  # of starts; of σ on one round's masks; masks at once
NEAR = 0.4  # distance of a mask from its pieces under which it tells something of σ
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
    run.until = until
    error = torch.where(rough.error.isfinite(), rough.error, 1.0).clamp_max(1.0)
    for _ in range(ROUNDS):
        mask = run.near_misses(NEAR)[:MOST]
        if len(mask) < 2:
            continue
        spaces, log, prior = run.spaces, torch.log(rough.sigma), torch.log(rough.sigma)
        for _ in range(STEPS):
            at, q, own = _at(run, spaces, mask)
            left = mask * at.h - at.g
            noise = float(left.square().sum() / (left.numel() - own.shape[2] * len(mask)))
            N, wanted = torch.zeros(len(log), len(log)).to(log), torch.zeros_like(log)
            for basis, one, rest in zip(own, q, left, strict=True):
                N += one[:, None] * (torch.eye(len(log)).to(log) - basis @ basis.mT) * one
                wanted += one * (rest - basis @ (basis.mT @ rest))
            weight = noise / error.square()
            factor = torch.linalg.cholesky(N + torch.diag(weight))
            step = torch.cholesky_solve((wanted + weight * (prior - log))[:, None], factor)[:, 0]
            log = log + step.clamp(-FAR, FAR)
            spaces = run.spaces.with_deviation(log.exp() / rough.sigma)
            mask = evidence(at.g, at.y, at.h, run.weight, dropped=False) > 0
            mask = mask[at.residual < OUTLIERS * at.residual.median()]
        residual = float(_at(run, spaces, mask)[0].residual.median())
        if residual < FITS:
            spread = noise * torch.cholesky_inverse(factor)
            common = float(spread.mean().sqrt())
            each = (spread.diagonal() - 2 * spread.mean(1) + common**2).clamp_min(noise).sqrt()
            return Calibrated(Deviation(log.exp(), each, told=False, common=common), residual)
    return None


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
