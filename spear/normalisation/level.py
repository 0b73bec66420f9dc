"""Batches behind BatchNorm that has no shift, or sends no gradient of it: a = mean g is m unknowns, common to all.

a is small beside g, as 1 to √b: reflections at a rough one end near samples; not near those of which a trained network
is sure, whose g is small beside a. The rough one is D regressed on relu(y) for normal y, times h, summed over the
batch: both sums are known. Then every right mask leaves equations that are linear in a,

    sum_i (1 - Q_i Q_iᵀ) a = 0,   Q_i a basis of the columns of sample i's exact step,

solved by λ a, and by a common shift (τ, ς) of every t and s, which moves a in span [(σ/γ) U, c ∘ P]. These 2 b - 1
numbers follow from the samples (`common_shift`) but for a part of τ, which nothing feels that is asked before all of
them are found.

**Theorem.** Where b samples leave no more of a free, no other batch of b samples with these activation patterns gives
the update, but for one image added to every input.

*Proof.* Any such batch has (t, s, d) off by (λ, τ, ς) in common. Its t and s sum to zero, hence τ = ς = 0; and
⟨s_i, S⁻¹ t_i⟩ = 1 - 1/b, hence λ = ±1, of which -1 turns the signs of all y.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from spear.directions import complement, distinct, unit_rows
from spear.normalisation.batch_search import NEAR, BatchSearch
from spear.normalisation.common_shift import common_shift
from spear.normalisation.exact_step import ExactStep, evidence, settle
from spear.normalisation.problem import NormalisedView
from spear.normalisation.spaces import BatchSpaces, Found, plane
from spear.reconstruction import Refusal

ACTIVE, RISE = 0.2665, 0.5852  # D over relu(y) of a normal y, by regression: intercept and slope
ROUGH = 0.4  # mean square error of the rough a, of its mean square
MISSED, ALIKE = 0.4, 0.7  # distance of a mask from its pieces up to which it serves; cosine from which two are of one
BEST, FITS = 4, 1e-3  # masks that are surely samples'; distance of a mask that surely is
STEPS, LEAST = 12, 4  # renewals of masks and a, at most and at least
OUTLIERS = 3  # times the distance of the best: masks that are no samples'
CAUTION = 3  # times the noise that the prior reckons with
DETERMINED = 1e-6  # eigenvalue, of the largest, from which a direction of a is told
MOVES = 2  # of a by masks that are not yet right


def rough_level(view: NormalisedView, spaces: BatchSpaces) -> Float[Tensor, " m"]:
    """a by regression, per sample in units of `NetworkView.unit`."""
    network, bias = view.network, view.network.bias_gradients[-1]
    summed = 0.0 if bias is None else bias @ network.weights[-1][:, spaces.live]
    total = network.unit(spaces.batch) * spaces.batch
    return ACTIVE * summed / total + RISE * spaces.scale.sign() * spaces.slope


class LevelSearch(BatchSearch):
    """A search that finds a with the samples: near misses tell it, then the usual rounds go on."""

    def __init__(self, view: NormalisedView, spaces: BatchSpaces, accept: float, generator: Generator) -> None:
        self.rough = rough_level(view, spaces)
        super().__init__(view, replace(spaces, level=self.rough, loose=True), accept, generator)
        self.misses = self.found.mask

    @property
    def step(self) -> ExactStep:
        """In the plane of all samples."""
        none = Found.none(self.spaces, self.heads.shape[1])
        return ExactStep.of(plane(self.spaces, none, self.size), self.heads)

    def round(self) -> None:
        if not len(self.found):
            self._begin()
            return
        before = self.left
        super().round()
        if self.left < before:
            self.found = super().solved(self._move(self.found))

    def solved(self, mask: Bool[Tensor, "k m"]) -> Found:
        """Samples of these masks, which tell a.

        Raises `Refusal` where they do not.
        """
        if not self._told(self._left_over(mask, torch.ones_like(mask))):
            raise Refusal("other mean gradients fit these activation patterns as well")
        self._move(super().solved(mask))
        return super().solved(mask)

    def _begin(self) -> None:
        """Near misses, one of each sample, until some of them are solved exactly by a common a."""
        both = torch.cat([self.misses, self.near_misses(MISSED)])
        self.misses = both[distinct(unit_rows(2.0 * both - 1), ALIKE, signed=True)]
        found = self._renewed(self.misses) if len(self.misses) else None
        if found is not None:
            self.misses = found.mask
            for _ in range(MOVES):
                found = super().solved(self._move(found))
            step = self.step
            mask = settle(step, found.mask, accept=self.accept, near=NEAR, weight=self.weight, dropped=False)
            self._accept(step.plane, mask)
        self.idle = 0 if len(self.found) else self.idle + 1
        if self.idle:
            self.spaces = replace(self.spaces, level=self.rough)

    def _renewed(self, mask: Bool[Tensor, "k m"]) -> Found | None:
        """Masks renewed with a, by turns, from the rough one; the samples for an a that is right but for λ, τ and ς."""
        step = self.step
        at, unknowns = step(mask), step.basis.shape[1] + self.heads.shape[1]
        for k in range(STEPS):
            sure = evidence(at.g, at.y, at.h, self.weight, dropped=False)
            if k >= LEAST and torch.equal(mask, sure > 0):
                break
            away = (at.g - at.h).square() + (self.weight * at.y.clamp_max(0)).square() + sure.clamp_max(0)
            off = away.sum(1) / at.h.square().sum(1)
            usual = off.kthvalue(min(BEST, len(off))).values
            good = off < (OUTLIERS * usual).clamp_min(FITS)
            mask, margin = sure[good] > 0, sure[good].abs() / sure[good].abs().mean(0)  # some of each unit's rows
            rows = step.sure(margin)
            if len(rows) * (rows.shape[1] - unknowns) <= len(self.rough) - 2 * self.spaces.batch:
                return None
            N = self._left_over(mask, torch.zeros_like(mask).scatter(1, rows, True))
            noise = CAUTION * usual * (mask * at.h[good]).square().mean()
            prior = noise / (ROUGH * (self.size * self.rough).square().mean())
            level = torch.linalg.solve(N + prior * torch.eye(len(N)).to(N), prior * self.rough)
            self.spaces = replace(self.spaces, level=level * (self.rough.norm() / level.norm()))
            step = self.step
            at = step.trimmed(mask, margin)
        if not self._told(N):
            return None
        step = self.step
        at = step.trimmed(mask, margin)
        every = Found(*step.plane.coordinates(at.x), at.d, mask)
        return every[distinct(unit_rows(2.0 * mask - 1), ALIKE, order=at.residual, signed=True)]

    def _left_over(self, mask: Bool[Tensor, "k m"], rows: Bool[Tensor, "k m"]) -> Float[Tensor, "m m"]:
        """The sum of the 1 - Q_i Q_iᵀ, each on its own rows."""
        total, turned = torch.zeros_like(self.rough).diag(), self.step.plane.g_basis
        for one, kept in zip(mask, rows.to(total), strict=True):
            columns = torch.cat([turned, one[:, None] * self.heads], 1)
            basis = torch.linalg.qr(kept[:, None] * columns)[0]
            total += kept.diag() - basis @ basis.mT
        return total

    def _told(self, N: Float[Tensor, "m m"]) -> bool:
        """Set a to what is nearest to the rough one where nothing is left over; whether no more of it is free than
        λ, τ and ς."""
        values, vectors = torch.linalg.eigh(N)
        free = vectors[:, : 2 * self.spaces.batch - 1]
        self.spaces = replace(self.spaces, level=free @ (free.mT @ self.rough))
        return bool(values[free.shape[1]] > DETERMINED * values[-1])

    def _move(self, found: Found) -> Bool[Tensor, "f m"]:
        """Move a by what samples have in common, as near to the rough one as that lets it; their masks then."""
        scale, turn, place = common_shift(self, found)
        spaces, s = self.spaces, scale * found.s + place
        level = scale * spaces.level - spaces.turned @ turn - spaces.slope * (spaces.place @ place)
        free = torch.linalg.qr(spaces.turned @ complement(s / spaces.singular))[0]
        self.spaces = replace(spaces, level=level - free @ (free.mT @ (level - self.rough)))
        return spaces.outputs(s) > 0
