"""Rounds of search at the last hidden layer: starts from what is known of the labels, by the search that did best."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.directions import unit_rows
from spear.network import deflation, exact_step, last_samples, many_classes, phase_retrieval
from spear.network.exact_step import Tolerances
from spear.network.phase_retrieval import Iterate
from spear.network.problem import NetworkView
from spear.network.spaces import Solved, Spaces, complement, leaning
from spear.published.lowrank import LowRank

HARD = 0.36  # rank over width from which samples leave the problem one by one, and entries of h are evened out
LEAN = 0.2  # weight of what a unit's average pre-activation says; 0.1 to 0.3 are as good


@dataclass(frozen=True)
class Plan:
    """One round's search: whether h moves, how many starts and steps, and the partner's weight (0 leaves it out).

    `evened` evens out the rows: a unit with a small h_j says 0 or h_j as clearly as one with a large h_j.
    """

    free: bool
    starts: int
    steps: int
    weight: float
    evened: bool


class PhaseSearch:
    """A search in progress: the directions found, and how well each kind of search did last.

    `spaces` shrink when samples leave the problem; `solved` are the directions in it, `gone` those that left, in the
    coordinates of the `whole` spaces. A search under way ends when `time.perf_counter` shows `until`.
    """

    until = math.inf

    def __init__(
        self, problem: NetworkView, spaces: Spaces, noise: float, generator: Generator, *, restricted: bool = False
    ) -> None:
        self.problem, self.generator = problem, generator
        self.whole = self.spaces = spaces
        self.solved = self.gone = Solved.none(spaces)
        self.gone_rows = spaces.rows[:0]
        self.tolerances = Tolerances(accept=problem.accuracy.direction, noise=noise)
        self.starts = self.rounds = self.idle = 0
        self.prior = prior_outputs(problem)
        self.restricted, self.alone = restricted, 1.0  # share of starts that found something without the partner
        if restricted:
            self.prior = many_classes.mean_softmax(problem, self.prior, spaces.rank)
        self.shares = {False: (1.0, 0), True: (0.002 if self.crowded else 0.05, 0)}
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
            return self.solved.join(found, room=self.left, cosine=1 - 1e-2)
        blur = 20 * self.tolerances.noise / max(float(self.spaces.singular[-1]), 1e-300)
        return self.solved.join(found, room=self.left, cosine=1 - min(max(1e-9, blur**2), 1e-5))

    def round(self) -> None:
        """One round: the tail by linear programming where it is due, else a search with the kind that did best last."""
        before, free = self.left, complement(self.spaces, self.solved)
        self.rounds += 1
        found = Solved.none(self.spaces) if self.restricted else self._tail(free)
        if not len(found):
            found = self._search(free)
        self.solved = self.join(found)
        self.idle = 0 if self.left < before else self.idle + 1
        if len(self.solved) >= 20 and self.problem.loss == "cross_entropy" and not self.restricted:
            self.prior = mean_probabilities(self.solved, self.prior)
        if self.problem.last and self.left and len(self.solved) and self.crowded:
            self._dismiss()

    @property
    def crowded(self) -> bool:
        """Whether the batch is so large for the width that samples had better leave the problem."""
        m, b = self.spaces.basis.shape
        return b > HARD * m and not self.restricted

    def _dismiss(self) -> None:
        """Let the solved samples whose activations the layer below determines leave the problem."""
        m, b = self.spaces.basis.shape
        index, s = self.determined(starts=2 if b < 0.5 * m else 6)  # in a crowd fewer starts arrive, below as well
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
        index, mask = deflation.masks_below(h, self.below.L, self.tolerances, starts=starts, generator=self.generator)
        inputs = self.spaces.rows[:, : h.shape[1]]
        sure, s = deflation.activation_coordinates(self.spaces, self.solved, inputs, index, mask, self.tolerances)
        return index[sure], s[sure]

    def singles(self) -> tuple[Float[Tensor, "g n1"], Solved]:
        """All samples known one by one, while others are missing: their [y; 1] up to scale, and directions."""
        if not len(self.solved):
            return self.gone_rows, self.gone
        index, s = self.determined(starts=6)
        some = self.solved[index]
        both = (torch.cat(pair) for pair in ((self.gone.d, some.d), (self.gone.mask, some.mask)))
        t = torch.cat([self.gone.t, some.t @ (self.spaces.basis.T @ self.whole.basis)])
        return torch.cat([self.gone_rows, s @ self.spaces.rows]), Solved(t, *both)

    def _tail(self, free: Float[Tensor, "b r"]) -> Solved:
        if self.left == 1:
            return last_samples.last_one(self.spaces, free, self.tolerances)
        if self.problem.last == 0 or self.left > 0.01 * len(self.spaces.basis):
            return Solved.none(self.spaces)
        inputs = self.spaces.rows[:, : self.problem.weights[self.problem.last].shape[1]]
        tries = min(self.left + 2, 12)
        return last_samples.vertices(self.spaces, inputs, free, self.tolerances, tries=tries, generator=self.generator)

    def plan(self) -> Plan:
        """How to search: cheap while many are left and starts succeed, then with the partner, longer when idle."""
        m, b = self.spaces.basis.shape
        free = not self.restricted and max(self.shares, key=lambda kind: (self.shares[kind][0], -self.shares[kind][1]))
        starts = int(min(128 if b < 0.3 * m else 256, max(32, 1.5 * self.left)))
        if self.left <= 16 and self.problem.classes <= 20:
            starts = max(starts, 2 * self.problem.classes)
        steps = 100 if b < 0.3 * m else 200 if b < 0.45 * m else 300
        weight = self._partner_weight()
        evened = not free and not weight and self.crowded and self.problem.classes <= 20
        return Plan(free, starts, steps * min(1 + self.idle, 5), weight, evened)

    def _partner_weight(self) -> float:
        """How much the pre-activations count: all with one hidden layer, else once that promises more than without."""
        share = self.left / self.spaces.rank
        alone = self.idle % 2 == 0 if self.crowded else share > 0.7 and self.alone >= 0.3
        if self.problem.last and alone:
            return 0.0
        return 0.5 if self.problem.last and share > 0.4 else 1.0

    def _search(self, free: Float[Tensor, "b r"]) -> Solved:
        plan = self.plan()
        start, labels, partner = self.begin(plan, free)
        head = self.heads if plan.free else None
        near = self.tolerances.near / (10 if plan.evened else 1)  # a crowded span is near to everything
        near = 0.0 if plan.free else near  # an h that moves goes on improving
        options = {"steps": plan.steps, "near": near, "until": self.until}
        if self.crowded and not plan.free and self.problem.biases[self.problem.last] is not None:
            options["lean"] = LEAN * leaning(self.spaces, free).float()
        if plan.evened:
            end = phase_retrieval.search_evened(start, labels, self.low, **options)
        else:
            partner = partner if plan.weight else None
            end = phase_retrieval.retrieve_phases(
                start, self.low, partner=partner, weight=plan.weight, head=head, **options
            )
        if self.restricted:
            found = many_classes.settle(self.spaces, end, labels, self.prior, self.problem)
        else:
            found = exact_step.refine(self.spaces, end, head=head, tolerances=self.tolerances)
        self.starts += plan.starts
        fresh = len(self.join(found)) - len(self.solved)
        if not plan.weight:
            self.alone = fresh / plan.starts
        share = self.shares[plan.free][0] / 4 if self.crowded and not fresh else fresh / plan.starts
        self.shares[plan.free] = (share, self.rounds)
        return found

    def begin(self, plan: Plan, free: Float[Tensor, "b r"]) -> tuple[Iterate, Int[Tensor, " k"], Float[Tensor, "m r"]]:
        """Starts, with their guessed classes: pre-activations drawn from the space of the unsolved samples."""
        labels = self.guess(plan.starts)
        p = self.prior.expand(plan.starts, -1)
        if plan.free:
            p = torch.where(self._coins(plan.starts), self._sharp(plan.starts), p)
        h = unit_rows((p - self.problem.one_hot(labels)) @ self.spaces.head)
        partner, triangle = torch.linalg.qr(self.spaces.lift @ free)
        a = torch.randn(plan.starts, free.shape[1], generator=self.generator, dtype=torch.float64).to(free)
        if self.problem.biases[self.problem.last] is not None:
            ones = torch.linalg.solve_triangular(triangle.T, (self.spaces.rows[:, -1] @ free)[:, None], upper=False)
            a = a * torch.sign(a @ ones)
        v = unit_rows(a @ partner.T)
        h, v = h.float(), v.float()
        return Iterate(h * (v > 0), h, v, h), labels, partner.float()

    def _coins(self, count: int) -> Bool[Tensor, "k 1"]:
        return (torch.rand(count, 1, generator=self.generator) < 0.5).to(self.prior.device)

    def _sharp(self, count: int) -> Float[Tensor, "k outputs"]:
        """Outputs as a trained network makes them: of logits a few units apart."""
        logits = torch.randn(count, len(self.prior), generator=self.generator, dtype=torch.float64)
        return self.problem.activate(3 * logits).to(self.prior)

    def guess(self, count: int) -> Int[Tensor, " k"]:
        """A class for every start, by the label counts that the output bias discloses; all in turn near the end."""
        number = self.problem.classes
        if self.left <= 16 and number <= 20:
            return torch.arange(count, device=self.prior.device) % number
        have = torch.bincount(torch.cat([self.gone.labels, self.solved.labels]), minlength=number)
        need = label_counts(self.problem, self.prior, self.whole.rank) - have
        need = need.clamp_min(0.3 if number <= 20 else 0.02).cpu()
        return torch.multinomial(need, count, replacement=True, generator=self.generator).to(self.prior.device)


def prior_outputs(problem: NetworkView) -> Float[Tensor, " outputs"]:
    """What the loss sees of a fresh network, whatever the input: its output bias, activated."""
    bias = problem.biases[-1]
    return problem.activate(torch.zeros_like(problem.weights[-1][:, 0]) if bias is None else bias)


def mean_probabilities(solved: Solved, prior: Float[Tensor, " classes"]) -> Float[Tensor, " classes"]:
    """The mean softmax of the solved samples; the scale of d makes the label's own probability the prior one."""
    label = solved.labels[:, None]
    p = solved.d * (-(1 - prior[label]) / solved.d.gather(1, label))
    p = p.scatter_add(1, label, torch.ones_like(p[:, :1])).mean(0).clamp_min(1e-6)
    return p / p.sum()


def label_counts(problem: NetworkView, prior: Float[Tensor, " outputs"], rank: int) -> Float[Tensor, " classes"]:
    """How often each label occurs, from the output bias gradient, the sum of activated outputs less the one-hot labels.

    All alike without one.
    """
    size = problem.batch_size or rank
    gradient = problem.bias_gradients[-1]
    if gradient is None:
        return prior.new_full((problem.classes,), size / problem.classes)
    counts = size * prior - gradient / problem.unit(size)
    return (torch.cat([size - counts, counts]) if problem.outputs == 1 else counts).clamp_min(0)
