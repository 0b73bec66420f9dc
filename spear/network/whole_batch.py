"""The attack that uses every layer: phase retrieval at the last hidden layer, least squares down, a certificate."""

import math
import time

from jaxtyping import Bool, Float
from torch import Tensor

from spear.directions import unit_rows
from spear.network import many_classes
from spear.network.check import judge
from spear.network.curves import whole as curves
from spear.network.layerwise import RULES, activations, descend, solve
from spear.network.one_by_one import conclude_partly
from spear.network.phase_search import PhaseSearch
from spear.network.problem import NetworkView, Targets, passes
from spear.network.recovery import Judged, Reached, nothing
from spear.network.spaces import Levels, Solved, Spaces, possible_errors
from spear.published.lowrank import MIN_GAP, LowRank
from spear.reconstruction import Reconstruction, Refusal, Terms

MARGIN = 8  # units beyond the unknowns: equations that a wrong answer fails
LARGEST = 1.01  # times what a loss allows of dLoss/dlogits: scales are known to a per cent at worst
LARGE = 10.0  # logits from which a softmax may be saturated
PARALLEL = 0.999  # cosine of a direction found to the sample's own
IDLE = 12  # rounds in a row that found nothing, after which there is no hope


def recover(problem: NetworkView, terms: Terms) -> Reconstruction:
    """Recover the whole batch from the gradients of a fully connected network, entry by entry.

    Nothing is returned that the update does not support, and nothing is certified while samples are missing: an
    exhausted budget gives an incomplete result and its reason.

    Raises `ValueError` for a gradient that is zero.
    """
    return distinct_samples(problem, terms).entries(problem, terms.budget.elapsed, "network")


def distinct_samples(problem: NetworkView, terms: Terms) -> Judged:
    """The samples behind the gradients, each once with its label counts; raises as `recover` does."""
    if not problem.activations[problem.last].is_flat:
        return curves.distinct_samples(problem.widened, terms)
    low = problem.factors(problem.last)
    spaces = open_spaces(problem, low.L, low.R)
    needed = many_classes.too_many(problem, spaces, MARGIN)
    restricted = needed or many_classes.worth_a_try(problem)
    run = PhaseSearch(problem, spaces, low.noise, terms.generator(), restricted=restricted)
    run.until, run.latest = terms.budget.until, terms.budget.latest
    try:
        _check_reach(problem, spaces, low)
    except Refusal as refusal:
        if not problem.is_relu:
            raise
        return conclude_partly(problem, run, _reached(run, low), str(refusal), terms)
    result = _searched(problem, run, low, terms, for_good=needed or not restricted)
    if restricted and not needed and len(result.inputs) < low.rank:
        run.release()
        result = _searched(problem, run, low, terms)
    reached = result.reached
    if len(result.inputs) < max(reached.found, 1) and problem.is_relu:
        # Mixtures of samples whose masks resemble each other pass for samples: begin at the other end too.
        result = _more(conclude_partly(problem, run, reached, str(reached), terms), result)
    return result


def _searched(problem: NetworkView, run: PhaseSearch, low: LowRank, terms: Terms, *, for_good: bool = True) -> Judged:
    """What a search leads to; one that is not `for_good` is given up where every class having one h yields little."""
    _search(problem, run, terms, for_good=for_good)
    reached = _reached(run, low)
    found, none = run.sharp, nothing(problem, str(reached), reached)
    if not len(found) or (run.left and not for_good):
        return none
    solved = many_classes.sharpen(problem, run.whole, found) if run.restricted and not run.left else found
    whole = conclude(problem, run.whole, solved, reached, terms.budget.latest)
    return _more(whole, none) if run.left else whole


def _search(problem: NetworkView, run: PhaseSearch, terms: Terms, *, for_good: bool) -> None:
    """Rounds until all directions are found, the budget is spent or they find no more."""
    while run.left and not (run.starts and terms.budget.spent(run.starts)):
        run.round()
        terms.report("network", run.whole.rank - run.left, run.whole.rank, run.starts)
        if run.idle >= IDLE or (run.idle == 2 and blurred(problem, run)):
            break
        if not for_good and many_classes.fruitless(run.idle, run.whole.rank - run.left, run.starts):
            break


def _reached(run: PhaseSearch, low: LowRank) -> Reached:
    return Reached(low.rank, low.noise / low.largest, low.rank - run.left, run.starts, run.rounds)


def _more(first: Judged, second: Judged) -> Judged:
    """The result with more samples, in doubt the second."""
    return first if len(first.inputs) > len(second.inputs) else second


def blurred(problem: NetworkView, run: PhaseSearch) -> bool:
    """Whether the last hidden layer no longer tells all samples apart: its gradient has less rank than the first."""
    return problem.last > 0 and problem.factors(0).rank > run.whole.rank


def open_spaces(problem: NetworkView, L: Float[Tensor, "m b"], R: Float[Tensor, "b n1"]) -> Spaces:
    """The spaces of the last hidden layer from its factorised gradient L R."""
    singular = R.norm(dim=1)
    rows = R / singular[:, None]
    lift = problem.lift(problem.last, rows)
    levels = Levels.of(problem.activations[problem.last], len(L))
    return Spaces(L, singular, rows, lift, problem.weights[-1], possible_errors(problem, len(R)), levels)


def _check_reach(problem: NetworkView, spaces: Spaces, low: LowRank) -> None:
    """Raises `Refusal` where the search cannot be trusted to say anything."""
    curves.check_biases(problem)
    widths = [len(w) for w in problem.weights[:-1]]
    rank, live = spaces.rank, int((spaces.basis.norm(dim=1) > many_classes.DEAD).sum())
    if problem.batch_size and rank > 2 * problem.batch_size and low.gap < MIN_GAP:
        seen = f"rank {rank} without a gap from a batch of {problem.batch_size}"
        raise Refusal(f"{seen}: there is noise on the gradient, or something was added to it (control variates)")
    if rank == min(problem.gradient(problem.last).shape) and low.gap < MIN_GAP:
        least = f"the last of {rank} is {low.smallest / low.largest:.0e} of the first"
        where = f"no gap in the singular values of the last hidden layer's gradient: {least}"
        raise Refusal(f"{where}: a batch too large for width {widths[-1]}, or noise on the gradient")
    if min(widths) < rank + MARGIN:
        k = widths.index(min(widths))
        needed = f"every hidden layer at least {rank + MARGIN} wide"
        raise Refusal(f"a batch of rank {rank} needs {needed}; layer {k + 1} has {widths[k]}")
    if live < rank + (2 if problem.loss == "cross_entropy" else problem.outputs) + MARGIN:
        raise Refusal(f"a batch of rank {rank} leaves too few live units in the last hidden layer: {live}")
    if problem.biases[problem.last] is None and problem.loss != "cross_entropy":
        raise Refusal(f"without biases the scale of an image shows in the softmax alone; the loss is {problem.loss}")


def conclude(problem: NetworkView, spaces: Spaces, solved: Solved, reached: Reached, until: float = math.inf) -> Judged:
    """From all directions to samples: held against every layer's gradient, in one way, and in others till `until`."""
    rows = solve(solved.t, spaces.singular[:, None] * spaces.rows)
    sane = plausible(problem, rows, solved)
    rows, solved = rows[sane], solved[sane]
    if not problem.is_relu:
        found = curves.conclude_slopes(problem.widened, rows, solved, reached) if len(solved) else None
        return found or nothing(problem, str(reached), reached)
    if not len(solved):
        return nothing(problem, str(reached), reached)
    best = nothing(problem, str(reached), reached)
    for rule in RULES:
        inputs, targets = descend(problem, rows, solved.mask, solved.d, rule=rule)
        result = judge(problem, inputs, targets, reached)
        if len(result.inputs) < reached.rank:
            same = consistent(problem, spaces, solved, inputs, targets)
            if same.any() and not same.all():
                result = _more(judge(problem, inputs[same], targets[same], reached), result)
        best = _more(best, result)
        if len(best.inputs) == reached.rank or time.monotonic() > until:
            break
        if all(problem.factors(k).rank >= len(rows) for k in range(problem.last)):  # the gradients told, not the rule
            break
    return best if best.complete else as_measured(problem, rows, solved, best, until)


def as_measured(
    problem: NetworkView, rows: Float[Tensor, "s in1"], solved: Solved, best: Judged, until: float
) -> Judged:
    """The batch with dLoss/dlogits as measured, where these are better: large logits have their rounding multiplied.

    Nothing is certified so: that a sample's softmax is the measured one is seen to a per cent only.
    """
    y, _ = activations(problem, rows, solved.mask, solved.d)
    logits = problem.apply(problem.last + 1, problem.apply(problem.last, y) * solved.mask)
    if problem.loss != "cross_entropy" or float(logits.abs().amax()) < LARGE or time.monotonic() > until:
        return best
    inputs, targets = descend(problem, rows, solved.mask, solved.d, computed=False)
    return max(best, judge(problem, inputs, targets, best.reached), key=_known)


def _known(result: Judged) -> tuple[int, int, float]:
    """How many samples there are, how many are certified, and how near to the truth the last of them is."""
    off = float(result.error_bound.max()) if len(result.inputs) else math.inf
    return len(result.inputs), int(result.certified.sum()), -off


def plausible(problem: NetworkView, rows: Float[Tensor, "s in1"], solved: Solved) -> Bool[Tensor, " s"]:
    """Whose dLoss/dlogits is no larger than its loss can make it, times a factor that all have: one of mere noise has
    any size."""
    if problem.loss == "squared_error":
        return rows.isfinite().all(1)
    scale = activations(problem, rows, solved.mask, solved.d)[1]
    copies = 1 if problem.reduction == "mean" else problem.batch_size or 2 * len(rows)
    size = (solved.d * scale[:, None]).abs().amax(1)
    return size < LARGEST * (len(size) * size.median()).clamp_min(problem.unit(1) * copies)


def consistent(
    problem: NetworkView, spaces: Spaces, solved: Solved, inputs: Float[Tensor, "s n"], targets: Targets
) -> Bool[Tensor, " s"]:
    """Whose own backward pass points along the direction found: not so where that was too weak to lead to an input."""
    own = unit_rows(passes(problem, inputs, targets).deltas[problem.last] @ spaces.basis)
    return (own * solved.t).sum(1).abs() > PARALLEL
