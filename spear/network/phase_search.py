"""Rounds of search at the last hidden layer: starts from what is known of the labels, by the search that did best."""

import math
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
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
from spear.network.repulsion import Repulsion
from spear.network.spaces import SAME, Foretold, Solved, Spaces, complement
from spear.network.starts import TELLING, Starts, mean_probabilities, prior_outputs, saturated
from spear.network.two_layers import FewInputs, TwoLayers
from spear.published.lowrank import LowRank

HARD = 0.36  # rank over width from which samples leave the problem one by one, and entries of h are evened out
LONG_WAY = 512  # samples left from which most starts would end at solved ones: these had better leave, too
CLOSER = 10  # times nearer a start must come to a crowded span to have arrived: it is near to everything
BLUR = 20  # times the gradient's noise, over the last singular value: how far two solutions of one sample may differ
MOST_BLURRED = 1e-5  # of the cosine, however large the noise: two samples are seldom that near
REPEATED = 0.35  # share of solutions that had been found before, from which starts keep away from what is solved
ENOUGH, MOSTLY = 8, 0.5  # solved samples, and the share with a saturated softmax from which others are expected to
PIECEWISE = 200  # steps of reflections between the pieces of a curve
TAIL = 0.01  # of the width: so few samples left that their vertices are degenerate
MOST_PROGRAMMES = 12  # linear programmes in a round


class PhaseSearch:
    """A search in progress: the directions found, and how well each kind of search did last.

    `spaces` shrink when samples leave the problem; `solved` are the directions in it, `gone` those that left, in the
    coordinates of the `whole` spaces. While `restricted`, every class keeps one h. A search under way ends when
    `time.monotonic` shows `until`, what follows it when it shows `latest`.
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
        self.restricted, prior = restricted, prior_outputs(problem)
        if restricted:
            prior = many_classes.mean_softmax(problem, prior, spaces.rank)
        self.drawn = Starts(problem, generator, prior)
        self.policy = Policy.at_first(crowded=self.crowded)
        self.low = spaces.basis.float()
        self.masks_below, self.hints, self.repelled = self._unknown(0), None, False
        self.heads = torch.linalg.qr(spaces.head_space)[0].float()

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

    @property
    def sharp(self) -> Solved:
        """The same, each solved for anew from its mask: of what samples that left were off by, nothing is in them."""
        found = self.found
        if not len(self.gone):
            return found
        exact = exact_step.solve_mask(self.whole, found.mask)
        good = exact_step.accepted(exact, self.tolerances)[:, None]
        pairs = ((exact.t, found.t), (exact.d, found.d), (exact.mask, found.mask))
        return Solved(*(torch.where(good, *pair) for pair in pairs))

    def join(self, found: Solved) -> Solved:
        """The solved directions and those of `found` that differ from them by more than noise."""
        if self.restricted:
            return self.solved.join(found, room=self.left, cosine=many_classes.SAME)
        blur = BLUR * self.tolerances.noise / max(float(self.spaces.singular[-1]), 1e-300)
        return self.solved.join(found, room=self.left, cosine=max(min(SAME, 1 - blur**2), 1 - MOST_BLURRED))

    def round(self) -> None:
        """One round: a search by the kind that did best last; near the end, where that failed, linear programming."""
        before, free = self.left, complement(self.spaces, self.solved)
        self.rounds += 1
        found = Solved.none(self.spaces) if self.restricted else self._tail(free)
        if not len(found):
            found = self._search(free)
        self.solved = self.join(found)
        self.masks_below = torch.cat([self.masks_below, self._guess_below(self.solved.t[len(self.masks_below) :])])
        self.idle = 0 if self.left < before else self.idle + 1
        if len(self.solved) >= TELLING and self.problem.loss == "cross_entropy" and not self.restricted:
            self.drawn = replace(self.drawn, prior=mean_probabilities(self.solved, self.drawn.prior))
        if self._saturates():
            self.policy.expect("saturated")
        far = self.crowded or (self.left > LONG_WAY and not self.restricted)
        if self.stacked and self.left and len(self.solved) and far:
            self._dismiss()

    def _saturates(self) -> bool:
        """Whether most solved samples have a softmax that knows two classes only, and a third there is."""
        if len(self.solved) < ENOUGH or "saturated" in self.policy.shares or self.problem.outputs < 3:
            return False
        return bool(saturated(self.solved.d).double().mean() > MOSTLY)

    def release(self) -> None:
        """Let h differ from sample to sample: of what one h a class has found, what the exact step accepts stays."""
        found, self.solved, self.restricted, self.idle = self.solved, Solved.none(self.spaces), False, 0
        self.drawn = Starts(self.problem, self.generator, prior_outputs(self.problem))
        if len(found):
            exact = exact_step.solve_mask(self.spaces, found.mask)
            self.solved = self.join(exact.solved(exact_step.accepted(exact, self.tolerances)))
        self.policy, self.masks_below = Policy.at_first(crowded=self.crowded), self._unknown(len(self.solved))

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
        index, s = self.determined()
        if not len(index):
            return
        back, leaving = self.spaces.basis.T @ self.whole.basis, self.solved[index]
        leaving = Solved(unit_rows(leaving.t @ back), leaving.d, leaving.mask)
        self.gone = self.gone.join(leaving, room=self.whole.rank)
        self.gone_rows = torch.cat([self.gone_rows, s @ self.spaces.rows])
        stay = torch.ones(len(self.solved), dtype=torch.bool, device=index.device).index_fill(0, index, False)
        self.spaces, self.solved = deflation.deflate(self.spaces, self.solved, index, s)
        self.masks_below = self.masks_below[stay]
        self.low = self.spaces.basis.float()

    @property
    def factors_below(self) -> LowRank:
        """The factorised gradient of the layer below."""
        return self.problem.factors(self.problem.last - 1)

    def _unknown(self, count: int) -> Bool[Tensor, "f m1"]:
        """Masks of which nothing is known: no unit is active."""
        return torch.zeros(count, self.problem.weights[self.problem.last].shape[1], dtype=torch.bool).to(
            self.low.device
        )

    def _guess_below(self, t: Float[Tensor, "f b"]) -> Bool[Tensor, "f m1"]:
        """What the search says of the masks below of directions that it found."""
        if self.hints is None or not len(t):
            return self._unknown(len(t))
        targets, masks = self.hints
        return masks[(t.to(self.low) @ self.low.T @ targets.T).abs().argmax(1)]

    def determined(self) -> tuple[Int[Tensor, " g"], Float[Tensor, "g b"]]:
        """Which of the `solved` have activations that the layer below determines, and their s."""
        low, every = self.factors_below, torch.arange(len(self.solved), device=self.solved.t.device)
        if low.rank < self.whole.rank:  # its span does not hold the samples' own vectors
            sure, s = deflation.coordinates_by_inputs(
                self.spaces, self.solved, self.image_below, every, self.tolerances, until=self.latest
            )
            return every[sure], s[sure]
        h = deflation.vectors_below(self.problem, self.spaces, self.solved)
        index, mask = deflation.masks_below(self.spaces, self.solved, h, self.masks_below, low.L, self.tolerances)
        self.masks_below[index] = mask
        inputs = self.spaces.rows[:, : h.shape[1]]
        sure, s = deflation.activation_coordinates(self.spaces, self.solved, inputs, index, mask, self.tolerances)
        left = (~sure).nonzero()[:, 0]  # too few zeros
        sure[left], s[left] = deflation.coordinates_by_inputs(
            self.spaces, self.solved, self.image_below, index[left], self.tolerances, mask=mask[left], until=self.latest
        )
        return index[sure], s[sure]

    @cached_property
    def image_below(self) -> Float[Tensor, "m1 r1"]:
        """Orthonormal basis of the possible pre-activations of the layer below."""
        return torch.linalg.qr(self.problem.lift(self.problem.last - 1, unit_rows(self.factors_below.R)))[0]

    def singles(self) -> tuple[Float[Tensor, "g n1"], Solved]:
        """All samples known one by one, while others are missing: their [y; 1] up to scale, and directions."""
        if not len(self.solved):
            return self.gone_rows, self.gone
        index, s = self.determined()
        some = self.solved[index]
        both = (torch.cat(pair) for pair in ((self.gone.d, some.d), (self.gone.mask, some.mask)))
        t = torch.cat([self.gone.t, some.t @ (self.spaces.basis.T @ self.whole.basis)])
        return torch.cat([self.gone_rows, s @ self.spaces.rows]), Solved(t, *both)

    def _tail(self, free: Float[Tensor, "b r"]) -> Solved:
        if self.left == 1:
            return last_samples.last_one(self.spaces, free, self.tolerances)
        if not self.stacked or not self.idle or self.left > TAIL * len(self.spaces.basis):
            return Solved.none(self.spaces)
        inputs = self.spaces.rows[:, : self.problem.weights[self.problem.last].shape[1]]
        tries = min(self.left + 2, MOST_PROGRAMMES)
        return last_samples.vertices(self.spaces, inputs, free, self.tolerances, tries=tries, generator=self.generator)

    @property
    def standing(self) -> Standing:
        """What the policy decides by."""
        m, b = self.spaces.basis.shape
        lowest = self.problem.last == 0
        paired = self.crowded and self.stacked and self.problem.activations[self.problem.last].is_relu
        return Standing(m, b, self.left, self.idle, self.problem.classes, self.crowded, self.restricted, lowest, paired)

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
        self.repelled |= not self.restricted and len(found) - fresh > REPEATED * len(found)
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
        w = curves.coordinates_of(layer.pre_activations(s)).float()
        curves = curves.to(torch.float32)
        w, pieces = reflect(curves, w, labels, steps=PIECEWISE, until=self.until)
        at = curves.at(w, labels)
        h = unit_rows(at.h)
        target = curves.problem.activations[self.problem.last].at_piece(at.z, pieces)[1] * h
        return Iterate(target, h, at.z, target)

    def _retrieve(self, plan: Plan, free: Float[Tensor, "b r"]) -> tuple[Iterate, Int[Tensor, " k"]]:
        """Where the plan's starts end, and the class that was guessed for each."""
        seen, self.hints = torch.cat([self.gone.labels, self.solved.labels]), None
        labels = self.drawn.labels(plan.starts, seen, left=self.left, rank=self.whole.rank)
        if self.spaces.levels is not None and not self.spaces.levels.signed:
            return self._reflect(free, labels), labels
        biased = self.problem.biases[self.problem.last] is not None
        s = Foretold.of(self.spaces, free, biased=biased).draw(plan.starts, self.generator)
        if plan.kind == "saturated":
            start = self.drawn.saturated(self.spaces, s, torch.cat([self.gone.d, self.solved.d]))
        else:
            start = self.drawn.draw(self.spaces, s, labels, spread=plan.free)
        # An h that moves goes on improving where it arrived; a crowded span is near to everything.
        near = 0.0 if plan.free else self.tolerances.near / (CLOSER if plan.paired else 1)
        if plan.paired:
            return self._pair(start, s, free, Reflections(plan.steps, near=near, until=self.until)), labels
        levels = None if self.spaces.levels is None else self.spaces.levels.to(torch.float32)
        partner = torch.linalg.qr((self.spaces.lift @ free).float())[0] if plan.partnered else None
        head = self.heads if plan.free else None
        away = Repulsion.of(self.spaces, self.solved) if self.repelled and self.idle % 4 < 2 else None
        reflections = Reflections(plan.steps, partner, head=head, near=near, until=self.until, away=away)
        return phase_retrieval.retrieve_phases(start, self.low, replace(reflections, levels=levels)), labels

    def _pair(
        self, start: Iterate, s: Float[Tensor, "k b"], free: Float[Tensor, "b r"], options: Reflections
    ) -> Iterate:
        """Where starts end that search the layer below as well; what they say of its masks is kept."""
        low, top = self.factors_below, self.problem.last
        if low.rank < self.whole.rank:
            below = self.problem.lift(top - 1, unit_rows(low.R))
            return FewInputs.of(self.spaces, below, free).search(start, s, options).above
        pair = TwoLayers.of(self.spaces, self.problem.weights[top], low.L, free).search(start, s, options)
        self.hints = (unit_rows(pair.target), pair.target_below != 0)
        return pair.above
