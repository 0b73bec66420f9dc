"""What ties a column q of Q to its v = Q^-T e: M = Q Q^T, of which much is known before any column is.

    V = Q^-T = M^-1 Q, so that v_i = M^-1 q_i for every sample i, whatever the lengths of the columns

Fresh columns point every way, so that M has nearly the spectrum of Marchenko and Pastur; and as B = Z Q^T, the
directions that Q stretches are those in which B is large. Samples of one class have like gradients, which adds a few
large eigenvalues; they show in where searches end, and then in known columns. Of every column found its part of M is
known. Known columns also tell where the others are not: every other v is orthogonal to their q, and every other q to
their v, which the signs of B v tell to a good part. Vectors are rows.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import complement
from spear.published import filtering
from spear.published.view import Observed
from spear.signs import given_signs

SINGULAR = 1e-12  # of the largest singular value of B N: what is under it counts as it
GRID = 4096  # points at which the density of Marchenko and Pastur is summed
AGREED = 0.98  # share of a known column's signs that its v must have to be taken for it
PSEUDO = 32  # starts that the law of random columns is worth, beside the ends of searches
LEADING = 24  # directions of the largest B in which known columns tell M, once they are as many
ENOUGH = 2  # times as many known columns, and they tell all of M: searches end more often where it is large
LEAST_DOUBT = 0.01  # share of a known v that is left in doubt, at least: its model is rough


@dataclass(frozen=True)
class Coupling:
    """What is known of the columns still sought: `free` N spans their v, `moment` is M, `away` weighs (v_i q)^2.

    `away` sums v_i v_i^T over the known columns, each v_i of length 1 and divided by the doubt that is left about it.
    """

    free: Float[Tensor, "b r"]
    moment: Float[Tensor, "b b"]
    away: Float[Tensor, "b b"]

    def step(
        self, triangle: Float[Tensor, "r r"], coupling: float, ridge: float, parting: float
    ) -> Float[Tensor, "c c"]:
        """The linear step as one matrix, from rows (L^T r_g, basis^T r_z) to rows (q, c), c = triangle w.

        It minimises, over q and w, for the QR decomposition B N = basis triangle and t = |B N|_F / |M^1/2 N|_F,

            |L q - r_g|^2 + |B N w - r_z|^2 + coupling |M^-1/2 q - t M^1/2 N w|^2 + ridge t^2 |M^1/2 N w|^2
            + parting q^T away q
        """
        b, r = self.free.shape
        inner = self.free.mT @ self.moment @ self.free
        left, s, right = torch.linalg.svd(triangle)
        t = s.norm() / inner.diagonal().sum().sqrt()
        turned = self.free @ right.mT  # w in the coordinates in which triangle is s
        normal = torch.eye(b + r, dtype=s.dtype, device=s.device)
        normal[:b, :b] += coupling * torch.linalg.inv(self.moment) + parting * self.away
        normal[b:, b:] = (s.square() + (SINGULAR * s[0]) ** 2).diag()
        normal[b:, b:] += (coupling + ridge) * t**2 * right @ inner @ right.mT
        normal[:b, b:] = -coupling * t * turned
        normal[b:, :b] = normal[:b, b:].mT
        inverse, turn = torch.linalg.inv(normal), left * s
        inverse[b:] = turn @ inverse[b:]
        inverse[:, b:] = inverse[:, b:] @ turn.mT
        return inverse


def uncoupled(known: Float[Tensor, "f b"]) -> Coupling:
    """Nothing is taken to be known but unit columns, to which every other v is orthogonal."""
    b = known.shape[1]
    return Coupling(complement(known), torch.eye(b).to(known), known.new_zeros(b, b))


class Prior:
    """What is expected of M before columns are known, and after: a law at first, then what searches and columns show.

    In the basis in which B falls, `turn`, M is nearly diagonal, and of random Q its diagonal is that of the law of
    Marchenko and Pastur. Samples of one class have like gradients, which adds a few far larger values: their size shows
    in the ends of searches, also of those that led to no column, and their directions in the columns that are known.
    """

    def __init__(self, observed: Observed):
        m, b = observed.L.shape
        self.observed = observed
        self.turn = torch.linalg.svd(torch.linalg.qr(observed.B)[1])[2]
        self.law = marchenko_pastur(b, b / m).to(self.turn)
        self.profile = self.law

    def learn(self, ends: Float[Tensor, "k b"]) -> None:
        """Take the ends of a round of searches, unit vectors, for a sample of the columns: half of what is believed."""
        k, b = ends.shape
        seen = b * (ends.to(self.turn) @ self.turn.mT).square().mean(0)
        self.profile = (self.profile + (k * seen + PSEUDO * self.law) / (k + PSEUDO)) / 2

    def __call__(self, known: Float[Tensor, "f b"]) -> Coupling:
        """The coupling of the columns still sought, given unit columns that are known."""
        f, b = known.shape
        fresh = self._moment(known)
        if not f:
            return replace(uncoupled(known), moment=fresh)
        v, doubt = duals(self.observed, known, fresh)
        moment = known.mT @ known + (1 - f / b) * fresh
        return Coupling(complement(known), moment, v.mT @ (v / doubt.clamp_min(LEAST_DOUBT)[:, None]))

    def uncoupled(self, known: Float[Tensor, "f b"]) -> Coupling:
        """What known columns tell where q and v are not coupled: which v are free, and where no other q is.

        What is wrong about the f known v is all in the r directions that are open: there f errors add up, and each
        counts for r / f, or true columns would be kept away where few are left.
        """
        (f, b), told = known.shape, self(known)
        return replace(told, moment=torch.eye(b).to(known), away=told.away * min(1.0, (b - f) / max(f, 1)))

    def _moment(self, known: Float[Tensor, "f b"]) -> Float[Tensor, "b b"]:
        """b times the mean of q q^T over the columns still sought."""
        f, b = known.shape
        leading = min(LEADING, b // 4)
        turned = known @ self.turn.mT
        told = (b * turned.square().sum(0) + PSEUDO * self.law) / (f + PSEUDO)
        inner, shown = (told if f >= ENOUGH * leading else self.profile).diag(), turned[:, :leading]
        if 0 < leading <= f:
            weight = f / (f + leading)
            inner[:leading, :leading] *= 1 - weight
            inner[:leading, :leading] += weight * b / f * shown.mT @ shown
        return self.turn.mT @ inner @ self.turn


def marchenko_pastur(count: int, ratio: float) -> Float[Tensor, " count"]:
    """Eigenvalues of G^T G / m for `count` random columns of m = count / ratio entries, falling: the law's quantiles.

    With x = 1 + ratio + 2 sqrt(ratio) cos(a) the density is 2 sin(a)^2 / (pi x) (Marchenko, Pastur 1967). Their mean
    is 1. Raises `ValueError` for a ratio outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"columns are to be no longer in number than in entries, ratio {ratio:g} is not in (0, 1]")
    angle = torch.linspace(0, math.pi, GRID, dtype=torch.float64)[1:-1]
    x = 1 + ratio + 2 * math.sqrt(ratio) * angle.cos()
    share = (angle.sin() ** 2 / x).cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = x[torch.searchsorted(share / share[-1], wanted).clamp_max(len(x) - 1)]
    return values / values.mean()


def duals(
    observed: Observed, known: Float[Tensor, "f b"], moment: Float[Tensor, "b b"]
) -> tuple[Float[Tensor, "f b"], Float[Tensor, " f"]]:
    """The v of known columns, of unit length, as far as their signs tell them, and the doubt: the share that is open.

    v_i = M^-1/2 (D_i + N w_i), where D is the dual basis of the known M^-1/2 q in their span and N spans the rest: what
    is expected of v given q, and what is not. The signs of B v_i are those of the mask of q_i; w is taken for normal,
    of the size that D shows.
    """
    values, vectors = torch.linalg.eigh(moment)
    half = vectors / values.sqrt() @ vectors.mT
    dual, free = torch.linalg.pinv(known @ half).mT, complement(known @ half)
    mask = ~filtering.zero_rows(observed.L, known, tolerance=observed.tolerance)
    B = observed.B @ half
    variance = dual.square().mean() * dual.shape[1] / len(dual)
    w, covariance = given_signs(B @ free, dual @ B.mT, 2 * mask.float() - 1, variance)
    v = (dual + w.to(free) @ free.mT) @ half
    size, spread = v.square().sum(1), (half @ free @ covariance.to(free) @ free.mT @ half).trace()
    z = v @ observed.B.mT
    agreed = ((z > 0) == mask).double().mean(1)
    agreed = torch.maximum(agreed, 1 - agreed)
    doubt = torch.where(agreed > AGREED, spread / (size + spread), math.inf)
    return torch.where(agreed[:, None] > AGREED, v / size.sqrt()[:, None], 0.0), doubt
