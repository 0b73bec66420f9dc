"""Batches from pruned updates: the first two gradients completed, samples by projections, held against what arrived.

Where a row or column of a gradient did not arrive often enough to be completed, the projections do without it: a
hidden unit is one equation less, an input (a pixel that hardly any neuron sent) one unknown more.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from spear.certificate import SAFETY, norms
from spear.deployments import completion
from spear.deployments.completion import Completed
from spear.network.check import CORRECTIONS, Misfit, certificate, conclude, open_by_labels
from spear.network.factors import Factors, wedderburn
from spear.network.labels import WHOLE_NUMBERS
from spear.network.problem import NetworkView, Passes, Targets, passes
from spear.network.projection import NEEDED, Limits, Projections, applicable, class_sines, each_class
from spear.network.recovery import Judged, Reached, nothing
from spear.reconstruction import Reconstruction, Refusal, Terms

SAME = 1 - 1e-6  # cosine of two solutions that are one
GAP = 1e2  # times the sine of a solution: that of the next one for its mask
ALONE = 1e-2  # of the next class's sine: that of a label that no other class explains
SPARE = 8  # hidden units beyond the unknowns
DENSE = 0.97  # share of nonzero entries in the fuller rows and columns from which none is thought to be missing
IDLE = 12  # rounds of starts in a row that found nothing new
WHOLE = "every entry that arrived is the sum of the recovered samples' own"


def kept_entries(problem: NetworkView) -> tuple[Bool[Tensor, "_m _n"], ...]:
    """Which entries of every layer's gradient arrived: those that are not zero."""
    return tuple(problem.augmented(k) != 0 for k in range(problem.last + 2))


def is_pruned(problem: NetworkView) -> bool:
    """Whether entries are missing from the first two gradients: zeros even where rows and columns hold fewest of them.

    Of a whole gradient those units and inputs that many samples share have none. Others do: one-hot columns, black
    pixels, units that one sample activates.
    """
    return all(_fullest(problem.augmented(k) != 0) < DENSE for k in range(2))


def _fullest(arrived: Bool[Tensor, "m n"]) -> float:
    """The share of entries in the fuller half of the live rows and columns."""
    live = arrived[arrived.any(1)][:, arrived.any(0)]
    rows, columns = (live.sum(1 - dim).argsort(descending=True)[: (live.shape[dim] + 1) // 2] for dim in (0, 1))
    return float(live[rows][:, columns].double().mean()) if live.numel() else 1.0


@dataclass(frozen=True)
class Sight:
    """What the projections see: both gradients' completed parts, factorised, less the samples that were found.

    Only the hidden units that both know take part. A sample's coordinates are those along the rows of the first
    gradient, and one for each input that it does not determine.
    """

    problem: NetworkView
    known: tuple[Completed, Completed]
    factors: tuple[Factors, Factors]

    @classmethod
    def of(cls, problem: NetworkView, *known: Completed) -> "Sight":
        """Before any sample was found."""
        parts = []
        for part in known:
            U, s, V = torch.linalg.svd(part.J[part.rows][:, part.columns], full_matrices=False)
            parts.append(Factors(U[:, : part.rank], s[: part.rank], V[: part.rank]))
        return cls(problem, known, tuple(parts))

    @property
    def left(self) -> int:
        """How many samples are still to be found."""
        return len(self.factors[0].singular)

    @property
    def projections(self) -> Projections:
        """Onto both gradients' rows: of the first, those known and one for each input that they leave out."""
        first, second = self.known
        units = _units(self.problem, second)
        unknown = F.one_hot((~first.columns).nonzero()[:, 0], len(first.columns)).to(first.J)
        rows = torch.cat([torch.zeros_like(first.J[: self.left]), unknown])
        rows[: self.left, first.columns] = self.factors[0].rows
        above = torch.zeros_like(second.J[: self.left])
        above[:, second.columns] = self.factors[1].rows
        return Projections.onto(self.problem.lift(0, rows)[units], rows, above[:, : len(units)][:, units])

    def search(self, starts: int, generator: Generator) -> Float[Tensor, "k n"]:
        """Inputs whose pre-activations and activations fit both gradients to rounding, from random starts."""
        limits = Limits(rough=0.2, alike=0.9999, sine=self.problem.accuracy.projection, same=SAME, gap=GAP)
        projections = self.projections
        return projections.samples(projections.starts(starts, generator), limits)

    def without(self, inputs: Float[Tensor, "s n"]) -> tuple["Sight", Bool[Tensor, " s"]]:
        """Less the samples for which one class alone explains a direction of the first gradient; which those are."""
        sines = class_sines(self.problem, inputs, self.factors[0].basis, units=self.known[0].rows)
        ranked, order = sines.sort(dim=1)
        sure = (ranked[:, 0] < ALONE * ranked[:, 1]) & (ranked[:, 0] < self.problem.accuracy.projection)
        x, label = inputs[sure], order[sure, 0]
        run = passes(self.problem, x, Targets(F.one_hot(label, self.problem.classes).to(x), 1.0, 0.0))
        parts = []
        for k, (known, part) in enumerate(zip(self.known, self.factors, strict=True)):
            deltas, states = run.deltas[k][:, known.rows], self.problem.extend(k, run.inputs[k])[:, known.columns]
            weight = wedderburn(part.singular, *part.place(deltas, states))
            parts.append(part.without(weight[:, None] * deltas, states))
        return replace(self, factors=tuple(parts)), sure


@dataclass(frozen=True)
class Pruned:
    """A problem with its first two gradients completed, and `kept`, the entries of every gradient that arrived."""

    problem: NetworkView
    kept: tuple[Bool[Tensor, "_m _n"], ...]
    first: Completed
    second: Completed

    @property
    def rank(self) -> int:
        """How many different samples are in the batch."""
        return self.first.rank

    def read(self, inputs: Float[Tensor, "b n"]) -> Targets:
        """Labels and copies of all samples: the gradient's own back-propagated vectors held against each class's."""
        known, problem = self.first, self.problem
        X = problem.extend(0, inputs)[:, known.columns]
        measured = torch.linalg.pinv(X.T) @ known.J[known.rows][:, known.columns].T
        own = torch.stack([d[:, known.rows] for d in each_class(problem, inputs)], 1)
        scale = torch.einsum("scm,sm->sc", own, measured) / own.pow(2).sum(2).clamp_min(1e-300)
        off = (measured[:, None] - scale[:, :, None] * own).norm(dim=2) / measured.norm(dim=1, keepdim=True)
        off, label = off.min(1)
        weights = scale.gather(1, label[:, None])[:, 0]
        unit = self._unit(weights)
        copies = weights / unit
        whole = copies.round().clamp_min(1)
        error = torch.maximum(off, (copies - whole).abs()).amax()
        return Targets(F.one_hot(label, problem.classes).to(inputs) * whole[:, None], unit, float(error))

    def _unit(self, weights: Float[Tensor, " b"]) -> float:
        """One copy's weight in the loss, with the sign of the samples' own; where they all have another, that."""
        told, middle = self.problem.unit(self.problem.batch_size or self.rank), float(weights.median())
        if middle < 0:
            told = -told
        common = float((weights / middle - 1).abs().max()) < self.problem.accuracy.weight
        off = abs(middle / told - max(1, round(middle / told)))
        return middle if common and off > WHOLE_NUMBERS else told

    def check(self, inputs: Float[Tensor, "b n"], targets: Targets) -> tuple[Misfit, Float[Tensor, "b n"]]:
        """The samples' own gradients against the entries that arrived, in every layer; and the inputs corrected.

        The error of an input is what the first gradient allows, where it is completed, and elsewhere what the second
        allows in the activations, seen through the weights of the active units.
        """
        problem, run = self.problem, passes(self.problem, inputs, targets)
        own = [run.deltas[k].T @ problem.extend(k, run.inputs[k]) for k in range(problem.last + 2)]
        layers = tuple(
            float(((J - own[k]) * kept).norm() / (J * kept).norm().clamp_min(1e-300))
            for k, kept in enumerate(self.kept)
            for J in [problem.augmented(k)]
        )
        step, noise = self._step(0, run, own[0])
        inner = self.first.columns[:-1]
        corrected = torch.where(inner, inputs + step[:, :-1], inputs)
        rest, doubt = self._unknown(run, own[1], corrected)
        corrected[:, ~inner] = corrected[:, ~inner] + rest
        size = problem.extend(0, inputs).norm(dim=1)
        error = (torch.hypot(step[:, self.first.columns].norm(dim=1), rest.norm(dim=1)) + noise + doubt) / size
        return Misfit(layers, error), corrected

    def _unknown(
        self, run: Passes, own: Float[Tensor, "m n1"], inputs: Float[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b u"], Float[Tensor, " b"]]:
        """What is missing of the inputs that the first gradient does not determine, and how well that is known."""
        problem, units = self.problem, _units(self.problem, self.second)
        columns = ~self.first.columns[:-1]
        if not columns.any():
            return inputs[:, :0], inputs.new_zeros(len(inputs))
        step, noise = self._step(1, run, own)
        y = run.inputs[1] + step[:, : run.inputs[1].shape[1]]
        active = ((run.inputs[1] > 0) & units).to(y)
        W, gap = problem.weights[0][:, columns], (y - problem.apply(0, inputs)) * active
        gram = torch.einsum("sm,mu,mv->suv", active, W, W)
        values, vectors = torch.linalg.eigh(gram)
        inverse = vectors / values.clamp_min(1e-300)[:, None] @ vectors.mT
        rest = torch.einsum("suv,mv,sm->su", inverse, W, gap)
        left = (gap - rest @ W.T * active).norm(dim=1) + noise * active.sum(1).sqrt()
        return rest, left / values[:, 0].clamp_min(1e-300).sqrt()

    def _step(
        self, k: int, run: Passes, own: Float[Tensor, "m n1"]
    ) -> tuple[Float[Tensor, "b n1"], Float[Tensor, " b"]]:
        """What the entries that arrived of layer k have beyond the samples' own, per sample; and the rest as noise."""
        kept = self.kept[k] & (self.first, self.second)[k].columns
        rest = (self.problem.augmented(k) - own) * kept
        basis, triangle = torch.linalg.qr(run.deltas[k].T)
        inverse = torch.linalg.inv(triangle)
        share = float(kept.double().mean())
        noise = inverse.norm(dim=1) * rest.norm() / (share * len(rest) ** 0.5)
        return inverse @ completion.masked_least_squares(basis, rest, kept.to(rest))[0], noise


def open_pruned(
    problem: NetworkView,
    generator: Generator,
    until: float = math.inf,
    kept: tuple[Bool[Tensor, "_m _n"], ...] | None = None,
) -> Pruned:
    """The first two gradients completed, the second first, until the clock shows `until`.

    `kept` are the entries of every layer's that arrived, those that are not zero unless given.

    Raises `Refusal` where too few entries arrived, or samples cannot be told apart.
    """
    if not applicable(problem):
        raise Refusal(f"pruned gradients need {NEEDED}")
    kept, parts = kept or kept_entries(problem), []
    for k in (1, 0):
        if completion.most_rank(kept[k]) < (problem.batch_size or 1):
            raise Refusal(_too_few(k, kept[k]))
        options = {
            "most": problem.batch_size,
            "tolerance": problem.accuracy.completed,
            "until": until,
            "generator": generator,
        }
        parts.insert(0, completion.complete(problem.augmented(k), kept[k], **options))
        if not parts[0].exact:
            raise Refusal(f"{_too_few(k, kept[k])}, and gave no completion that the others confirm")
    pruned = Pruned(problem, kept, *parts)
    _check_reach(pruned)
    return pruned


def _units(problem: NetworkView, second: Completed) -> Bool[Tensor, " m"]:
    """The hidden units that the second gradient knows: its columns, without that of a bias."""
    return second.columns[: len(problem.weights[0])]


def _too_few(k: int, kept: Bool[Tensor, "m n"]) -> str:
    arrived = f"{int(kept.sum())} entries of layer {k + 1}'s gradient arrived, {float(kept.double().mean()):.0%}"
    return f"{arrived}: they bear a rank of {completion.most_rank(kept)} at most"


def recover(
    problem: NetworkView, terms: Terms, kept: tuple[Bool[Tensor, "_m _n"], ...] | None = None
) -> Reconstruction:
    """The batch behind an update of which only some entries were sent; certified where it explains each of them.

    `kept` as for `open_pruned`.

    Raises `ValueError` for a gradient that is zero.
    """
    generator, rank = terms.generator(), problem.batch_size or 0
    try:
        pruned = open_pruned(problem, generator, terms.budget.until, kept)
    except Refusal as refusal:
        judged = nothing(problem, str(refusal), Reached(rank, 0.0, 0, 0, 0))
    else:
        judged = _search(pruned, generator, terms)
    return judged.entries(problem, terms.budget.elapsed, "pruning")


def _search(pruned: Pruned, generator: Generator, terms: Terms) -> Judged:
    """Rounds of starts until both gradients are empty, or the budget or hope is gone; the samples judged."""
    problem, sight = pruned.problem, Sight.of(pruned.problem, pruned.first, pruned.second)
    found, starts, rounds, idle = problem.weights[0].new_zeros(0, problem.weights[0].shape[1]), 0, 0, 0
    while sight.left and idle < IDLE and not terms.budget.spent(starts):
        count = max(16, 2 * sight.left)
        new = sight.search(count, generator)
        sight, sure = sight.without(new)
        found, starts, idle = torch.cat([found, new[sure]]), starts + count, 0 if sure.any() else idle + 1
        rounds += 1
        terms.report("pruning", len(found), pruned.rank, starts)
    reached = Reached(pruned.rank, 0.0, len(found), starts, rounds)
    if sight.left:
        return nothing(problem, f"found {len(found)} of {pruned.rank} samples in {starts} starts", reached)
    return _judged(pruned, found, reached, terms.budget.latest)


def _check_reach(pruned: Pruned) -> None:
    """Raises `Refusal` where the completed gradients do not do."""
    if pruned.first.rank != pruned.second.rank:
        ranks = f"{pruned.first.rank} and {pruned.second.rank}"
        raise Refusal(f"the completed gradients have ranks {ranks}: samples cannot be told apart")
    units, needed = int(_units(pruned.problem, pruned.second).sum()), pruned.rank + int((~pruned.first.columns).sum())
    if needed + pruned.rank > units - SPARE:
        few = f"too few for {pruned.rank} samples and {needed} unknowns of each"
        raise Refusal(f"{units} hidden units are known, {few}")


def _judged(pruned: Pruned, inputs: Float[Tensor, "b n"], reached: Reached, until: float) -> Judged:
    """The whole batch held against the entries that arrived, after corrections, as far as they help and time allows."""
    best = None
    for _ in range(CORRECTIONS):
        targets = pruned.read(inputs)
        seen, corrected = pruned.check(inputs, targets)
        if best is not None and not max(seen.layers) < 0.5 * max(best[0].layers):
            break
        best, inputs = (seen, inputs, targets), corrected
        if time.monotonic() > until:
            break
    seen, inputs, targets = best
    bound = SAFETY * seen.inputs * pruned.problem.extend(0, inputs).norm(dim=1) / norms(inputs)
    reserve = open_by_labels(pruned.problem, passes(pruned.problem, inputs, targets), targets, seen)
    evidence = certificate(pruned.problem, seen, targets, bound, reserve=reserve)
    return conclude(pruned.problem, evidence, inputs, targets, seen, reached, WHOLE)
