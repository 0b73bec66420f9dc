"""Relaxed reflections where phi' jumps: (u, z) in linear spaces, and each entry on the pieces of its curve.

    u in span(U), z = z_0 + Q w        and        u_j = h_j phi'(z_j), on one piece of phi or another

A fit by derivatives does not see the other side of a jump; the nearest point of the curve does.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.directions import TINY
from spear.models.activations import Activation
from spear.network.curves.dropped import Dropping
from spear.network.curves.fit import Effort, fit
from spear.network.curves.layer import Curves, Points
from spear.network.curves.normal import Taken, respond
from spear.network.spaces import project

RELAXATION = 0.5  # of the way between the two reflections
EXCHANGE = 0.3  # weight of z beside u, each in units of its own variance
THROUGH = 1.0  # the same behind dropout, where u says nothing of a unit that is gone
PLAIN = 30  # projections after the reflections, behind dropout: these alone do not settle which units are gone
RENEWED = 10  # steps after which h is computed anew
NEWTON = 3  # steps to the nearest point of a piece
POLISHES = 6  # renewals of the pieces
FALLING = 0.8  # share of its sine that a start must keep under to go on
LEAST = 1e-9  # of a system of equations, relative to its size, added to its diagonal
SHARE, STIFF = 0.05, 10.0  # the same weight in a polish; behind dropout, where z that moved would explain a unit gone


@dataclass(frozen=True)
class Nearest:
    """The points (u, z) on the curve, entry by entry, and their pieces."""

    u: Float[Tensor, "k m"]
    z: Float[Tensor, "k m"]
    piece: Int[Tensor, "k m"]

    def where(self, better: Bool[Tensor, "k m"], other: "Nearest") -> "Nearest":
        """These, or the others in the entries in which those are better."""
        pairs = ((other.u, self.u), (other.z, self.z), (other.piece, self.piece))
        return Nearest(*(torch.where(better, a, b) for a, b in pairs))


def nearest(
    activation: Activation,
    u: Float[Tensor, "k m"],
    z: Float[Tensor, "k m"],
    h: Float[Tensor, "k m"],
    weight: Float[Tensor, "k 1"],
    taken: Taken | None = None,
) -> Nearest:
    """The point of {(h phi'(y), y)}, less what is `taken`, nearest to each (u, z), with `weight` on the second.

    Behind dropout it may be one of {(0, y)}, less the same; as nothing there keeps y, what it is off by is not held
    against the others.
    """
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
        best = best.where(near, Nearest(own, y, piece))
    if not isinstance(activation, Dropping):
        return best
    piece = torch.full_like(best.piece, activation.gone)
    own, d = respond(taken, h, z, activation.at_piece(z, piece))
    y = z + (u - own) * d / (d * d + weight)
    off = own + (y - z) * d
    return best.where(activation.taken((u - best.u) ** 2 - (u - off) ** 2), Nearest(off, y, piece))


def reflect(
    curves: Curves,
    w: Float[Tensor, "k q"],
    labels: Int[Tensor, " k"],
    *,
    steps: int,
    until: float,
    pieces: Int[Tensor, "k m"] | None = None,
) -> tuple[Float[Tensor, "k q"], Int[Tensor, "k m"]]:
    """Where starts lead, by one step at least, and the pieces on which their entries are. Behind dropout starts have
    `pieces` of their own, and plain projections follow."""
    activation = curves.problem.activations[curves.problem.last]
    at = curves.at(w, labels, pieces)
    u, z, h = at.unit * at.size, at.z, at.h
    plain, exchange = (0, EXCHANGE) if pieces is None else (PLAIN, THROUGH)
    for step in range(steps + plain):
        if step and time.monotonic() > until:
            break
        inside, own = project(u, curves.basis), curves.coordinates_of(z)
        flat = curves.base + own @ curves.frame.T
        weight = exchange * h.pow(2).mean(1, keepdim=True) / z.var(1, keepdim=True).clamp_min(TINY)
        if step < steps:
            point = nearest(activation, 2 * inside - u, 2 * flat - z, h, weight, curves.taken)
            u, z = u + RELAXATION * (point.u - inside), z + RELAXATION * (point.z - flat)
        else:
            point = nearest(activation, inside, flat, h, weight, curves.taken)
            u, z = point.u, point.z
        if step % RENEWED == RENEWED - 1 or step >= steps:
            h = curves.at(own, labels, None if pieces is None else point.piece).h
    return own, point.piece


def freed(curves: Curves, at: Points, free: Float[Tensor, "outputs c"]) -> Float[Tensor, "k m"]:
    """The h for which delta is nearest to span(U), with any ∂L/∂logits in the span of `free`.

    A unit on a wrong piece spoils the outputs, and these the h by which small entries are told.
    """
    heads = free.T @ curves.head
    along = at.slope[:, None] * heads
    off = along - (along @ curves.basis) @ curves.basis.T
    beside = at.unit * at.size - at.slope * at.h  # what a normalisation takes
    gram, wanted = off @ off.mT, -(off @ beside[:, :, None])
    size = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    if curves.taken is None:  # delta has any length
        own = (curves.problem.activate(at.logits) - curves.problem.one_hot(at.labels).to(at.z)) @ free
        gram = gram + size * own[:, :, None] * own[:, None, :]
        wanted = wanted + size * (own * own.square().sum(1, keepdim=True))[:, :, None]
    eye = torch.eye(free.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + (LEAST * size).clamp_min(TINY) * eye, wanted)[:, :, 0] @ heads


def polish(
    curves: Curves,
    w: Float[Tensor, "k q"],
    labels: Int[Tensor, " k"],
    pieces: Int[Tensor, "k m"],
    effort: Effort,
    outputs: Float[Tensor, "outputs c"] | None = None,
) -> tuple[Float[Tensor, "k q"], Int[Tensor, "k m"]]:
    """Fits with each entry on its piece, the pieces renewed by the nearest points; where they end, and their pieces.
    Behind dropout the nearest points are those of the h of free `outputs` (`freed`).

    A start ends once its pieces are settled, or its sine no longer falls.
    """
    activation = curves.problem.activations[curves.problem.last]
    share = SHARE if outputs is None else STIFF
    ends, kept, before = w.clone(), pieces.clone(), w.new_full((len(w),), torch.inf)
    number = torch.arange(len(w), device=w.device)
    for _ in range(POLISHES):
        w, sine = fit(curves, w, labels, effort, pieces)
        ends[number], kept[number] = w, pieces
        at = curves.at(w, labels, pieces)
        weight = share * at.h.pow(2).mean(1, keepdim=True) / at.z.var(1, keepdim=True).clamp_min(TINY)
        inside = project(at.unit * at.size, curves.basis)
        h = at.h if outputs is None else freed(curves, at, outputs)
        new = nearest(activation, inside, at.z, h, weight, curves.taken).piece
        go = (new != pieces).any(1) & (sine < FALLING * before) & (sine > effort.arrived)
        if not go.any():
            break
        w, labels, pieces, number, before = w[go], labels[go], new[go], number[go], sine[go]
    return ends, kept
