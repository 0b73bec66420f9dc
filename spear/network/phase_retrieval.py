"""Phase retrieval at the last hidden layer: each sample's gradient is 0 or h_j in every entry, and h is nearly known.

    [dL/dW | dL/dbeta] = sum_i delta_i [y_i; 1]ᵀ = U S V      delta_i = U t_i = D_i ∘ h_i      [y_i; 1] = Vᵀ s_i

with ⟨s_k, t_i / S⟩ = [k = i], so that solved t_i confine the remaining s_k. h_i = W_outᵀ d_i lies in a space of
C - 1 dimensions (d_i = p_i - e_c sums to zero), and in a fresh network it is known to a few per cent once the class
is guessed. Vectors are rows: u, h, v are (starts, m), t (samples, b), d (samples, outputs).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import TINY, quick, unit_rows
from spear.network.repulsion import Repulsion
from spear.network.side_by_side import Group, SideBySide
from spear.network.spaces import Levels, misfit, project

EVERY = 5  # steps after which starts are looked at


@dataclass(frozen=True)
class Iterate(SideBySide):
    """A batch of starts: u towards span(U), h the guessed back-propagated vector, v the pre-activations' partner."""

    u: Float[Tensor, "k m"]
    h: Float[Tensor, "k m"]
    v: Float[Tensor, "k m"]
    target: Float[Tensor, "k m"]


@dataclass(frozen=True)
class Reflections:
    """How long to reflect, and what beside span(U) tells 0 from h_j.

    With `partner`, an orthonormal basis of the possible pre-activations, v > 0 exactly where u = h_j, with `weight` on
    that evidence. With `head`, an orthonormal basis of the possible h, h moves too; without it h stays. Steps go
    `relaxation` of the way between the two reflections. `levels` are the slopes of another activation than ReLU. With
    `away`, u keeps away from what is solved.

    A start ends after `steps`, or before, when its target is within the squared sine `near` of span(U) and no longer
    halves that in `EVERY` steps: since h is not exact, a start that has arrived would only drift away again. One whose
    target vanished ends too, and all when the clock shows `until`.
    """

    steps: int
    partner: Float[Tensor, "m r"] | None = None
    weight: float = 1.0
    head: Float[Tensor, "m free"] | None = None
    relaxation: float = 0.5
    near: float = 0.0
    until: float = math.inf
    levels: Levels | None = None
    away: Repulsion | None = None

    def onto(self, basis: Float[Tensor, "m b"], u: Float[Tensor, "k m"]) -> Callable[[Tensor], Tensor]:
        """The projection on span(U) of the next few steps of starts that are at u."""
        if self.away is None:
            return lambda x: project(x, basis)
        away, shares = self.away, self.away.shares(u)
        return lambda x: away.project(x, shares)


def retrieve_phases(iterate: Iterate, basis: Float[Tensor, "m b"], options: Reflections) -> Iterate:
    """Relaxed reflections on all starts at once (relax-reflect-relax): u in span(U) whose entries are 0 or h_j.

    Norms of h and v are kept at 1. The returned `target` is u's last value among {0, h_j}, or {inactive slope h_j,
    active slope h_j}.
    """
    basis = quick(basis)
    options = options if options.partner is None else replace(options, partner=quick(options.partner))
    step = relax if options.levels is None else relax_levels

    def forward(now: Iterate, steps: int) -> Iterate:
        return step(now, basis, replace(options, steps=steps))

    return advance(iterate, forward, lambda now: misfit(now.target, basis), options)


def advance(
    starts: Group,
    forward: Callable[[Group, int], Group],
    misfit: Callable[[Group], Float[Tensor, " k"]],
    options: Reflections,
) -> Group:
    """Move all starts `forward` until each has ended as `Reflections` says; `misfit` is their squared sine."""
    steps, near, device = options.steps, options.near, starts.target.device
    before, ends, order = torch.full_like(starts.target[:, 0], math.inf), [], []
    number = list(range(len(before)))
    for done in range(0, steps, EVERY):
        if not number or time.monotonic() > options.until:
            break
        starts = forward(starts, min(EVERY, steps - done))
        if near:
            fit = misfit(starts)
            over = ((fit < near) & (fit > before / 2)) | ((fit == 1) & (before == 1))
            over = over.tolist()  # the only wait for the device in `EVERY` steps
            gone, left = ([k for k, is_over in enumerate(over) if is_over == ends_now] for ends_now in (True, False))
            if gone:
                ends.append(starts[torch.tensor(gone, device=device)])
                order += [number[k] for k in gone]
                index = torch.tensor(left, dtype=torch.long, device=device)
                starts, number, fit = starts[index], [number[k] for k in left], fit[index]
            before = fit
    back = torch.tensor([*order, *number], device=device).argsort()
    return starts.joined([*ends, starts])[back]


def relax(iterate: Iterate, basis: Float[Tensor, "m b"], options: Reflections) -> Iterate:
    """The steps of `retrieve_phases`. A sign chooses between two values: comparisons are slow at this size."""
    partner, head, relaxation = options.partner, options.head, options.relaxation
    u, h, v, target = iterate.u.clone(), iterate.h, iterate.v.clone(), iterate.target
    inside = options.onto(basis, u)
    for _ in range(options.steps):
        pu = inside(u)
        ru = torch.lerp(u, pu, 2.0)
        if head is None:
            x, evidence = h, ru.mul(2).sub_(h).mul_(h)
        else:
            ph = project(h, head)
            rh = torch.lerp(h, ph, 2.0)
            x, evidence = (ru + rh) / 2, ru * ru - (ru - rh) ** 2 / 2
        if partner is not None:
            pv = project(v, partner)
            rv = torch.lerp(v, pv, 2.0)
            size = rv.abs()
            evidence.addcmul_(rv, size, value=options.weight)
        sign = evidence.sign_()  # 1 where active, -1 where not
        target = torch.addcmul(x, x, sign).mul_(0.5)
        u.add_(target, alpha=relaxation).sub_(pu, alpha=relaxation)
        if partner is not None:
            v.add_(size.mul_(sign).add_(rv), alpha=relaxation / 2).sub_(pv, alpha=relaxation)
            v.div_(v.norm(dim=1, keepdim=True).clamp_min_(TINY))
        if head is not None:
            h = h + relaxation * (target + (rh - rh * sign) / 2 - ph)
            scale = h.norm(dim=1, keepdim=True).clamp_min(TINY)
            u, h, target = u.div_(scale), h / scale, target / scale
    return Iterate(u, h, v, target)


def relax_levels(iterate: Iterate, basis: Float[Tensor, "m b"], options: Reflections) -> Iterate:
    """The same with two slopes for each unit: u in span(U) whose entries are h_j times one or the other, or, behind
    dropout, 0 whatever v is."""
    if options.head is not None:
        return _relax_both(iterate, basis, options)
    partner, levels, relaxation, h = options.partner, options.levels, options.relaxation, iterate.h
    middle, half = h * (levels.active + levels.inactive) / 2, h * (levels.active - levels.inactive) / 2
    offset = -4 * middle * half
    u, v, target, inside = iterate.u.clone(), iterate.v.clone(), iterate.target, options.onto(basis, iterate.u)
    for _ in range(options.steps):
        pu = inside(u)
        evidence = torch.addcmul(offset, torch.lerp(u, pu, 2.0), half, value=4)
        if partner is not None:
            pv = project(v, partner)
            rv = torch.lerp(v, pv, 2.0)
            size = rv.abs()
            evidence.addcmul_(rv, size, value=options.weight)
        sign = evidence.sign_()
        target = torch.addcmul(middle, half, sign)
        if levels.dropped:
            wrong = 0.0 if partner is None else options.weight * (rv * sign).clamp_max(0).square()
            kept = (2 * torch.lerp(u, pu, 2.0) - target) * target > wrong
            target, sign = target * kept, sign if partner is None else torch.where(kept, sign, rv.sign())
        u.add_(target, alpha=relaxation).sub_(pu, alpha=relaxation)
        if partner is not None:
            v.add_(size.mul_(sign).add_(rv), alpha=relaxation / 2).sub_(pv, alpha=relaxation)
            v.div_(v.norm(dim=1, keepdim=True).clamp_min_(TINY))
    return Iterate(u, h, v, target)


def _relax_both(iterate: Iterate, basis: Float[Tensor, "m b"], options: Reflections) -> Iterate:
    """The same where h moves too."""
    partner, head, levels, relaxation = options.partner, options.head, options.levels, options.relaxation
    u, h, v, target, inside = iterate.u, iterate.h, iterate.v, iterate.target, options.onto(basis, iterate.u)
    for _ in range(options.steps):
        pu, ph = inside(u), project(h, head)
        ru, rh = torch.lerp(u, pu, 2.0), torch.lerp(h, ph, 2.0)
        points, costs = _nearest(levels, ru, rh)
        evidence = costs[1] - costs[0]
        if partner is not None:
            pv = project(v, partner)
            rv = torch.lerp(v, pv, 2.0)
            evidence = torch.addcmul(evidence, rv, rv.abs(), value=options.weight)
        active = evidence > 0
        x = torch.where(active, *points)
        target, sign = torch.where(active, levels.active, levels.inactive) * x, torch.where(active, 1, -1)
        if levels.dropped:
            wrong = 0.0 if partner is None else options.weight * (rv * sign).clamp_max(0).square()
            kept = ru * ru > torch.where(active, *costs) + wrong
            target, x = target * kept, torch.where(kept, x, rh)
            sign = sign if partner is None else torch.where(kept, sign, rv.sign())
        u, h = u + relaxation * (target - pu), h + relaxation * (x - ph)
        if partner is not None:
            v = unit_rows(v + relaxation * ((rv.abs() * sign + rv) / 2 - pv))
        scale = h.norm(dim=1, keepdim=True).clamp_min(TINY)
        u, h, target = u / scale, h / scale, target / scale
    return Iterate(u, h, v, target)


def _nearest(levels: Levels, u: Float[Tensor, "k m"], h: Float[Tensor, "k m"]) -> tuple[list[Tensor], list[Tensor]]:
    """The x whose (slope x, x) is nearest to (u, h), for the active and the inactive slope, and how far, squared."""
    points, costs = [], []
    for slope in (levels.active, levels.inactive):
        size = 1 + slope * slope
        points.append((slope * u + h) / size)
        costs.append((u - slope * h) ** 2 / size)
    return points, costs
