"""Phase retrieval on (g, y): relaxed reflections between a plane and the units' pieces, then plain projections.

A unit is active, (h_j, y_j ≥ 0), or not, (0, y_j ≤ 0), or dropped, (0, y_j); h = heads · d is refitted on the active
units as it goes, towards what the forward pass makes of y.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from spear.directions import TINY
from spear.normalisation.exact_step import evidence
from spear.normalisation.spaces import Plane

STEPS, PLAIN, RELAXATION = 200, 30, 0.5  # reflections, projections after them; the step of a reflection
FIRST_FIT, FITS = 20, 5  # steps before d is fitted for the first time, and between fits
FLOOR = 1e-3  # of the mean square of all h: keeps the fit of few active units from being singular


@dataclass(frozen=True)
class Pieces:
    """What reflections are told: `heads` (m, c), the `weight` of y beside g, the share `drop` of units dropped."""

    heads: Float[Tensor, "m c"]
    weight: float
    drop: float = 0.0

    def fit(
        self, active: Bool[Tensor, "k m"], g: Float[Tensor, "k m"], prior: Float[Tensor, "k c"], ridge: float
    ) -> Float[Tensor, "k c"]:
        """d by ridge regression of the active entries of g, towards `prior`."""
        m, c = self.heads.shape
        pairs = (self.heads[:, :, None] * self.heads[:, None, :]).reshape(m, c * c)
        gram = (active.to(g) @ pairs).reshape(-1, c, c)
        size = ridge * gram.diagonal(dim1=1, dim2=2).mean(1) + FLOOR * m * float(pairs.abs().mean())
        eye = torch.eye(c, dtype=g.dtype, device=g.device)
        wanted = (active * g) @ self.heads + size[:, None] * prior
        return torch.linalg.solve(gram + size[:, None, None] * eye, wanted[:, :, None])[:, :, 0]


@dataclass(frozen=True)
class Projector:
    """The orthogonal projection of (g, weight · y) on a plane, in single precision."""

    origin: Float[Tensor, " m2"]
    basis: Float[Tensor, "m2 k2"]

    @classmethod
    def of(cls, plane: Plane, weight: float) -> "Projector":
        basis = torch.linalg.qr(torch.cat([plane.g_basis, weight * plane.y_basis]))[0].float()
        origin = torch.cat([plane.g0, weight * plane.y0]).float()
        return cls(origin - basis @ (basis.mT @ origin), basis)

    def __call__(self, v: Float[Tensor, "k m2"]) -> Float[Tensor, "k m2"]:
        return self.origin + (v @ self.basis) @ self.basis.mT


def search(
    plane: Plane,
    pieces: Pieces,
    d: Float[Tensor, "k c"],
    *,
    targets: Callable[[Tensor], Tensor],
    ridge: float,
    generator: Generator,
    until: float = math.inf,
) -> tuple[Bool[Tensor, "k m"], Float[Tensor, " k"]]:
    """From starts with these d and y at random: where each ends, its mask and relative distance from its pieces.

    `targets` makes of the activations of each start the d of its forward pass. All end when `time.monotonic` shows
    `until`.
    """
    project, d, m = Projector.of(plane, pieces.weight), d.float(), len(plane.g0)
    noise = torch.randn(len(d), m, generator=generator, dtype=torch.float64).to(plane.g0).float()
    y = project(torch.cat([torch.zeros_like(noise), noise], 1))[:, m:]
    y = y * (pieces.weight * math.sqrt(m) / y.norm(dim=1, keepdim=True).clamp_min(TINY))
    kept = torch.rand(y.shape, generator=generator).to(y) >= pieces.drop
    v = torch.cat([((y > 0) & kept) * (d @ pieces.heads.mT), y], 1)
    for k in range(STEPS + PLAIN):
        g, y, h = v[:, :m], v[:, m:], d @ pieces.heads.mT
        active = evidence(g, y, h, 1.0, dropped=pieces.drop > 0) > 0
        nearest = torch.cat([active * h, torch.where(active, y.clamp_min(0), y if pieces.drop else y.clamp_max(0))], 1)
        if k < STEPS:
            on = project(2 * nearest - v)
            v = v + RELAXATION * (on - nearest)
        else:
            v = on = project(nearest)
        if time.monotonic() > until:
            break
        if k >= FIRST_FIT and k % FITS == 0:
            positive = on[:, m:].clamp_min(0) / pieces.weight
            d = pieces.fit(active, on[:, :m], targets(positive * active if pieces.drop else positive), ridge)
    target = nearest[:, :m]
    return active, (target - v[:, :m]).norm(dim=1) / target.norm(dim=1).clamp_min(1e-9)
