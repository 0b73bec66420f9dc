"""One layer, all that it knows: the zero pattern of G and the signs of Z are one and the same.

    G = L Q      Z = B V, V = Q^-T      supp(G) = {Z > 0}

Both sides are linear in one unknown, and the ReLU couples them row by row. At initialisation q_i and v_i are nearly
parallel, so a start v = q = a row of L is led to a column by relaxed reflections between the two linear spaces and the
coupled signs. The sign of v is known, since V^T d = 1. Vectors are rows: g, z are (starts, m), q (starts, b).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from spear.columns import Lengths, collect, draw, unit
from spear.filtering import Observed
from spear.search import Budget, Found, Progress

DAMPING = 4  # times the coupling: how strongly q is drawn away from the directions where v has nothing
SINGULAR = 1e-12  # of the largest singular value of B N: what is under it counts as it
LENGTHS = Lengths(shortest=50, longest=450)


@dataclass(frozen=True)
class Stage:
    """A part of the schedule: its steps, the relaxation, and how strongly signs and q, v are coupled.

    A row is inactive if z < 0 and g^2 < `trust` z^2; `coupling` is the weight of q ~ v in the linear step. The `kept`
    share of the starts, those whose g is nearest to its space, goes on to the next stage.
    """

    steps: int
    relaxation: float
    trust: float
    coupling: float
    kept: float = 1.0


SETTLING = (
    Stage(60, 0.4, 10.0, 0.05),
    Stage(40, 0.4, 3.0, 0.02, kept=0.75),
    Stage(100, 0.4, 3.0, 0.02),
    Stage(100, 0.4, 3.0, 0.0),
)


def schedule(steps: int, *, coupled: bool = True) -> tuple[Stage, ...]:
    """The search itself, of that many steps, and the stages in which it settles; without coupling of q and v."""
    stages = (Stage(steps, 1.0, 20.0, 0.1), *SETTLING)
    return stages if coupled else tuple(replace(stage, coupling=0.0) for stage in stages)


def operations(observed: Observed, count: int, steps: int) -> int:
    """Multiplications and additions of `reflect`, about: four products of (k, m, b) for each step of k starts."""
    total, stages = 0.0, schedule(steps)
    for stage in stages:
        total, count = total + count * stage.steps, math.ceil(stage.kept * count)
    return round(8 * observed.L.numel() * total)


def search(
    observed: Observed,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None = None,
    *,
    goal: float | int = 1,
) -> Found:
    """All columns of Q from the layer's weights and gradient.

    Two searches take turns. One starts at rows of L with q = v and couples them. The other lets q and v go their ways,
    as they do in trained networks and deep layers, half of them from starts in which every sample has a like share.
    """
    observed = observed.alive()

    def coupled(free: Tensor, count: int, steps: int, generator: torch.Generator) -> Tensor:
        v = draw(observed, free, count, generator)
        return reflect(observed, v, v, free, schedule(steps))

    def apart(free: Tensor, count: int, steps: int, generator: torch.Generator) -> Tensor:
        rows = draw(observed, free, count // 2, generator)
        q, v = balanced(observed, free, count - count // 2, generator)
        return reflect(observed, torch.cat([rows, q]), torch.cat([rows, v]), free, schedule(steps, coupled=False))

    return collect(observed, (coupled, apart), LENGTHS, budget, seed, progress, goal=goal)


def balanced(
    observed: Observed, free: Float[Tensor, "b r"], count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "k b"], Float[Tensor, "k b"]]:
    """Starts q and v in which every sample has a like share, however small its gradient is.

    A row of L is a mixture of the samples by the size of their gradients, which in a trained network differ by many
    orders. As X^T = V^T R, a v for which N^T R has white coefficients, v = N (N^T R R^T N)^-1/2 w with w normal, mixes
    the samples by the size of their inputs alone. q follows from the signs of v: the projection of max(B v, 0).
    """
    values, vectors = torch.linalg.eigh(free.mT @ (observed.R @ observed.R.mT) @ free)
    white = torch.randn(count, len(values), generator=generator, dtype=free.dtype).to(free.device)
    v = white * values.clamp_min(1e-300).rsqrt() @ vectors.mT @ free.mT
    if observed.d is not None:
        v = torch.where((v @ observed.d < 0)[:, None], -v, v)
    return unit((v @ observed.B.mT).clamp_min(0) @ observed.L), unit(v)


def reflect(
    observed: Observed,
    q: Float[Tensor, "k b"],
    v: Float[Tensor, "k b"],
    free: Float[Tensor, "b r"],
    stages: Sequence[Stage],
) -> Float[Tensor, "j b"]:
    """Relaxed reflections from starts q, v towards columns whose v lies in the span of `free`, in float32.

    x = (g, z) is reflected at the coupled signs and projected on the linear spaces, where q and v are drawn together:
    x + relaxation (P_A(2 P_B x - x) - P_B x). Norms stay at sqrt(m). Four products of (k, m, b) a step. Of k starts
    those come back that no stage dropped.
    """
    L, m = observed.L.float(), len(observed.L)
    basis, triangle = torch.linalg.qr(observed.B @ free)  # z = B free w = basis c with c = triangle w
    C = basis.float()
    g = math.sqrt(m) * unit(q).float() @ L.mT
    z = math.sqrt(m) * unit(v @ free @ triangle.mT).float() @ C.mT
    for stage in stages:
        linear, half = couple(triangle, free, stage.coupling), stage.relaxation / 2
        for _ in range(stage.steps):
            inactive = torch.add(g.abs(), z, alpha=math.sqrt(stage.trust)) < 0
            rg, rz = torch.where(inactive, -g, g), torch.where(inactive, z, z.abs())
            q, c = linear.solve(rg @ L, rz @ C)
            # P_B x is the mean of x and its reflection
            g.mul_(1 - half).sub_(rg, alpha=half).addmm_(math.sqrt(m) * unit(q), L.mT, alpha=2 * half)
            z.mul_(1 - half).sub_(rz, alpha=half).addmm_(math.sqrt(m) * unit(c), C.mT, alpha=2 * half)
        g = torch.where(inactive, 0, g)
        near = torch.linalg.vector_norm(g @ L, dim=1) / torch.linalg.vector_norm(g, dim=1).clamp_min(1e-30)
        best = near.argsort(descending=True)[: math.ceil(stage.kept * len(g))]
        g, z = g[best], z[best]
    return unit(g @ L)


@dataclass(frozen=True)
class Coupling:
    """The linear step: minimise |L q - r_g|^2 + |B N w - r_z|^2 + k |N^T q - t w|^2, and draw q towards the span of N.

    With k' = k / (1 + k) and orthonormal L: w = (N^T B^T B N + k' t^2)^-1 (N^T B^T r_z + k' t N^T L^T r_g), and the
    part of q in N is (N^T L^T r_g + k t w) / (1 + k). The matrices below map rows of coordinates; c = triangle w.
    """

    free: Float[Tensor, "b r"]
    from_z: Float[Tensor, "r r"]
    from_q: Float[Tensor, "r r"]
    to_q: Float[Tensor, "r r"]
    kept: float
    rest: float

    def solve(
        self, a: Float[Tensor, "k b"], e: Float[Tensor, "k r"]
    ) -> tuple[Float[Tensor, "k b"], Float[Tensor, "k r"]]:
        """q and c for a = L^T r_g and e = basis^T r_z."""
        own = a @ self.free
        c = e @ self.from_z + own @ self.from_q
        return self.rest * a + (c @ self.to_q + (self.kept - self.rest) * own) @ self.free.mT, c


def couple(triangle: Float[Tensor, "r r"], free: Float[Tensor, "b r"], k: float) -> Coupling:
    """The linear step at coupling k: `triangle` is that of a QR decomposition of B N."""
    U, s, Vh = torch.linalg.svd(triangle)
    s = s.clamp_min(SINGULAR * s[0])
    t, weight = float(triangle.norm()) / math.sqrt(len(s)), k / (1 + k)
    damped = s / (s**2 + weight * t**2)
    maps = (U * (s * damped) @ U.mT, weight * t * (Vh.mT * damped) @ U.mT, weight * t * (U / s) @ Vh)
    return Coupling(free.float(), *(each.float() for each in maps), 1 - weight, 1 / (1 + DAMPING * k))
