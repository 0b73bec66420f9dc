"""Starts that keep away from solved samples: what these disclose of their s, and what that forbids the others.

With x_k = s_k / S duality reads ⟨x_k, t_i⟩ = [k = i]: the t of an unsolved sample is orthogonal to the x of every
solved one. Solved t tell x_k but for a part orthogonal to all of them, and the mask tells something of that part:
z_k = lift s_k is positive exactly where the unit is active (`spear.signs`). How much stays unknown is foretold as well,
so that a start is held back from solved samples, not from those which the errors of the means resemble.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spear.directions import TINY, quick, times
from spear.network.spaces import Solved, Spaces
from spear.signs import given_signs

FORCE = 0.03  # on a start, times what a solved sample shows of it over what the blur lets an unsolved one show
DEPENDENT = 1e6  # an x so large says that solved directions are a combination of each other
FLOOR = 0.05  # of the mean blur: the least that a start is granted


@dataclass(frozen=True)
class Repulsion:
    """How projection on span(U) treats starts: in the axes where sum_k x_k x_kᵀ is diagonal they are drawn to zero.

    `basis` is U in these axes, `pull` the diagonal, divided by the number of solved samples; `blur` is the mean
    covariance of what is not known of an x.
    """

    basis: Float[Tensor, "m b"]
    pull: Float[Tensor, " b"]
    blur: Float[Tensor, "b b"]

    @classmethod
    def of(cls, spaces: Spaces, solved: Solved) -> "Repulsion | None":
        """By the solved samples of a problem; `None` without any, and where they depend on each other."""
        if not len(solved):
            return None
        x, blur = duals(spaces, solved)
        if not bool((x.abs().amax() < DEPENDENT) & blur.isfinite().all()):
            return None
        pull, axes = torch.linalg.eigh(x.T @ x / len(x))
        return cls(quick(spaces.basis.float() @ axes), pull.clamp_min(0), axes.T @ blur @ axes)

    def shares(self, u: Float[Tensor, "k m"]) -> Float[Tensor, "k b"]:
        """What stays of each axis for every start: less where solved samples lie, unless the start is like blur."""
        t = times(u, self.basis)
        blurred = ((t @ self.blur) * t).sum(1) / t.pow(2).sum(1).clamp_min(TINY)
        granted = blurred + FLOOR * self.blur.diagonal().mean()
        return 1 / (1 + FORCE * self.pull / granted[:, None])

    def project(self, u: Float[Tensor, "k m"], shares: Float[Tensor, "k b"]) -> Float[Tensor, "k m"]:
        """Each u on span(U), with these shares of its axes."""
        return times(times(u, self.basis) * shares, self.basis.T)


def duals(spaces: Spaces, solved: Solved) -> tuple[Float[Tensor, "f b"], Float[Tensor, "b b"]]:
    """Posterior means of the solved samples' x = s / S, ⟨x_k, t_k⟩ = 1, and the mean covariance of what they lack.

    In single precision. The prior is normal, in every unknown direction of the size that the known part shows.
    """
    count = len(solved)
    q, triangle = torch.linalg.qr(solved.t.T, mode="complete")
    told = torch.linalg.solve_triangular(triangle[:count], q[:, :count].T, upper=True).float()
    free = q[:, count:].float()
    lift = (torch.cat([spaces.lift, spaces.rows[:, -1:].T]) * spaces.singular).float()
    sign = F.pad(2 * solved.mask.float() - 1, (0, 1), value=1.0)  # the last entry of [y; 1] is one
    a, covariance = given_signs(lift @ free, told @ lift.T, sign, told.pow(2).mean() * told.shape[1] / count)
    return told + a @ free.T, free @ covariance @ free.T
