"""The attack through every layer where an activation is not ReLU: curves at the last hidden layer, then down."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spear.network.check import WHOLE, best_check, certificate, judge
from spear.network.check import conclude as told
from spear.network.curves.descent import descend
from spear.network.curves.layer import MARGIN, Layer
from spear.network.curves.search import CurveSearch
from spear.network.labels import decode
from spear.network.layerwise import solve
from spear.network.newton import correct
from spear.network.one_by_one import KnownSamples, unit_weight, witness
from spear.network.problem import NetworkView, Targets
from spear.network.recovery import Judged, Reached, nothing, number
from spear.network.spaces import Solved
from spear.published.lowrank import MIN_GAP, LowRank
from spear.reconstruction import Refusal, Terms

ROUNDS = 2  # of softmax and slopes: directions are exact but for rounding
CROWDED = (
    f"{WHOLE}; not certified: past half the width no sample is determined alone, and that no other batch is near is not"
    " proven"
)
IDLE, TRIES = 10, 4  # rounds in a row that found nothing, after which there is no hope; of those that seek all at once


def distinct_samples(problem: NetworkView, terms: Terms) -> Judged:
    """The samples behind the gradients, each once with its label counts.

    Raises `Refusal` where a sample alone has more unknowns than equations, or a layer no bias.
    """
    low = problem.factors(problem.last)
    check_reach(problem, low)
    run = CurveSearch(problem, Layer.of(problem, low), terms.generator())
    run.until = terms.budget.until
    while run.left and run.idle < (TRIES if run.layer.crowded else IDLE) and not terms.budget.spent(run.starts):
        run.round()
        terms.report("network", len(run.known), run.whole.samples, run.starts)
    reached = Reached(low.rank, low.noise / low.largest, len(run.known), run.starts, run.rounds)
    return conclude(problem, run, low, reached) if len(run.known) else nothing(problem, str(reached), reached)


def check_biases(problem: NetworkView) -> None:
    """Raises `Refusal` where an activation is not ReLU and a hidden layer has no bias."""
    missing = [str(k + 1) for k, bias in enumerate(problem.biases[:-1]) if bias is None]
    if missing and not problem.is_relu:
        layer = f"layer {missing[0]} has no bias"
        raise Refusal(f"{layer}: with an activation other than ReLU nothing fixes the scale and sign of its inputs")


def check_reach(problem: NetworkView, low: LowRank) -> None:
    """Raises `Refusal` where the search cannot be trusted to say anything."""
    m, rank = len(low.L), low.rank
    check_biases(problem)
    if rank == min(problem.augmented(problem.last).shape) and low.gap < MIN_GAP:
        raise Refusal(
            "no gap in the singular values of the last hidden layer's gradient: a large batch, or noise on it"
        )
    if rank + MARGIN > m:
        equations = f"a batch of rank {rank} leaves {m} equations for {rank - 1} unknowns of each sample"
        raise Refusal(f"{equations} at the last hidden layer; curved activations need {MARGIN} to spare")


def conclude(problem: NetworkView, run: CurveSearch, low: LowRank, reached: Reached) -> Judged:
    """From samples at the last hidden layer to inputs, held against every layer's gradient."""
    crowded = run.whole.crowded and not run.left
    apart = run.settle() if crowded else None
    at = run.points()
    y = (run.known.s @ (low.R / low.R.norm(dim=1)[:, None]))[:, :-1]
    weight = run.whole.weight(run.known)
    deltas = weight[:, None] * at.unit
    inputs, sure = descend(problem, y, deltas, whole=not run.left)
    activated = problem.activate(at.logits)
    errors = (activated - problem.one_hot(run.known.labels)) * (weight / at.size[:, 0])[:, None]
    if not run.left and bool(sure.all()):
        targets = decode(problem, errors, activated)
        if crowded:
            return uncertified(problem, inputs, targets, reached, apart)
        inputs, known = correct(problem, inputs, targets)
        return alone(judge(problem, inputs, targets, reached, known), problem, run)
    known = KnownSamples(inputs[sure], F.one_hot(run.known.labels[sure], problem.classes).to(inputs))
    return partly(problem, known, reached)


def uncertified(
    problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Targets, reached: Reached, apart: Float[Tensor, " s"]
) -> Judged:
    """A batch past half the width that explains every layer's gradient, and to which moved samples return.

    No theorem says that it is the only one near.
    """
    final, inputs = best_check(problem, inputs, targets)
    evidence = replace(certificate(problem, final, targets, apart), reserve=CROWDED)
    judged = told(problem, evidence, inputs, targets, final, reached, WHOLE)
    return replace(judged, error_bound=torch.full_like(judged.residuals, torch.inf))


def alone(judged: Judged, problem: NetworkView, run: CurveSearch) -> Judged:
    """The same, not certified if a round of starts from the whole gradient ends at a sample that is none of these."""
    if not bool(judged.certified.any()):
        return judged
    probe = CurveSearch(problem, run.whole, run.generator)
    probe.until = run.until
    others = probe.strangers(run.known)
    if not others:
        return judged
    none, reason = (
        torch.zeros_like(judged.certified),
        f"{number(others, 'other sample')} would fit the gradient as well",
    )
    return replace(judged, certified=none, complete=False, reason=reason)


def conclude_slopes(problem: NetworkView, rows: Float[Tensor, "s in1"], solved: Solved, reached: Reached) -> Judged:
    """The same from the directions that phase retrieval found, where slopes have two values; rows = scale * [y; 1]."""
    y, scale = rows[:, :-1] / rows[:, -1:], rows[:, -1:]
    measured = solved.d * scale
    targets = replace(decode(problem, measured, _outputs(problem, y)), measured=measured)
    for _ in range(ROUNDS):
        z = problem.apply(problem.last, y)
        errors = targets.errors(_outputs(problem, y))
        deltas = (errors @ problem.weights[problem.last + 1]) * problem.activations[problem.last].slope(z)
        y = solve(deltas, problem.augmented(problem.last))[:, : y.shape[1]]
    inputs, sure = descend(problem, y, deltas, whole=True)
    if not bool(sure.all()):
        return nothing(problem, f"{reached}; too few units below tell their pre-activations", reached)
    inputs, known = correct(problem, inputs, targets)
    return judge(problem, inputs, targets, reached, known)


def _outputs(problem: NetworkView, y: Float[Tensor, "s in"]) -> Float[Tensor, "s outputs"]:
    """What the loss sees of samples with these inputs of the last hidden layer."""
    value = problem.activations[problem.last].value(problem.apply(problem.last, y))
    return problem.activate(problem.apply(problem.last + 1, value))


def partly(problem: NetworkView, known: KnownSamples, reached: Reached) -> Judged:
    """Samples found while others are missing: those that fit every layer's spaces with their weight, not certified."""
    if not len(known.inputs):
        return nothing(problem, f"{reached}; none of them leads to an input", reached)
    lows = [problem.factors(k) for k in range(problem.last + 1)]
    seen = witness(problem, lows, known.inputs, known.counts)
    unit, limit = unit_weight(problem, lows[0].rank), problem.accuracy.certain
    fits = (seen.sine < limit) & ((seen.weight / unit - 1).abs().amax(1) < 100 * limit)
    reason = (
        f"{reached}; found one by one: {number(int(fits.sum()), 'sample')}, none certified while others are missing"
    )
    none = torch.zeros_like(seen.sine[fits]).bool()
    return Judged(known.inputs[fits], known.counts[fits], seen.sine[fits], none, False, reason, reached)
