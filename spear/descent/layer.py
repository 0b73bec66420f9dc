"""One layer, all that it knows: the zero pattern of G and the signs of Z are one and the same.

    G = L Q      Z = B V, V = Q^-T      supp(G) = {Z > 0}

Both sides are linear in one unknown, and the ReLU couples them row by row. What ties a column q to its v beside that,
`spear.descent.coupling` foretells. A row of L, as v, is led to a column by relaxed reflections between the two linear
spaces and the coupled signs, and where it comes near, `spear.descent.sharpening` takes it there. The sign of v is
known, since V^T d = 1. Vectors are rows: g, z are (starts, m), q (starts, b).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from spear.descent.columns import Lengths, collect, draw
from spear.descent.coupling import Coupling, Prior, uncoupled
from spear.descent.sharpening import columns_near
from spear.directions import quick, times, unit_rows
from spear.published.greedy import Candidates
from spear.published.view import Observed
from spear.reconstruction import Terms

LENGTHS = Lengths(shortest=60, longest=240, factor=2, few=0.15, many=0.35, starts=48, idle=20)


@dataclass(frozen=True)
class Stage:
    """A part of the schedule: its steps, the relaxation, and how strongly signs and q, v are coupled.

    A row is inactive if z < 0 and g^2 < `trust` z^2; `coupling`, `ridge` and `parting` are weights in the linear step
    (`Coupling.step`). The `kept` share of the starts, those whose g is nearest to its space, goes on to the next stage.
    """

    steps: int
    relaxation: float
    trust: float
    coupling: float
    ridge: float = 0.0
    parting: float = 0.0
    kept: float = 1.0


APART = (
    Stage(60, 0.4, 10.0, 0.0, parting=0.15),
    Stage(40, 0.4, 3.0, 0.0, parting=0.15, kept=0.75),
    Stage(200, 0.4, 3.0, 0.0, parting=0.15),
)


def schedule(steps: int, *, coupled: bool = True) -> tuple[Stage, ...]:
    """The search itself, of that many steps; and where q and v are not coupled, the stages in which it settles."""
    if coupled:
        return (Stage(steps, 1.0, 8.0, 0.3, 0.02, 0.15),)
    return Stage(steps, 1.0, 20.0, 0.0, parting=0.15), *APART


def operations(observed: Observed, count: int, steps: int) -> int:
    """Multiplications and additions of `reflect` while no column is known, for k starts and each step.

    Four products of (k, m, b) and one of (k, 2b, 2b).
    """
    (m, b), total = observed.L.shape, 0
    for stage in schedule(steps):
        total, count = total + count * stage.steps, math.ceil(stage.kept * count)
    return 2 * (2 * m * 2 * b + (2 * b) ** 2) * total


@dataclass(frozen=True)
class Coupled:
    """One layer, all it knows: its weights and gradient coupled; it stands noise."""

    name: ClassVar[str] = "layer"
    stands_noise: ClassVar[bool] = True

    def search(
        self, observed: Observed, terms: Terms, device: str | torch.device | None = None, goal: float | int = 1
    ) -> Candidates:
        """All columns of Q, or of noisy ones as many as explain the layer to lambda = `goal`; where `observed` is."""
        return find_columns(observed, terms, goal=goal)


def find_columns(observed: Observed, terms: Terms, *, goal: float | int = 1) -> Candidates:
    """All columns of Q from the layer's weights and gradient.

    Three searches take turns. One starts at rows of L, v, with q = M v, and couples them. The second lets q and v go
    their ways, as they do in trained networks and for the last samples of a batch, half of them from starts in which
    every sample has a like share, and keeps q away from where known columns tell that no other is. The third does not:
    where most neurons agree on all samples, as in deep layers, the v of known columns are not what their signs tell.
    """
    observed = observed.alive()
    given = Prior(observed)

    def coupled(known: Tensor, count: int, steps: int, generator: torch.Generator) -> Tensor:
        coupling = given(known)
        v = draw(observed, coupling.free, count, generator)
        q, z = reflect(observed, coupling, v @ coupling.moment, v, schedule(steps), terms.budget.until)
        given.learn(q)
        return columns_near(observed.L.float(), q, z, tolerance=observed.tolerance)

    def apart(nothing: Coupling, count: int, steps: int, generator: torch.Generator) -> Tensor:
        rows = draw(observed, nothing.free, count // 2, generator)
        q, v = balanced(observed, nothing.free, count - count // 2, generator)
        starts = torch.cat([rows, q]), torch.cat([rows, v])
        q, z = reflect(observed, nothing, *starts, schedule(steps, coupled=False), terms.budget.until)
        return columns_near(observed.L.float(), q, z, tolerance=observed.tolerance)

    def confined(known: Tensor, count: int, steps: int, generator: torch.Generator) -> Tensor:
        return apart(given.uncoupled(known), count, steps, generator)

    def free(known: Tensor, count: int, steps: int, generator: torch.Generator) -> Tensor:
        return apart(uncoupled(known), count, steps, generator)

    return collect(observed, (coupled, confined, free), LENGTHS, terms, name="layer", goal=goal)


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
    v = observed.signed(white * values.clamp_min(1e-300).rsqrt() @ vectors.mT @ free.mT)
    return unit_rows((v @ observed.B.mT).clamp_min(0) @ observed.L), unit_rows(v)


def reflect(
    observed: Observed,
    coupling: Coupling,
    q: Float[Tensor, "k b"],
    v: Float[Tensor, "k b"],
    stages: Sequence[Stage],
    until: float = math.inf,
) -> tuple[Float[Tensor, "j b"], Float[Tensor, "j m"]]:
    """Relaxed reflections from starts q, v towards columns whose v lies in the span of `coupling.free`, in float32.

    x = (g, z) is reflected at the coupled signs and projected on the linear spaces, where q and v are drawn together:
    x + relaxation (P_A(2 P_B x - x) - P_B x). Norms stay at sqrt(m). Four products of (k, m, b) a step. Of k starts
    those come back, as q and z, that no stage dropped. Steps end when the clock (`time.monotonic`) shows `until`.
    """
    (m, b), full = observed.L.shape, observed.L.float()
    basis, triangle = torch.linalg.qr(observed.B @ coupling.free)  # z = B free w = basis c with c = triangle w
    L, C = quick(full), quick(basis.float())
    g = math.sqrt(m) * times(unit_rows(q).float(), L.mT)
    z = math.sqrt(m) * times(unit_rows(v @ coupling.free @ triangle.mT).float(), C.mT)
    for stage in stages:
        step = quick(coupling.step(triangle, stage.coupling, stage.ridge, stage.parting).float())
        half = stage.relaxation / 2
        for _ in range(stage.steps):
            active = torch.add(g.abs(), z, alpha=math.sqrt(stage.trust)).sign_()  # -1 where inactive, and z < 0 there
            rg, rz = g * active, z.abs() * active
            both = times(torch.cat([times(rg, L), times(rz, C)], 1), step)
            q, c = unit_rows(both[:, :b]), unit_rows(both[:, b:])
            # P_B x is the mean of x and its reflection
            g.mul_(1 - half).sub_(rg, alpha=half).add_(times(q, L.mT), alpha=2 * half * math.sqrt(m))
            z.mul_(1 - half).sub_(rz, alpha=half).add_(times(c, C.mT), alpha=2 * half * math.sqrt(m))
            if time.monotonic() > until:
                break
        g = torch.where(active < 0, 0, g)
        near = torch.linalg.vector_norm(g @ full, dim=1) / torch.linalg.vector_norm(g, dim=1).clamp_min(1e-30)
        best = near.argsort(descending=True)[: math.ceil(stage.kept * len(g))]
        g, z, c = g[best], z[best], c[best]
    return unit_rows(g @ full), math.sqrt(m) * times(c, C.mT)
