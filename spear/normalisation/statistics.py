"""The deviation σ of a batch in front of BatchNorm: from the buffers that the client sends, or from the gradient alone.

BatchNorm does not feel the scale of a row of W but for its epsilon: x̂ has the variance 1 - ε/σ². Hence

    ∂L/∂W_j · W_j = γ_j ∂L/∂γ_j ε / σ_j²

which tells σ from what every update holds, as far as the rounding of the left side, a sum that nearly vanishes, lets
it.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.certificate import SAFETY
from spear.normalisation.problem import Norm

ROUGH = 0.1  # relative error of σ² beyond which epsilon tells nothing of a unit
TOLD = 1e-5  # relative error of σ up to which all units serve, where none can be left out
SPREAD = 10  # times the median error up to which a unit is used
CONSISTENT = 100  # roundings by which buffers and epsilon may differ where both tell
MOST_WRONG = 0.02  # share of the units that may differ by more, by chance
EITHER = "the running variance may be over all entries or over one less, and epsilon does not show which"
FEWEST = 4  # units that tell a factor common to all


@dataclass(frozen=True)
class Deviation:
    """σ (m,) of a batch, the relative `error` (m,) that rounding leaves in it, and whether buffers `told` it.

    By a factor all of them may be off beside that, by `common`, relative. `biased` says that the buffers take a batch's
    variance over b, as Flax and Keras do, not over b - 1, as torch does.
    """

    sigma: Float[Tensor, " m"]
    error: Float[Tensor, " m"]
    told: bool
    common: float = 0.0
    biased: bool = False

    @property
    def known(self) -> Bool[Tensor, " m"]:
        """Of which units it is known well enough to be used: nearly as well as of most."""
        return self.error < min(ROUGH, SPREAD * float(self.error.median()))

    @property
    def usual(self) -> float:
        """Root mean square error of the known ones."""
        known = self.error[self.known]
        return float(known.square().mean().sqrt()) if len(known) else float("inf")

    def of_all(self) -> "Deviation":
        """The same where every unit must serve: as well known as most, if none is known badly."""
        usual = float(self.error.square().mean().sqrt())
        return replace(self, error=torch.full_like(self.error, usual)) if usual < TOLD else self

    def together(self) -> "Deviation":
        """The same with the common error in each one's."""
        return replace(self, error=torch.hypot(self.error, torch.full_like(self.error, self.common)), common=0.0)


def deviation(
    norm: Norm, weight: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"], eps: float, size: int
) -> Deviation:
    """σ of the batch in front of a BatchNorm: by its buffers where these agree with the gradient, else by epsilon.

    `eps` is the relative rounding of the update, `size` that of the batch.
    """
    alone = from_epsilon(norm, weight, gradient, eps)
    if norm.variance is None:
        return alone
    both = (from_buffers(norm, eps, size, biased=biased) for biased in (False, True))
    told = [one for one in both if _agree(one, alone)]
    if len(told) < 2:
        return told[0] if told else alone  # its buffers are not those of this batch
    nearer = [one for one in told if _agree_in_common(one, alone)]
    return (
        nearer[0]
        if len(nearer) == 1
        else replace(told[0], common=float((told[1].sigma / told[0].sigma - 1).abs().max()))
    )


def _agree(told: Deviation, alone: Deviation) -> bool:
    """Whether nearly all units have the σ that epsilon tells, of those of which it tells it well."""
    tolerance = CONSISTENT * (told.error + alone.error)
    apart = (told.sigma / alone.sigma - 1).abs() > tolerance
    return int((apart & (tolerance < ROUGH)).sum()) <= MOST_WRONG * len(apart)


def _agree_in_common(told: Deviation, alone: Deviation) -> bool:
    """Whether the median unit has, within what the scatter of all leaves of a median."""
    off = (told.sigma / alone.sigma - 1)[alone.error < ROUGH]
    if len(off) < FEWEST:
        return True
    scatter = float((off - off.median()).abs().median()) / len(off) ** 0.5
    return abs(float(off.median())) <= SAFETY * (scatter + float(told.error.median()))


def from_buffers(norm: Norm, eps: float, size: int, *, biased: bool = False) -> Deviation:
    """σ by the running variance after the step, which takes a batch's variance over b - 1, or `biased` over b."""
    squared = norm.variance * (1 if biased else 1 - 1 / size) + norm.eps
    return Deviation(squared.sqrt(), (norm.variance_error / squared).clamp_min(eps), told=True, biased=biased)


def from_epsilon(norm: Norm, weight: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"], eps: float) -> Deviation:
    """σ by ∂L/∂W_j · W_j; the error of a unit of which that tells nothing is infinite."""
    trace = (weight * gradient).sum(1)
    noise = eps * (weight * gradient).pow(2).sum(1).sqrt()
    wanted = norm.scale * norm.scale_gradient * norm.eps
    squared = wanted / trace
    good = (squared > norm.eps / 2) & squared.isfinite()
    error = torch.where(good, noise / trace.abs() / 2 + eps, torch.inf)
    usual = squared[good].median() if good.any() else squared.new_tensor(1.0)
    return Deviation(torch.where(good, squared, usual).sqrt(), error, told=False)
