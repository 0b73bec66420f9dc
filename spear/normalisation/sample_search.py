"""Search behind LayerNorm or RMSNorm, which take from each sample's gradient directions that are known.

With g = γ ∘ dY, σ_i G_i = g_i - mean(g_i) 1 - mean(g_i ∘ x̂_i) x̂_i, x̂_i in the span of 1 and z_i = A s_i, A = [W|β] V:

    g_i in span[U, 1, A] (without the 1 behind RMSNorm), 0 or γ_j h_j in every entry

is phase retrieval in a space of 2 b + 1 dimensions. The part in U is σ_i G_i, known up to a factor, and all of these
together give the inputs, as in a network that does not normalise. Of LeakyReLU and the like with dropout an entry is 0,
or γ_j h_j times one of two slopes.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.directions import complement, least_squares, unit_rows, zero_entries
from spear.network.exact_step import Tolerances, accepted, refine, solve_mask
from spear.network.phase_retrieval import Iterate, Reflections, retrieve_phases
from spear.network.spaces import ACTIVE, GONE, INACTIVE, Levels, Mask, Solved, Spaces, possible_errors
from spear.network.starts import FEW_CLASSES, FEW_LEFT, Starts, prior_outputs
from spear.normalisation.problem import Norm, NormalisedView, normalise
from spear.published.lowrank import LowRank

STEPS = 200  # of each start
STARTS = (16, 64)  # of a round, at least and at most
LONGEST = 5  # times as many, after rounds that found nothing
SAME = 1 - 1e-7  # cosine of two solutions that are one
ZERO = 1e-6  # of the largest entry of g: what dropout took
WEIGHTS = (0.0, 0.5, 1.0)  # of the pre-activations' signs, in turn
SLIGHT = 0.1  # the same behind dropout, where a sign shows between two slopes, and is hidden in a unit that is gone


def columns(norm: Norm | None, low: LowRank, affine: Float[Tensor, "m n1"]) -> Float[Tensor, "m k"]:
    """U, 1 and A side by side, those of A at length 1: where γ ∘ dY of every sample lies; U alone without a norm."""
    if norm is None:
        return low.L
    lift = unit_rows((affine @ unit_rows(low.R).mT).mT).mT
    ones = [torch.ones_like(lift[:, :1])] if norm.kind == "layer" else []
    return torch.cat([low.L, *ones, lift], 1)


class SampleSearch:
    """A search in progress at the last hidden layer: what is `found` of g, in `rounds` of `starts` together.

    Directions found are in the coordinates of the `whole` spaces. The parts in U of those found confine the z of the
    others, as ⟨s_k, S⁻¹ t_i⟩ = 0 for i ≠ k, and with them the spaces of every round. Where dropout follows, an entry
    that is zero says nothing of z; of two slopes each other entry does. A round under way ends when `time.monotonic`
    shows `until`.
    """

    until = math.inf

    def __init__(self, view: NormalisedView, low: LowRank, generator: Generator) -> None:
        problem = view.network
        self.problem, self.norm, self.low, self.drop = problem, view.top, low, view.drops[-1]
        self.scale = view.scale(problem.last)
        levels = Levels.of(problem.activations[problem.last], len(self.scale))
        self.levels = levels and replace(levels, dropped=True)
        slight = 0.0 if levels is None else SLIGHT * levels.signed
        self.weights = (slight,) if self.drop else WEIGHTS
        self.columns = columns(view.top, low, problem.affine(problem.last))
        self.head = problem.weights[-1] * self.scale / (1 - self.drop)
        self.outputs = possible_errors(problem, low.rank)
        self.whole = self._spaces(self.columns)
        self.heads = torch.linalg.qr(self.whole.head_space)[0].float()
        self.drawn = Starts(problem, generator, prior_outputs(problem))
        self.tolerances = Tolerances(accept=problem.accuracy.direction, noise=low.noise / low.smallest)
        self.found = Solved.none(self.whole)
        self.starts = self.rounds = self.idle = 0

    def _spaces(self, spanning: Float[Tensor, "m k"]) -> Spaces:
        basis = torch.linalg.qr(spanning)[0]
        ones = basis.new_ones(basis.shape[1])
        return Spaces(basis, ones, basis.new_zeros(len(ones), 1), basis, self.head, self.outputs, self.levels)

    @property
    def left(self) -> int:
        """How many samples are still to be found."""
        return self.low.rank - len(self.found)

    def coordinates(self) -> Float[Tensor, "f b"]:
        """t of what was found: its part in U."""
        g = (self.found.t @ self.whole.basis.mT).mT
        return least_squares(self.columns, g).mT[:, : self.low.rank]

    def round(self) -> None:
        """One round of starts; of the last sample, the others tell z."""
        before, singular = self.left, self.low.R.norm(dim=1)
        free = complement(unit_rows(self.coordinates() / singular))
        lift = self.problem.affine(self.problem.last) @ (self.low.R / singular[:, None]).mT @ free
        if self.left == 1:
            y = normalise(self.norm, (lift / (self.low.R[:, -1] / singular @ free)).mT)[0]
            if len(mask := self._last(y)):
                exact = solve_mask(self.whole, mask)
                self.found = self.found.join(exact.solved(accepted(exact, self.tolerances)), room=1, cosine=SAME)
        place = torch.cat([self.columns[:, self.low.rank : -self.low.rank], unit_rows(lift.mT).mT], 1)
        wide = self.columns if self.norm is None else torch.cat([self.columns[:, : self.low.rank], place], 1)
        spaces = self._spaces(wide)
        labels, start, partner = self._draw(place)
        weight, moving = self.weights[self.rounds % len(self.weights)], self.idle % 2 > 0
        steps, near = STEPS * min(1 + self.idle, LONGEST), 0.0 if moving else self.tolerances.near
        options = Reflections(steps, partner if weight else None, weight, self.heads if moving else None, near=near)
        options = replace(options, until=self.until, levels=self.levels and self.levels.to(torch.float32))
        end = retrieve_phases(start, spaces.basis.float(), options)
        new = refine(spaces, end, head=self.heads, tolerances=self.tolerances)
        new = replace(new, t=unit_rows(new.t @ (spaces.basis.mT @ self.whole.basis)))
        self.found = self.found.join(new, room=self.left, cosine=SAME)
        self.starts, self.rounds = self.starts + len(labels), self.rounds + 1
        self.idle = 0 if self.left < before else self.idle + 1

    def _last(self, y: Float[Tensor, "1 m"]) -> Mask:
        """Masks of the last sample, of which y is known, and so which slope each unit has, if any."""
        if self.levels is None:
            return self._kept(y > 0) if self.drop else y > 0
        problem, generator = self.problem, self.drawn.generator
        activation = problem.activations[problem.last]
        slopes, value = activation.slope(y), activation.value(y)
        spaces = replace(self.whole, head=self.head * slopes, levels=None)
        labels = self.drawn.labels(STARTS[1], self.found.labels, left=1, rank=self.low.rank)
        kept = torch.rand(len(labels), y.shape[1], generator=generator).to(y) >= self.drop
        outputs = problem.activate(problem.apply(problem.last + 1, kept * value / (1 - self.drop)))
        h = unit_rows((outputs - problem.one_hot(labels)) @ spaces.head).float()
        heads = torch.linalg.qr(spaces.head_space)[0].float()
        options = Reflections(STEPS, head=heads, near=self.tolerances.near, until=self.until)
        end = retrieve_phases(Iterate(kept * h, h, h, kept * h), spaces.basis.float(), options)
        found = refine(spaces, end, head=heads, tolerances=self.tolerances)
        return torch.where(found.mask, torch.where(slopes == self.levels.active, ACTIVE, INACTIVE), GONE)

    def _kept(self, active: Bool[Tensor, "1 m"]) -> Bool[Tensor, "1 m"]:
        """Which active units dropout kept: g vanishes on the others, which tells it, and then shows where it does."""
        basis = self.whole.basis
        g = basis @ torch.linalg.svd(basis[~active[0]])[2][-1]
        return ~zero_entries(g, ZERO)[None]

    def _draw(self, place: Float[Tensor, "m k"]) -> tuple[Int[Tensor, " s"], Iterate, Float[Tensor, "m p"]]:
        """Labels, h of each class, and pre-activations at random in their space, of which a basis is returned."""
        few = self.left <= FEW_LEFT and self.problem.classes <= FEW_CLASSES
        most = STARTS[1]
        count = most if self.idle > 1 else max(STARTS[0], min(most, 2 * self.left), 2 * self.problem.classes * few)
        labels = self.drawn.labels(count, self.found.labels, left=self.left, rank=self.low.rank)
        signs = torch.where(self.scale < 0, -1.0, 1.0).to(place)
        shift = torch.zeros_like(signs) if self.norm is None else self.norm.shift / self.scale.abs().clamp_min(1e-12)
        place = torch.cat([signs[:, None] * place, shift[:, None][:, : int(shift.any())]], 1)
        partner = torch.linalg.qr(place)[0].float()
        p = self.drawn.prior.expand(len(labels), -1)
        h = unit_rows((p - self.problem.one_hot(labels)) @ self.head).float()
        noise = torch.randn(len(labels), partner.shape[1], generator=self.drawn.generator, dtype=torch.float64)
        v = unit_rows(noise.to(h) @ partner.mT)
        return labels, Iterate(h * (v > 0), h, v, h), partner
