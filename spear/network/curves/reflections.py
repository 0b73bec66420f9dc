"""Relaxed reflections where phi' jumps: (u, z) in linear spaces, and each entry on the pieces of its curve.

    u in span(U), z = z_0 + Q w        and        u_j = h_j phi'(z_j), on one piece of phi or another

A fit by derivatives does not see the other side of a jump; the nearest point of the curve does.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.directions import TINY
from spear.models.activations import Activation
from spear.network.curves.fit import Effort, fit
from spear.network.curves.layer import Curves
from spear.network.curves.normal import Taken, respond
from spear.network.spaces import project

RELAXATION = 0.5  # of the way between the two reflections
EXCHANGE = 0.3  # weight of z beside u, each in units of its own variance
RENEWED = 10  # steps after which h is computed anew
NEWTON = 3  # steps to the nearest point of a piece
POLISHES = 6  # renewals of the pieces
FALLING = 0.8  # share of its sine that a start must keep under to go on
SHARE = 0.05  # the same weight in a polish, where z is nearly right


@dataclass(frozen=True)
class Nearest:
    """The points (u, z) on the curve, entry by entry, and their pieces."""

    u: Float[Tensor, "k m"]
    z: Float[Tensor, "k m"]
    piece: Int[Tensor, "k m"]


def nearest(
    activation: Activation,
    u: Float[Tensor, "k m"],
    z: Float[Tensor, "k m"],
    h: Float[Tensor, "k m"],
    weight: Float[Tensor, "k 1"],
    taken: Taken | None = None,
) -> Nearest:
    """The point of {(h phi'(y), y)}, less what is `taken`, nearest to each (u, z), with `weight` on the second."""
    best = Nearest(u, z, torch.zeros_like(u, dtype=torch.long))
    least = torch.full_like(u, torch.inf)
    for k in range(len(activation.breaks) + 1):
        piece = torch.full_like(best.piece, k)
        y = activation.within(z, piece)
        own, d = respond(taken, h, y, activation.at(y))
        for _ in range(0 if activation.is_flat and taken is None else NEWTON):
            y = activation.within(y + ((u - own) * d + weight * (z - y)) / (d * d + weight), piece)
            own, d = respond(taken, h, y, activation.at(y))
        cost = (u - own) ** 2 + weight * (z - y) ** 2
        near = cost < least
        least = torch.where(near, cost, least)
        best = Nearest(*(torch.where(near, a, b) for a, b in ((own, best.u), (y, best.z), (piece, best.piece))))
    return best


def reflect(
    curves: Curves, w: Float[Tensor, "k q"], labels: Int[Tensor, " k"], *, steps: int, until: float
) -> tuple[Float[Tensor, "k q"], Int[Tensor, "k m"]]:
    """Where starts lead, and the pieces on which their entries are."""
    activation = curves.problem.activations[curves.problem.last]
    at = curves.at(w, labels)
    u, z, h = at.unit * at.size, at.z, at.h
    for step in range(steps):
        if time.monotonic() > until:
            break
        inside, own = project(u, curves.basis), curves.coordinates_of(z)
        flat = curves.base + own @ curves.frame.T
        weight = EXCHANGE * h.pow(2).mean(1, keepdim=True) / z.var(1, keepdim=True).clamp_min(TINY)
        point = nearest(activation, 2 * inside - u, 2 * flat - z, h, weight, curves.taken)
        u, z = u + RELAXATION * (point.u - inside), z + RELAXATION * (point.z - flat)
        if step % RENEWED == RENEWED - 1:
            h = curves.at(own, labels).h
    return own, point.piece


def polish(
    curves: Curves, w: Float[Tensor, "k q"], labels: Int[Tensor, " k"], pieces: Int[Tensor, "k m"], effort: Effort
) -> tuple[Float[Tensor, "k q"], Float[Tensor, " k"]]:
    """Fits with each entry on its piece, the pieces renewed by the nearest points; the sines are those of the function.

    A start ends once its pieces are settled, or its sine no longer falls.
    """
    activation = curves.problem.activations[curves.problem.last]
    everyone = labels
    ends, number, before = w.clone(), torch.arange(len(w), device=w.device), w.new_full((len(w),), torch.inf)
    for _ in range(POLISHES):
        w, sine = fit(curves, w, labels, effort, pieces)
        ends[number] = w
        at = curves.at(w, labels, pieces)
        weight = SHARE * at.h.pow(2).mean(1, keepdim=True) / at.z.var(1, keepdim=True).clamp_min(TINY)
        inside = project(at.unit * at.size, curves.basis)
        new = nearest(activation, inside, at.z, at.h, weight, curves.taken).piece
        go = (new != pieces).any(1) & (sine < FALLING * before) & (sine > effort.arrived)
        if not go.any():
            break
        w, labels, pieces, number, before = w[go], labels[go], new[go], number[go], sine[go]
    return ends, curves.at(ends, everyone).sine
