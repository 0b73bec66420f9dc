"""Many samples at once: past half the width none is determined alone, but together they are.

    delta_i in span(U)        ⟨s_i, S⁻¹ t_k⟩ = [i = k]        t = Uᵀ delta, delta with its weight in the loss

k samples have k (m - b) + k² equations for k (b - 1) unknowns: enough from k = 2 b - 1 - m on, nearly m / b of them for
all. So Levenberg-Marquardt on all of a batch's starts; where it no longer gains, the starts that fit worst go.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.directions import TINY
from spear.network.curves.fit import Effort
from spear.network.curves.layer import Curves, Layer, Points

DAMPED, AGAIN, LEAST_DAMPED, MOST_DAMPED = 0.1, 0.01, 1e-9, 1e6  # at first, after starts went, at least and at most
RISING, LOWERED = 2.0, 0.1  # factors of the damping: after a failure, growing; after a success, at least
FIRST = 20  # steps before the first look at the starts
GAINED = 0.5  # share of the cost that a round of steps must leave at most, or starts go
GONE = 0.06  # share of the starts that go at least
FAR = 10.0  # times the median of what is left of the starts
STAGES = (  # `arrived` is a start's squared residual
    (torch.float32, Effort(steps=6, inner=60, arrived=1e-8)),
    (torch.float64, Effort(steps=6, inner=200, arrived=1e-16)),
)
EXACT = Effort(steps=8, inner=4000, arrived=1e-20)  # of a whole batch: only long recurrences reach its weak directions
SLOPPY, SHARP = 0.03, 1e-6  # residual of a step's linear system, relative to its right side: at most, at least


@dataclass(frozen=True)
class Together:
    """Starts, and what couples them: `across` is ⟨S⁻¹ s_i, t_k⟩ - [i = k]."""

    points: Points
    s: Float[Tensor, "k r"]
    t: Float[Tensor, "k r"]
    across: Float[Tensor, "k k"]

    @property
    def cost(self) -> float:
        """Squared sines and what is left of the coupling."""
        return float(self.points.rest.pow(2).sum() + self.across.pow(2).sum())

    @property
    def each(self) -> Float[Tensor, " k"]:
        """What of the cost is each start's."""
        squared = self.across.pow(2)
        return self.points.rest.pow(2).sum(1) + (squared.sum(0) + squared.sum(1)) / 2

    def best(self) -> Int[Tensor, " j"]:
        """Which starts go on: not the worst, and none that is far worse than most."""
        each = self.each
        ranked = each.argsort()[: int(len(each) * (1 - GONE))]
        return ranked[each[ranked] < FAR * each.median()]


@dataclass(frozen=True)
class Coupling:
    """A layer's curves, S⁻¹ of its coordinates, and one sample's weight in the loss."""

    curves: Curves
    origin: Float[Tensor, " r"]
    place: Float[Tensor, "r q"]
    unit: float

    @classmethod
    def of(cls, curves: Curves, layer: Layer, unit: float) -> "Coupling":
        """Of a layer and its curves, in their precision."""
        singular = layer.singular.to(curves.origin)
        return cls(curves, curves.origin / singular, curves.place / singular[:, None], unit)

    def at(self, w: Float[Tensor, "k q"], labels: Int[Tensor, " k"]) -> Together:
        """Where starts are."""
        points = self.curves.at(w, labels)
        s = self.origin + w @ self.place.T
        t = (points.unit @ self.curves.basis) * (points.size * self.unit)
        across = s @ t.T
        across.diagonal().sub_(1)
        return Together(points, s, t, across)

    def forth(self, at: Together, v: Float[Tensor, "k q"]) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k k"]]:
        """The derivative of sines and coupling along v."""
        points, basis = at.points, self.curves.basis
        moved = self.curves.turn(points, v @ self.curves.frame.T)
        inside = moved @ basis
        along = torch.linalg.vecdot(points.unit, moved)[:, None]
        rest = torch.addmm(moved, inside, basis.T, alpha=-1).addcmul_(along, points.rest, value=-1)
        across = (v @ self.place.T) @ at.t.T
        return rest, across.addmm_(at.s, (inside * (points.size * self.unit)).T)

    def back(self, at: Together, rest: Float[Tensor, "k m"], across: Float[Tensor, "k k"]) -> Float[Tensor, "k q"]:
        """Its transpose, of `rest` orthogonal to span(U)."""
        points = at.points
        inside = (across.T @ at.s) * (points.size * self.unit)
        along = torch.linalg.vecdot(points.unit, rest)[:, None]
        moved = torch.addmm(rest, inside, self.curves.basis.T).addcmul_(along, points.unit, value=-1)
        return torch.addmm(self.curves.turn(points, moved) @ self.curves.frame, across @ at.t, self.place)


def step(coupling: Coupling, at: Together, damping: float, effort: Effort) -> tuple[Float[Tensor, "k q"], float]:
    """The damped step, and the cost that the linear model foretells.

    By conjugate gradients, preconditioned with what all starts have in common: the part of the coupling that comes from
    the others' t, in its eigenvectors, beside the mean square of each start's own bend.
    """
    points, curves = at.points, coupling.curves
    bend = (points.bend / points.size).pow(2).mean(1, keepdim=True)
    m, r = curves.basis.shape
    others = at.t @ coupling.place
    values, vectors = torch.linalg.eigh(others.T @ others)
    own = (1 - r / m) + (points.size * coupling.unit).pow(2) * at.s.pow(2).sum() / m
    scale = values.clamp_min(0) + bend * (own + damping)
    v = torch.zeros_like(points.w)
    rest = -coupling.back(at, points.rest, at.across)
    p = z = (rest @ vectors / scale) @ vectors.T
    enough = min(SLOPPY, max(SHARP, (at.cost / len(at.t)) ** 0.5))
    size, limit = (rest * z).sum(), enough * enough * rest.pow(2).sum()
    for _ in range(effort.inner):
        forward = coupling.back(at, *coupling.forth(at, p)) + damping * bend * p
        length = size / (p * forward).sum().clamp_min(TINY)
        v, rest = torch.addcmul(v, length, p), torch.addcmul(rest, length, forward, value=-1)
        if bool(rest.pow(2).sum() < limit) or time.monotonic() > effort.until:
            break
        z = (rest @ vectors / scale) @ vectors.T
        before, size = size, (rest * z).sum()
        p = torch.addcmul(z, size / before, p)
    moved, across = coupling.forth(at, v)
    return v, float((points.rest + moved).pow(2).sum() + (at.across + across).pow(2).sum())


@dataclass
class Descent:
    """A fit of all starts in progress; `damping` follows how well the linear model foretold the last costs."""

    coupling: Coupling
    at: Together
    damping: float = DAMPED
    rising: float = RISING

    @classmethod
    def of(
        cls, coupling: Coupling, w: Float[Tensor, "k q"], labels: Int[Tensor, " k"], damping: float = DAMPED
    ) -> "Descent":
        """From these starts."""
        return cls(coupling, coupling.at(w.to(coupling.place), labels), damping)

    def go_on(self, effort: Effort) -> None:
        """More steps, unless the starts have arrived or none gains any more."""
        for _ in range(effort.steps):
            cost = self.at.cost
            if cost < effort.arrived * len(self.at.t) or self.damping > MOST_DAMPED or time.monotonic() > effort.until:
                break
            v, foretold = step(self.coupling, self.at, self.damping, effort)
            new = self.coupling.at(self.at.points.w + v, self.at.points.labels)
            gain = (cost - new.cost) / max(cost - foretold, TINY)
            if gain > 0:
                self.at, self.rising = new, RISING
                self.damping = max(self.damping * max(LOWERED, 1 - (2 * gain - 1) ** 3), LEAST_DAMPED)
            else:
                self.damping, self.rising = self.damping * self.rising, RISING * self.rising


def solve(
    curves: Curves, layer: Layer, w: Float[Tensor, "k q"], labels: Int[Tensor, " k"], unit: float, until: float
) -> tuple[Float[Tensor, "j q"], Int[Tensor, " j"]]:
    """Those of the starts that lead to samples together; none where fewer are left than determine each other."""
    stages = [(Coupling.of(curves.to(kind), layer, unit), replace(effort, until=until)) for kind, effort in STAGES]
    (coupling, effort), *stages = stages
    run, before = Descent.of(coupling, w, labels), math.inf
    run.go_on(replace(effort, steps=FIRST))
    while time.monotonic() < until:
        run.go_on(effort)
        at = run.at
        if at.cost < effort.arrived * len(at.t):
            if not stages:
                return at.points.w, at.points.labels
            (coupling, effort), *stages = stages
            run, before = Descent.of(coupling, at.points.w, at.points.labels, run.damping), math.inf
        elif at.cost > GAINED * before:
            best = at.best()
            if len(best) < layer.coupled:
                break
            run, before = Descent.of(coupling, at.points.w[best], at.points.labels[best], AGAIN), math.inf
        else:
            before = at.cost
    return w[:0], labels[:0]
