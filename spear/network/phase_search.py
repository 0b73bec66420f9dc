"""Rounds of search at the last hidden layer: starts from what is known of the labels, by the search that did best."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from spear.directions import unit_rows
from spear.network import deflation, exact_step, last_samples, many_classes, phase_retrieval
from spear.network.curves.layer import Curves, Layer
from spear.network.curves.reflections import reflect
from spear.network.curves.search import scattered
from spear.network.exact_step import Tolerances
from spear.network.phase_retrieval import Iterate, Reflections
from spear.network.policy import Plan, Policy, Standing
from spear.network.problem import NetworkView
from spear.network.spaces import SAME, Solved, Spaces, complement, leaning
from spear.network.starts import TELLING, Starts, mean_probabilities, shown_outputs
from spear.published.lowrank import LowRank

HARD = 0.36  # rank over width from which samples leave the problem one by one, and entries of h are evened out
VERY_HARD, TRIES = 0.5, (2, 6)  # past it fewer starts arrive at the layer below, too: tries of each sample there
LEAN = 0.2  # weight of what a unit's average pre-activation says; 0.1 to 0.3 are as good
CLOSER = 10  # times nearer a start must come to a crowded span to have arrived: it is near to everything
BLUR = 20  # times the gradient's noise, over the last singular value: how far two solutions of one sample may differ
MOST_BLURRED = 1e-5  # of the cosine, however large the noise: two samples are seldom that near
PIECEWISE = 200  # steps of reflections between the pieces of a curve
TAIL = 0.01  # of the width: so few samples left that their vertices are degenerate
MOST_PROGRAMMES = 12  # linear programmes in a round


class PhaseSearch:
    """A search in progress: the directions found, and how well each kind of search did last.

    `spaces` shrink when samples leave the problem; `solved` are the directions in it, `gone` those that left, in the
    coordinates of the `whole` spaces. A search under way ends when `time.monotonic` shows `until`, what follows it when
    it shows `latest`.
    """

    until = latest = math.inf

    def __init__(
        self, problem: NetworkView, spaces: Spaces, noise: float, generator: Generator, *, restricted: bool = False
    ) -> None:
        self.problem, self.generator = problem, generator
        self.whole = self.spaces = spaces
        self.solved = self.gone = Solved.none(spaces)
        self.gone_rows = spaces.rows[:0]
        self.tolerances = Tolerances(accept=problem.accuracy.direction, noise=noise)
        self.starts = self.rounds = self.idle = 0
        self.restricted, prior = restricted, shown_outputs(problem, spaces.rank)
        if restricted:
            prior = many_classes.mean_softmax(problem, prior, spaces.rank)
        self.drawn = Starts(problem, generator, prior)
        self.policy = Policy.at_first(crowded=self.crowded)
        self.low = spaces.basis.float()
        self.heads = torch.linalg.qr(spaces.head_space)[0].float()
        self.below: LowRank | None = None

    @property
    def left(self) -> int:
        """How many directions are still to be found."""
        return self.spaces.rank - len(self.solved)

    @property
    def found(self) -> Solved:
        """All directions found, in the coordinates of the whole spaces."""
        back = self.spaces.basis.T @ self.whole.basis
        here = Solved(unit_rows(self.solved.t @ back), self.solved.d, self.solved.mask)
        return self.gone.join(here, room=self.whole.rank)

    def join(self, found: Solved) -> Solved:
        """The solved directions and those of `found` that differ from them by more than noise."""
        if self.restricted:
            return self.solved.join(found, room=self.left, cosine=many_classes.SAME)
        blur = BLUR * self.tolerances.noise / max(float(self.spaces.singular[-1]), 1e-300)
        return self.solved.join(found, room=self.left, cosine=max(min(SAME, 1 - blur**2), 1 - MOST_BLURRED))

    def round(self) -> None:
        """One round: the tail by linear programming where it is due, else a search with the kind that did best last."""
        before, free = self.left, complement(self.spaces, self.solved)
        self.rounds += 1
        found = Solved.none(self.spaces) if self.restricted else self._tail(free)
        if not len(found):
            found = self._search(free)
        self.solved = self.join(found)
        self.idle = 0 if self.left < before else self.idle + 1
        if len(self.solved) >= TELLING and self.problem.loss == "cross_entropy" and not self.restricted:
            prior = mean_probabilities(self.solved, self.drawn.prior)
            self.drawn = replace(self.drawn, prior=prior, seen=self.solved.d)
        if self.stacked and self.left and len(self.solved) and self.crowded:
            self._dismiss()

    @property
    def stacked(self) -> bool:
        """Whether a layer of ReLU is below, whose zeros tell more of a sample."""
        return self.problem.last > 0 and self.problem.activations[self.problem.last - 1].is_relu

    @property
    def crowded(self) -> bool:
        """Whether the batch is so large for the width that samples had better leave the problem."""
        m, b = self.spaces.basis.shape
        return b > HARD * m and not self.restricted

    def _dismiss(self) -> None:
        """Let the solved samples whose activations the layer below determines leave the problem."""
        m, b = self.spaces.basis.shape
        index, s = self.determined(starts=TRIES[b >= VERY_HARD * m])
        if not len(index):
            return
        back, leaving = self.spaces.basis.T @ self.whole.basis, self.solved[index]
        leaving = Solved(unit_rows(leaving.t @ back), leaving.d, leaving.mask)
        self.gone = self.gone.join(leaving, room=self.whole.rank)
        self.gone_rows = torch.cat([self.gone_rows, s @ self.spaces.rows])
        self.spaces, self.solved = deflation.deflate(self.spaces, self.solved, index, s)
        self.low = self.spaces.basis.float()

    def determined(self, *, starts: int) -> tuple[Int[Tensor, " g"], Float[Tensor, "g b"]]:
        """Which of the `solved` have activations that the layer below determines, and their s."""
        if self.below is None:
            self.below = self.problem.factors(self.problem.last - 1)
        h = deflation.vectors_below(self.problem, self.solved)
        options = {"starts": starts, "generator": self.generator, "until": self.latest}
        index, mask = deflation.masks_below(h, self.below.L, self.tolerances, **options)
        inputs = self.spaces.rows[:, : h.shape[1]]
        sure, s = deflation.activation_coordinates(self.spaces, self.solved, inputs, index, mask, self.tolerances)
        return index[sure], s[sure]

    def singles(self) -> tuple[Float[Tensor, "g n1"], Solved]:
        """All samples known one by one, while others are missing: their [y; 1] up to scale, and directions."""
        if not len(self.solved):
            return self.gone_rows, self.gone
        index, s = self.determined(starts=TRIES[1])
        some = self.solved[index]
        both = (torch.cat(pair) for pair in ((self.gone.d, some.d), (self.gone.mask, some.mask)))
        t = torch.cat([self.gone.t, some.t @ (self.spaces.basis.T @ self.whole.basis)])
        return torch.cat([self.gone_rows, s @ self.spaces.rows]), Solved(t, *both)

    def _tail(self, free: Float[Tensor, "b r"]) -> Solved:
        if self.left == 1:
            return last_samples.last_one(self.spaces, free, self.tolerances)
        if not self.stacked or self.left > TAIL * len(self.spaces.basis):
            return Solved.none(self.spaces)
        inputs = self.spaces.rows[:, : self.problem.weights[self.problem.last].shape[1]]
        tries = min(self.left + 2, MOST_PROGRAMMES)
        return last_samples.vertices(self.spaces, inputs, free, self.tolerances, tries=tries, generator=self.generator)

    @property
    def standing(self) -> Standing:
        """What the policy decides by."""
        m, b = self.spaces.basis.shape
        lowest = self.problem.last == 0
        return Standing(m, b, self.left, self.idle, self.problem.classes, self.crowded, self.restricted, lowest)

    def _search(self, free: Float[Tensor, "b r"]) -> Solved:
        plan = self.policy.plan(self.standing)
        end, labels = self._retrieve(plan, free)
        if self.restricted:
            found = many_classes.settle(self.spaces, end, labels, self.drawn.prior, self.problem)
        else:
            head = self.heads if plan.free else None
            found = exact_step.refine(self.spaces, end, head=head, tolerances=self.tolerances)
        self.starts += plan.starts
        fresh = len(self.join(found)) - len(self.solved)
        self.policy.learn(plan, fresh, number=self.rounds, crowded=self.crowded)
        return found

    def _reflect(self, free: Float[Tensor, "b r"], labels: Int[Tensor, " k"]) -> Iterate:
        """Where starts end that keep to phi's pieces in z too: where its slope does not tell the sign of z."""
        spaces = self.spaces
        eye = torch.eye(free.shape[1], dtype=free.dtype, device=free.device)
        size, ones = (spaces.singular[:, None] * free).norm(dim=0), spaces.rows[:, -1] @ free
        layer = Layer(spaces.basis, size, spaces.lift @ free, ones, eye, eye)
        curves = Curves.of(self.problem, layer)
        s = layer.origin + scattered(layer, len(labels), self.generator)
        w = curves.coordinates(s).float()
        curves = curves.to(torch.float32)
        w, pieces = reflect(curves, w, labels, steps=PIECEWISE, until=self.until)
        at = curves.at(w, labels)
        h = unit_rows(at.h)
        target = curves.problem.activations[self.problem.last].at_piece(at.z, pieces)[1] * h
        return Iterate(target, h, at.z, target)

    def _retrieve(self, plan: Plan, free: Float[Tensor, "b r"]) -> tuple[Iterate, Int[Tensor, " k"]]:
        """Where the plan's starts end, and the class that was guessed for each."""
        seen = torch.cat([self.gone.labels, self.solved.labels])
        labels = self.drawn.labels(plan.starts, seen, left=self.left, rank=self.whole.rank)
        if self.spaces.levels is not None and not self.spaces.levels.signed:
            return self._reflect(free, labels), labels
        start, partner = self.drawn.draw(self.spaces, free, labels, spread=plan.free)
        lean = None
        signed = self.spaces.levels is None or self.spaces.levels.signed
        if self.crowded and not plan.free and signed and self.problem.biases[self.problem.last] is not None:
            lean = LEAN * leaning(self.spaces, free).float()
        # An h that moves goes on improving where it arrived; a crowded span is near to everything.
        near = 0.0 if plan.free else self.tolerances.near / (CLOSER if plan.evened else 1)
        levels = None if self.spaces.levels is None else self.spaces.levels.to(torch.float32)
        reflections = Reflections(plan.steps, lean=lean, near=near, until=self.until, levels=levels)
        if plan.evened:
            return phase_retrieval.search_evened(start, labels, self.low, reflections), labels
        partner, head = partner if plan.weight and signed else None, self.heads if plan.free else None
        reflections = replace(reflections, partner=partner, weight=plan.weight, head=head)
        return phase_retrieval.retrieve_phases(start, self.low, reflections), labels
