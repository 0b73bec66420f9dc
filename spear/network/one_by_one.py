"""Samples that are certain by themselves, while others are missing: evidence, labels, peeling."""

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.network import deflation, layerwise
from spear.network.check import judge
from spear.network.factors import Factors, wedderburn
from spear.network.labels import ALONE
from spear.network.layerwise import activations
from spear.network.phase_search import PhaseSearch
from spear.network.problem import NetworkView, Targets, forward, passes
from spear.network.projection import Limits, Projections, applicable, class_sines
from spear.network.recovery import Judged, Reached, nothing, number
from spear.network.spaces import sine
from spear.published.lowrank import MIN_GAP, LowRank
from spear.reconstruction import Terms

LOOSER = 10  # times the sine that is asked for: a weight is the quotient of two such numbers
FEWEST = 16  # starts of a round: a few of any number arrive
IDLE = 4  # rounds in a row that found nothing, after which starts are not what is missing
CROWDED = 0.4  # rank over width past which hardly a start arrives


@dataclass(frozen=True)
class SampleEvidence:
    """What each gradient says about single candidates: the largest sine to a span that must hold them, and a weight.

    `weight` (s, layers) is what a sample's outer product of unit loss weight must be multiplied by to lower the
    gradient's rank by one (Wedderburn): the sample's true weight, the same in every layer.
    """

    sine: Float[Tensor, " s"]
    weight: Float[Tensor, "s layers"]


def witness(
    problem: NetworkView, lows: list[LowRank], inputs: Float[Tensor, "s n"], counts: Float[Tensor, "s classes"]
) -> SampleEvidence:
    """Forward and backward pass of each candidate held against every hidden layer's column and row space."""
    run = passes(problem, inputs, Targets(counts, 1.0, 0.0))
    sines, weights = [], []
    for k, low in enumerate(lows):
        x, delta, factors = problem.extend(k, run.inputs[k]), run.deltas[k], Factors.of(low)
        t, s = factors.place(delta, x)
        sines += [sine(x, s @ factors.rows), sine(delta, t @ factors.basis.T)]
        weights.append(wedderburn(factors.singular, t, s))
    return SampleEvidence(torch.stack(sines).amax(0), torch.stack(weights, 1))


def label(
    problem: NetworkView, inputs: Float[Tensor, "s n"], basis: Float[Tensor, "m b"]
) -> tuple[Int[Tensor, " s"], Bool[Tensor, " s"]]:
    """The class whose back-propagated vector is nearest to the span of the first gradient, and whether it alone is."""
    ranked, order = class_sines(problem, inputs, basis).sort(dim=1)
    return order[:, 0], ranked[:, 1] > ALONE * ranked[:, 0]


@dataclass(frozen=True)
class KnownSamples:
    """Samples found one after the other, each certain by itself: inputs (s, n), label counts (s, classes)."""

    inputs: Float[Tensor, "s n"]
    counts: Float[Tensor, "s classes"]

    def join(self, other: "KnownSamples") -> "KnownSamples":
        """These, then the others."""
        return KnownSamples(torch.cat([self.inputs, other.inputs]), torch.cat([self.counts, other.counts]))


def peel(
    problem: NetworkView,
    lows: list[LowRank],
    known: KnownSamples,
    unit: float,
    *,
    accept: float,
    until: float,
    generator: Generator,
) -> KnownSamples:
    """Find, certify, subtract samples until the first two gradients are empty, `IDLE` rounds find none, or time is up.

    `lows` are the factorised gradients of the hidden layers whose rank is that of the first; `known` samples are
    subtracted first. `unit` is one copy's weight in the loss, `until` what the clock shows when the time is up.
    """
    idle, found = 0, known
    factors = _without(problem, (Factors.of(lows[0]), Factors.of(lows[1])), known, unit)
    limits = _limits(accept)
    while len(factors[0].singular) and idle < IDLE and time.monotonic() < until:
        left = len(factors[0].singular)
        projections = Projections.of(problem, *factors)
        inputs = projections.samples(projections.starts(max(FEWEST, left), generator), limits)
        new = _certain(problem, lows, inputs, unit, accept)
        idle = 0 if len(new.inputs) else idle + 1
        factors, found = _without(problem, factors, new, unit), found.join(new)
    return found


def _limits(accept: float) -> Limits:
    """A peel goes on with what fits to rounding and is alone: the rest comes back in a later round."""
    sine = max(1e-6, 30 * accept)  # the exact step's is the root of a difference of roundings: 1e-8 at its best
    return Limits(rough=0.2, alike=0.9999, sine=sine, same=1 - 1e-6, gap=1e3, floor=sine / 10, rounds=8)


def _certain(
    problem: NetworkView, lows: list[LowRank], inputs: Float[Tensor, "s n"], unit: float, accept: float
) -> KnownSamples:
    """The candidates whose label one class alone explains, and whose passes and weight fit every given layer."""
    if not len(inputs):
        return KnownSamples(inputs, inputs.new_zeros(0, problem.classes))
    labels, alone = label(problem, inputs, lows[0].L)
    counts = F.one_hot(labels, problem.classes).to(inputs)
    seen = witness(problem, lows, inputs, counts)
    copies = (seen.weight.mean(1) / unit).round().clamp_min(1)
    off = (seen.weight / (copies * unit)[:, None] - 1).abs().amax(1)
    sure = alone & (seen.sine < accept) & (off < LOOSER * accept)
    return KnownSamples(inputs[sure], (counts * copies[:, None])[sure])


def _without(
    problem: NetworkView, factors: tuple[Factors, Factors], gone: KnownSamples, unit: float
) -> tuple[Factors, Factors]:
    if not len(gone.inputs):
        return factors
    run = passes(problem, gone.inputs, Targets(gone.counts, unit, 0.0))
    first, second = (f.without(run.deltas[k], problem.extend(k, run.inputs[k])) for k, f in enumerate(factors))
    return first, second


def conclude_partly(problem: NetworkView, run: PhaseSearch, reached: Reached, reason: str, terms: Terms) -> Judged:
    """What is certain while others are missing; from there on projections from the input, sample by sample."""
    lows = [problem.factors(k) for k in range(problem.last + 1)]
    rank = lows[0].rank
    reached = replace(reached, rank=rank)
    seen = all(low.rank < min(problem.gradient(k).shape) for k, low in enumerate(lows))
    known = certain_singles(problem, run, lows, terms.budget.latest) if reached.found and seen else nobody(problem)
    sharp = [low for low in lows if low.rank == rank and low.gap > MIN_GAP]
    ready = len(sharp) > 1 and sharp[0] is lows[0] and sharp[1] is lows[1] and applicable(problem)
    if ready and not terms.budget.spent(run.starts) and rank < CROWDED * min(len(low.L) for low in lows[:2]):
        options = {"accept": problem.accuracy.certain, "until": terms.budget.until, "generator": run.generator}
        known = peel(problem, sharp, known, unit_weight(problem, rank), **options)
    if not len(known.inputs):
        return nothing(problem, reason, reached)
    if len(known.inputs) == rank:
        return judge(problem, known.inputs, Targets(known.counts, unit_weight(problem, rank), 0.0), reached)
    sine = witness(problem, lows, known.inputs, known.counts).sine
    found = number(len(known.inputs), "sample")
    reason = f"{reason}; found one by one: {found}, none certified while others are missing"
    return Judged(known.inputs, known.counts, sine, torch.zeros_like(sine).bool(), False, reason, reached)


def unit_weight(problem: NetworkView, rank: int) -> float:
    """One sample's weight in the loss; where the batch size is unknown, that of a batch without repetitions."""
    return problem.unit(problem.batch_size or rank)


def certain_singles(
    problem: NetworkView, run: PhaseSearch, lows: list[LowRank], until: float = math.inf
) -> KnownSamples:
    """The solved samples that are certain by themselves, as far as the clock lets them be solved for until `until`.

    Each fits every hidden layer's spaces, with its weight.
    """
    unit = unit_weight(problem, lows[0].rank)
    if problem.last:
        rows, solved = run.singles()
    else:
        sure, s = deflation.softmax_coordinates(problem, run.spaces, run.solved)
        rows, solved = s[sure] @ run.spaces.rows, run.solved[sure]
    if not len(rows):
        return nobody(problem)
    y, scale = activations(problem, rows, solved.mask, solved.d)
    inputs, determined = layerwise.down(problem, lows, y, until)
    logits = forward(problem, inputs)[1]
    wanted = problem.activate(logits) - solved.d * scale[:, None] / unit
    labels = wanted.argmax(1) if problem.outputs > 1 else (wanted[:, 0] > 0.5).long()
    counts = F.one_hot(labels, problem.classes).to(inputs)
    seen = witness(problem, lows, inputs, counts)
    off = (seen.weight / unit - 1).abs().amax(1)
    limit = problem.accuracy.certain
    certain = determined & (seen.sine < limit) & (off < LOOSER * limit)
    return KnownSamples(inputs[certain], counts[certain])


def nobody(problem: NetworkView) -> KnownSamples:
    """No sample."""
    empty = problem.weights[-1].new_zeros
    return KnownSamples(empty(0, problem.weights[0].shape[1]), empty(0, problem.classes))
