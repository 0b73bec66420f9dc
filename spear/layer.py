"""One layer, all that it knows: the zero pattern of G and the signs of Z are one and the same.

    G = L Q      Z = B V, V = Q^-T      supp(G) = {Z > 0}

Both sides are linear in one unknown, and the ReLU couples them row by row. At initialisation q_i and v_i are nearly
parallel, so a start v = q = a row of L is led to a column by relaxed reflections between the two linear spaces and the
coupled signs. The sign of v is known, since V^T d = 1. Vectors are rows: g, z are (starts, m), q (starts, b).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spear.columns import Lengths, collect, unit
from spear.filtering import Observed
from spear.search import Budget, Found, Progress

DAMPING = 4  # times the coupling: how strongly q is drawn away from the directions where v has nothing
LENGTHS = Lengths(shortest=80, longest=2160)


@dataclass(frozen=True)
class Stage:
    """A part of the schedule: its share of the steps, the relaxation, and how strongly signs and q, v are coupled.

    A row is inactive if z < 0 and g^2 < `trust` z^2; `coupling` is the weight of q ~ v in the linear step.
    """

    share: float
    relaxation: float
    trust: float
    coupling: float


SCHEDULE = (Stage(0.65, 1.0, 20.0, 0.1), Stage(0.2, 0.4, 10.0, 0.05), Stage(0.15, 0.4, 3.0, 0.02))


def search(
    observed: Observed,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None = None,
) -> Found:
    """All columns of Q from the layer's weights and gradient."""

    def descend(q: Tensor, free: Tensor, steps: int) -> Tensor:
        return reflect(observed, q, free, steps=steps)

    return collect(observed, descend, LENGTHS, budget, seed, progress)


def reflect(
    observed: Observed, q: Float[Tensor, "k b"], free: Float[Tensor, "b r"], *, steps: int
) -> Float[Tensor, "k b"]:
    """Relaxed reflections from each start q, towards columns whose v lies in the span of `free` (orthonormal); float32.
    """
    L, d = observed.L.float(), observed.d
    m = len(L)
    basis, triangle = torch.linalg.qr(observed.B @ free)  # z = B free w = basis c, c = triangle w
    w = q @ free
    g = math.sqrt(m) * unit(q).float() @ L.mT
    basis32, free32 = basis.float(), free.float()
    z = math.sqrt(m) * unit(w @ triangle.mT).float() @ basis32.mT
    gram = triangle.mT @ triangle
    size = triangle.norm() / math.sqrt(len(gram))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    back = torch.linalg.inv(triangle).mT
    for stage in SCHEDULE:
        k, beta = stage.coupling, stage.relaxation
        weight = k / (1 + k)
        inverse = torch.linalg.inv(gram + weight * size**2 * eye)
        from_z = (triangle @ inverse @ triangle.mT).float()
        from_q = (weight * size * inverse @ triangle.mT).float()
        to_q = (weight * size * back).float()
        for _ in range(round(stage.share * steps)):
            inactive = torch.add(g.abs(), z, alpha=math.sqrt(stage.trust)) < 0
            rg, rz = torch.where(inactive, -g, g), torch.where(inactive, z, z.abs())
            a = rg @ L
            own = a @ free32
            c = (rz @ basis32) @ from_z + own @ from_q
            a = (a - own @ free32.mT) / (1 + DAMPING * k) + (c @ to_q + (1 - weight) * own) @ free32.mT
            a *= math.sqrt(m) / a.norm(dim=1, keepdim=True)
            c *= math.sqrt(m) / c.norm(dim=1, keepdim=True)
            g.mul_(1 - beta / 2).sub_(rg, alpha=beta / 2).addmm_(a, L.mT, alpha=beta)
            z.mul_(1 - beta / 2).sub_(rz, alpha=beta / 2).addmm_(c, basis32.mT, alpha=beta)
    return unit(torch.where(inactive, 0, g) @ L)
