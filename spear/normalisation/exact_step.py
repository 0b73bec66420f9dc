"""A sample for a fixed mask D: g = D ∘ h is linear in its place in the plane and in d, and solved by least squares."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.directions import TINY
from spear.normalisation.spaces import Plane

SETTLING = 3  # renewals of a mask before doubtful rows are left out
TRIMS = 2  # times that they are
RIDGE = 1e-13  # of the mean diagonal, for normal equations whose solution tells masks only


@dataclass(frozen=True)
class Solution:
    """The best (x, d) of each mask, g, h and y there, and |D ∘ h - g| / |D ∘ h|."""

    x: Float[Tensor, "k k2"]
    d: Float[Tensor, "k c"]
    g: Float[Tensor, "k m"]
    h: Float[Tensor, "k m"]
    y: Float[Tensor, "k m"]
    residual: Float[Tensor, " k"]

    def __getitem__(self, index: Int[Tensor, " j"] | Bool[Tensor, " k"]) -> "Solution":
        return Solution(*(getattr(self, name)[index] for name in ("x", "d", "g", "h", "y", "residual")))


@dataclass(frozen=True)
class ExactStep:
    """Least squares in a plane: its g-basis, factorised once, serves every mask. `heads` (m, c) spans the h."""

    plane: Plane
    heads: Float[Tensor, "m c"]
    basis: Float[Tensor, "m k2"]
    triangle: Float[Tensor, "k2 k2"]

    @classmethod
    def of(cls, plane: Plane, heads: Float[Tensor, "m c"]) -> "ExactStep":
        return cls(plane, heads, *torch.linalg.qr(plane.g_basis))

    def __call__(self, mask: Bool[Tensor, "k m"]) -> Solution:
        """All rows: what D ∘ heads has outside the basis gives d, then d gives x."""
        k, m, c = len(mask), *self.heads.shape
        masked = (mask[:, :, None] * self.heads).mT.reshape(k * c, m)
        inside = masked @ self.basis
        outside = (masked - inside @ self.basis.mT).reshape(k, c, m).mT
        origin = self.plane.g0 @ self.basis
        Q, R = torch.linalg.qr(outside)
        wanted = Q.mT @ (self.plane.g0 - self.basis @ origin)[:, None]
        d = _solve_triangular(R, wanted)
        x = (d[:, None] @ inside.reshape(k, c, -1))[:, 0] - origin
        return self._at(mask, _solve_triangular(self.triangle, x[:, :, None]), d)

    def sure(self, margin: Float[Tensor, "k m"]) -> Int[Tensor, "k j"]:
        """The rows of most margin: all but half of those that the unknowns do not need."""
        spare = len(self.heads) - self.plane.g_basis.shape[1] - self.heads.shape[1]
        return margin.topk(len(self.heads) - max(spare, 0) // 2, dim=1).indices

    def trimmed(self, mask: Bool[Tensor, "k m"], margin: Float[Tensor, "k m"]) -> Solution:
        """By the rows that are sure."""
        rows = self.sure(margin)
        A = torch.cat([self.plane.g_basis.expand(len(mask), -1, -1), mask[:, :, None] * -self.heads], 2)
        A = A.gather(1, rows[:, :, None].expand(-1, -1, A.shape[2]))
        wanted = -self.plane.g0[rows]
        gram = A.mT @ A
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        factor = torch.linalg.cholesky_ex(gram + ridge * torch.eye(A.shape[2], dtype=A.dtype, device=A.device))[0]
        both = torch.cholesky_solve(A.mT @ wanted[:, :, None], factor)[:, :, 0]
        k2 = self.plane.g_basis.shape[1]
        return self._at(mask, both[:, :k2], both[:, k2:])

    def _at(self, mask: Bool[Tensor, "k m"], x: Float[Tensor, "k k2"], d: Float[Tensor, "k c"]) -> Solution:
        h, place = d @ self.heads.mT, self.plane
        g, y = place.g0 + x @ place.g_basis.mT, place.y0 + x @ place.y_basis.mT
        target = mask * h
        residual = (target - g).norm(dim=1) / target.norm(dim=1).clamp_min(TINY)
        return Solution(x, d, g, h, y, residual.nan_to_num(torch.inf, torch.inf))

    @property
    def pivots(self) -> Float[Tensor, " k2"]:
        return self.triangle.diagonal().abs()


def _solve_triangular(triangle: Tensor, wanted: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(triangle, wanted, upper=True)[..., 0]


def evidence(
    g: Float[Tensor, "k m"], y: Float[Tensor, "k m"], h: Float[Tensor, "k m"], weight: float, *, dropped: bool
) -> Float[Tensor, "k m"]:
    """How much nearer (g, y) is to an active unit, (h, y ≥ 0), than to an inactive one, (0, y ≤ 0), squared.

    `weight` is that of y. Where units may be `dropped`, an inactive one has any y.
    """
    near = g.square() - (g - h).square() - (weight * y.clamp_max(0)).square()
    return near if dropped else near + (weight * y.clamp_min(0)).square()


def settle(
    step: ExactStep, mask: Bool[Tensor, "k m"], *, accept: float, near: float, weight: float, dropped: bool
) -> Bool[Tensor, "j m"]:
    """Masks of samples, of masks near them: renewed as they are, then with doubtful rows left out.

    Solved is a mask with a residual under `accept` that is that of its own y, or a part of it where units may be
    `dropped`; renewed are those under `near`.
    """
    solved = []
    for k in range(SETTLING + 1):
        at = step(mask)
        own = at.y > 0
        good = (at.residual < accept) & ((mask & own if dropped else own) == mask).all(1)
        solved.append(mask[good])
        at = at[~good & (at.residual < near)]
        if not len(at.residual):
            break
        for _ in range(TRIMS * (k == SETTLING - 1)):
            sure = evidence(at.g, at.y, at.h, weight, dropped=dropped)
            at = step.trimmed(sure > 0, sure.abs())
        by_y = k == SETTLING - 1 and not dropped
        mask = at.y > 0 if by_y else evidence(at.g, at.y, at.h, weight, dropped=dropped) > 0
    return torch.cat(solved)
