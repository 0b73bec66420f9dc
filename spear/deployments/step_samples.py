"""The samples of one local step, by projections at its weights (see `local_training`). Vectors are rows."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.deployments.simulation import Training, rounding
from spear.directions import apart, away_from, unit_rows
from spear.network.factors import Factors
from spear.network.problem import NetworkView, Targets, passes
from spear.network.projection import NEEDED, Limits, Projections, applicable, class_sines
from spear.reconstruction import Budget, Refusal

EXACT = 1e-7  # sine to the second layer's rows of a sample of this step, far from that of another's
ALONE = 1e-4  # the same where all other samples are known
NOISE = 3  # times the sine that rounding leaves of zero: still a sample of this step
NEAR = 0.05  # sine of what may be of this step or a later one
LIMITS = Limits(rough=0.3, alike=0.9999, sine=NEAR, same=1 - 1e-9)  # samples of later steps count too, if only nearly
FEWEST = 32  # starts of a search
SPARE = 5  # hidden units beyond the unknowns
ROUNDING = 1e-14  # of the largest singular value: what the decomposition itself leaves
TRIES = 40  # searches for one mini-batch
VISIBLE = 2.0  # times the largest singular value of pure rounding: belongs to the samples


@dataclass(frozen=True)
class Unexplained:
    """What the steps that are not yet retraced changed in the first two layers, above the rounding of the weights.

    `columns` span the second layer's whole change, which has every visit's back-propagated vector; `sigma` is that
    layer's rounding per entry, `count` the number of samples. `once` says that each was visited in one step only: then
    what is known can be taken out.
    """

    first: Factors
    second: Factors
    columns: Float[Tensor, "m r"]
    sigma: float
    count: int
    once: bool

    @property
    def span(self) -> Float[Tensor, "m r"]:
        """Orthonormal basis of the second layer's rows, bias aside."""
        return torch.linalg.qr(self.second.rows[:, : len(self.first.basis)].T)[0]

    def sines(
        self, problem: NetworkView, inputs: Float[Tensor, "s n"]
    ) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
        """Of each sample's activations at these weights to the second layer's rows; and what rounding makes of zero."""
        y, span = unit_rows(problem.apply(0, inputs).relu()), self.span
        strength = (y @ self.second.rows[:, : y.shape[1]].T / self.second.singular).norm(dim=1)
        return (y - y @ span @ span.T).norm(dim=1), self.sigma * y.shape[1] ** 0.5 * strength

    def projections(self, problem: NetworkView) -> Projections:
        """At the weights of a step."""
        return Projections.of(problem, self.first, self.second)

    def without(self, step: "Step", inputs: Float[Tensor, "s n"]) -> "Unexplained":
        """What is left without these samples of a step; the same where they are visited again."""
        if not self.once or not len(inputs):
            return self
        counts = F.one_hot(self.labels(step.problem, inputs), step.problem.classes).to(inputs)
        run = passes(step.problem, inputs, Targets(counts, step.weight, 0.0))
        parts = enumerate((self.first, self.second))
        first, second = (p.without(run.deltas[k], step.problem.extend(k, run.inputs[k])) for k, p in parts)
        return replace(self, first=first, second=second)

    def labels(self, problem: NetworkView, inputs: Float[Tensor, "s n"]) -> Int[Tensor, " s"]:
        """Of each sample the class whose back-propagated vector is nearest to the second layer's columns."""
        return class_sines(problem, inputs, self.columns, layer=1).argmin(1)


def open_unexplained(problem: NetworkView, training: Training) -> Unexplained:
    """The first two layers' changes. Raises `Refusal` where projections cannot tell samples from them."""
    if not applicable(problem):
        raise Refusal(f"several local steps are retraced from {NEEDED}")
    if problem.biases[-1] is not None and problem.bias_gradients[-1] is None:
        raise Refusal("the update has no change of the output bias: how it moved in several local steps is not told")
    steps, width = len(training.sizes), min(len(w) for w in problem.weights[:2])
    sigmas = [rounding(problem.affine(k), 2 * problem.precision, steps) for k in (0, 1)]
    first, second = (
        _factors(problem.augmented(k), sigmas[k], (training.count, sum(training.sizes))[k]) for k in (0, 1)
    )
    if not len(first.singular) or not len(second.singular):
        raise Refusal(f"the change of the weights is lost in their rounding, {max(sigmas):.0e} per entry")
    needed = len(second.singular) + training.count + SPARE
    if needed > width:
        wider = f"layers wider than {needed}; the narrowest has {width}"
        raise Refusal(f"{training.count} samples in {steps} steps need {wider}")
    return Unexplained(first, second, second.basis, sigmas[1], training.count, training.epochs == 1)


def _factors(change: Float[Tensor, "m n"], sigma: float, most: int) -> Factors:
    """The change of a layer above what rounding the weights after each step leaves."""
    U, s, V = torch.linalg.svd(change, full_matrices=False)
    edge = max(VISIBLE * sigma * (change.shape[0] ** 0.5 + change.shape[1] ** 0.5), ROUNDING * float(s[0]))
    rank = min(int((s > edge).sum()), most)
    return Factors(U[:, :rank], s[:rank], V[:rank])


@dataclass(frozen=True)
class Step:
    """One step to retrace: the weights that it began with, its number of samples, the `weight` of each in the change.

    The search ends with the `budget`, of which `spent` starts are gone.
    """

    problem: NetworkView
    size: int
    weight: float
    budget: Budget
    spent: int

    def find(
        self,
        whole: Unexplained,
        rest: Unexplained,
        known: Float[Tensor, "k n"],
        pool: Float[Tensor, "p n"],
        generator: Generator,
    ) -> tuple[Float[Tensor, "s n"], Float[Tensor, "q n"], int]:
        """The samples of this step, `size` at most; those near to being of it; the starts used.

        Each trial searches in what the steps before and those found so far leave of the change, `rest`; candidates are
        polished and judged by the `whole`, to which subtraction added no error. Those of earlier steps, `pool`, are
        tried first.
        """
        found, used, judge = known[:0], 0, whole.projections(self.problem)
        least = self.problem.accuracy.same
        for trial in range(TRIES):
            left = rest.without(self, found)
            over = self.budget.spent(self.spent + used)
            if len(found) >= self.size or over or not len(left.first.singular):
                break
            search = left.projections(self.problem)
            taken = torch.cat([known, found])
            near = torch.cat([taken[:0] if rest.once else taken, pool if trial % 2 else pool[:0]])
            c = search.place(pool) if trial == 0 else _starts(search, left, near, trial, generator)
            used += len(c)
            fresh = judge.polished(search.samples(c, LIMITS), LIMITS)
            fresh = fresh[apart(fresh, taken, least)]
            own = self._own(whole, fresh, len(known))
            found, pool = torch.cat([found, fresh[own]]), torch.cat([pool, fresh[~own]])
            pool = pool[apart(pool, torch.cat([known, found]), least)]
        # Where fewer are exact, those nearest to being of this step stand in; the verification judges them.
        order = whole.sines(self.problem, found)[0].argsort(), whole.sines(self.problem, pool)[0].argsort()
        ranked = torch.cat([found[order[0]], pool[order[1]]])
        return ranked[: self.size], ranked[self.size :], used

    def _own(self, whole: Unexplained, inputs: Float[Tensor, "s n"], known: int) -> Bool[Tensor, " s"]:
        """Which candidates are of this step, as far as rounding lets that be seen."""
        sine, noise = whole.sines(self.problem, inputs)
        alone = known + self.size == whole.count
        return sine < (NOISE * noise).clamp(ALONE if alone else EXACT, NEAR)


def _starts(
    projections: Projections, left: Unexplained, near: Float[Tensor, "f n"], trial: int, generator: Generator
) -> Float[Tensor, "k r"]:
    """Starts away from some of the samples `near`, alternately random and rows of the first layer's change."""
    r = len(projections.rows)
    count = max(FEWEST, 2 * r)
    mixed = trial % 4 >= 2  # two of four: each kind is tried away from the pool, and not
    c = _mixtures(projections, left.first, count, generator) if mixed else projections.draw(count, generator)
    some = torch.randperm(len(near), generator=generator)[: r // 2].to(near.device)
    return unit_rows(away_from(projections.place(near[some]), c))


def _mixtures(projections: Projections, first: Factors, count: int, generator: Generator) -> Float[Tensor, "k r"]:
    """Rows of the first layer's change, at most `count`, with the sign of a sample.

    Each is a mixture of the samples that activate its unit: it leads to samples that random starts hardly meet.
    """
    units = torch.randperm(len(projections.lift), generator=generator)[:count].to(projections.lift.device)
    mixed = first.basis[units] * first.singular
    return unit_rows(torch.where(mixed @ first.rows[:, -1:] < 0, -1.0, 1.0) * mixed @ projections.triangle.T)
