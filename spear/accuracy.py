"""What may be asked of numbers that arrived with a rounding: every threshold that follows from its unit, with a reason.

Lowest floor: the attack, its certificates and the judge ask the same.
"""

from dataclasses import dataclass

import torch

FINE = 2e-12  # rounding units under this are float64's, a change of weights included: the algebra is then the limit
SHARP = 1e-10  # the same for what is asked of inputs; of a dtype, however small a step was: only float64 is under it


@dataclass(frozen=True)
class Accuracy:
    """Thresholds for gradients of relative spacing `eps` (`torch.finfo`); sines and residuals are relative.

    In double precision the pivots and squares of the linear algebra set them, below it the data's own rounding.
    """

    recovered: float
    """Relative error under which an input counts as recovered, and up to which it may be certified."""
    layer: float
    """What a layer's gradient may have beyond the sum of the samples': some hundred roundings, 1e-9 of algebra."""
    explained: float
    """Misfit at which corrections end: rounding, which no step takes away."""
    completed: float
    """Residual of the entries that arrived at which a completed gradient fits them."""
    certain: float
    """Sine that a sample certain by itself stays under: rounding, amplified by a typical batch's conditioning."""
    direction: float
    """Sine to a layer's gradient of a mask's solution: eigenvalues are known to the root of rounding."""
    projection: float
    """Sine of a sample found by projections: the root of a difference of roundings, 1e-8 at best."""
    faint: float
    """Share of the mean |h_j| under which u_j cannot tell 0 from h_j; the pre-activation then decides."""
    weight: float
    """Relative difference at which a weight read at the top and one read from all biases are the same."""
    same: float
    """Relative distance of two candidates that are one sample, between solving for it twice and two images alike."""

    @classmethod
    def of(cls, eps: float, dtype: torch.dtype | None = None) -> "Accuracy":
        """For gradients whose entries are `eps` of their size apart; `dtype` is the coarsest on their way."""
        fine, spacing = eps < FINE, eps if dtype is None else torch.finfo(dtype).eps
        return cls(
            recovered=1e-6 if spacing < SHARP else 1e-3,
            layer=max(1e-9, 50 * eps),
            explained=250 * eps,
            completed=max(1e-13, 4 * eps),
            certain=1e-9 if fine else 1e-5,
            direction=1e-7 if fine else 1e-3,
            projection=1e-6 if fine else 1e-3,
            faint=1e-4 if fine else 0.03,
            weight=1e-6 if fine else 1e-2,
            same=1e-4 if fine else 0.02,
        )

    @classmethod
    def of_dtype(cls, dtype: torch.dtype) -> "Accuracy":
        """For tensors as they came; integers (pixels) are no more exact than single precision."""
        return cls.of(torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps)
