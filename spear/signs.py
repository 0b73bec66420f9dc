"""Normal vectors of which linear functions have known signs: where they are likely to be, and what stays open of them.

A logistic regression with a normal prior, all vectors at once: its Newton steps take one mean curvature for all, so
that a step is a few products of matrices. In single precision. Vectors are rows.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import TINY

SOFTNESS = 0.05  # of a sign, in standard deviations of its function: a mean lies inside its cone, not on the edge
WIDEST, NARROWING = 0.6, 0.5  # softness at first, and by how much it lessens in a step
STEPS = 24  # of regression
DAMPING = 2.0  # of Newton steps, whose curvature is a mean
FRESH = 5  # steps for which a curvature serves once the softness stays


def given_signs(
    slope: Float[Tensor, "m r"], offset: Float[Tensor, "f m"], sign: Float[Tensor, "f m"], variance: Float[Tensor, ""]
) -> tuple[Float[Tensor, "f r"], Float[Tensor, "r r"]]:
    """About the mean of each normal a, of that variance in every direction, given the signs of offset + slope a.

    The signs of a row are known up to one for all of them. Also returns the covariance of what is left, a mean over
    the rows. Numbers past single precision, as of dependent functions, leave NaN.
    """
    size = (offset.pow(2).mean(0) + variance * slope.pow(2).sum(1)).sqrt().clamp_min(TINY)
    slope, offset = (slope / size[:, None]).float(), (offset / size).float()
    sign = sign.float()
    sign = sign * (offset * sign).sum(1, keepdim=True).sign()
    prior = torch.eye(slope.shape[1], dtype=slope.dtype, device=slope.device) / variance.float()
    a = slope.new_zeros(len(offset), slope.shape[1])
    for step in range(STEPS):
        softness = max(SOFTNESS, WIDEST * NARROWING**step)
        against = torch.sigmoid(-(offset + a @ slope.T) * sign / softness)
        if step % FRESH == 0 or softness > SOFTNESS:
            curvature = (slope.T * (against * (1 - against)).mean(0)) @ slope / softness**2
            factor = torch.linalg.cholesky_ex(DAMPING * curvature + prior)[0]
        rise = (against * sign / softness) @ slope - a @ prior
        a = a + torch.cholesky_solve(rise.T, factor).T
    return a, torch.cholesky_inverse(torch.linalg.cholesky_ex(curvature + prior)[0])
