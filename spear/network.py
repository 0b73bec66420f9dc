"""The attack that uses every layer: phase retrieval at the last hidden layer, least squares down, a certificate."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear import classes, phase, single
from spear.chain import Problem, Targets, forward, passes
from spear.lowrank import LowRank
from spear.peeling import Check, PositiveRule, above_gap, above_noise, activations, check, descend, solve
from spear.phase import Solved, Spaces
from spear.projection import Peeled, peel
from spear.rounds import Run
from spear.weighting import reweighed

MARGIN = 8
MIN_GAP = 1e3
WHOLE = "every layer's gradient is the sum of the recovered samples'"


@dataclass(frozen=True)
class Budget:
    """When to stop: seconds, starts, and rounds in a row that found nothing."""

    seconds: float = float("inf")
    starts: int = 1_000_000
    idle: int = 12


@dataclass(frozen=True)
class Stats:
    """What the search cost and reached.

    `rank` directions stand above the gradient's noise, which is `noise` of the strongest; `gap` is how far.
    """

    rank: int
    gap: float
    noise: float
    found: int
    starts: int
    rounds: int
    seconds: float
    layers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Recovery:
    """Recovered samples (k, n), their label counts (k, classes), residuals and certificates, and why it stopped.

    `weights` (k,) in the loss are given where they are not all alike; each sample then has one label, counted once.
    """

    inputs: Float[Tensor, "k n"]
    counts: Float[Tensor, "k classes"]
    residuals: Float[Tensor, " k"]
    certified: Bool[Tensor, " k"]
    complete: bool
    reason: str
    stats: Stats
    weights: Float[Tensor, " k"] | None = None

    @property
    def entries(self) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """The batch entry by entry: which sample, which label; a repeated sample appears as often as it is in it."""
        pairs = self.counts.round().nonzero()  # smoothed labels are near one-hot
        times = self.counts[pairs[:, 0], pairs[:, 1]].round().long()
        return pairs[:, 0].repeat_interleave(times), pairs[:, 1].repeat_interleave(times)


def recover(
    problem: Problem,
    *,
    rank: int | None = None,
    budget: Budget = Budget(),
    generator: Generator | None = None,
    progress: Callable[[Stats], None] | None = None,
) -> Recovery:
    """Recover the whole batch from the gradients of a fully connected ReLU network.

    `rank` is the number of distinct samples, found from the gradient of the last hidden layer where it is not given.
    `progress` receives the figures so far after every round. Nothing is returned unless it is certified:
    an exhausted budget gives an incomplete result and its reason.

    Raises `ValueError` for a gradient that is zero.
    """
    begin = time.perf_counter()
    generator = generator or Generator().manual_seed(0)
    low = problem.factors(problem.last, rank)
    spaces = open_spaces(problem, low.L, low.R)
    refusal = _refusal(problem, spaces, low)
    restricted = classes.too_many(problem, spaces, MARGIN)
    run = Run(problem, spaces, low.noise, generator, restricted=restricted)
    run.until = begin + budget.seconds
    while refusal is None and run.left:
        run.round()
        stats = figures(run, low, begin)
        if progress:
            progress(stats)
        if stats.seconds > budget.seconds or run.starts >= budget.starts or run.idle >= budget.idle:
            break
        if run.idle == 2 and blurred(problem, run):
            break
    stats = figures(run, low, begin)
    result = _nothing(problem, refusal or searched(stats), stats)
    if refusal is None and len(run.found):
        solved = classes.sharpen(problem, spaces, run.found) if restricted and not run.left else run.found
        whole = conclude(problem, spaces, solved, stats)
        result = _more(whole, result) if run.left else whole
    if refusal or len(result.inputs) < max(stats.found, 1):
        # Mixtures of samples whose masks resemble each other pass for samples: begin at the other end too.
        result = _more(conclude_partly(problem, run, stats, refusal, budget), result)
    return replace(result, stats=replace(result.stats, seconds=time.perf_counter() - begin))


def _more(first: Recovery, second: Recovery) -> Recovery:
    """The result with more samples, in doubt the second."""
    return first if len(first.inputs) > len(second.inputs) else second


def searched(stats: Stats) -> str:
    """How far the search came, in words."""
    rounds = number(stats.rounds, "round")
    return f"found {stats.found} of {stats.rank} gradient directions in {rounds} of {stats.starts} starts"


def number(count: int, noun: str) -> str:
    """The count and the noun, in the plural where it is not one."""
    return f"{count} {noun}{'s' * (count != 1)}"


def blurred(problem: Problem, run: Run) -> bool:
    """Whether the last hidden layer no longer tells all samples apart: its gradient has less rank than the first."""
    return problem.last > 0 and problem.factors(0).rank > run.whole.rank


def figures(run: Run, low: LowRank, begin: float) -> Stats:
    """The figures so far of a run that began at `begin` on the performance counter."""
    noise, found = low.noise / low.largest, low.rank - run.left
    return Stats(low.rank, low.gap, noise, found, run.starts, run.rounds, time.perf_counter() - begin)


def open_spaces(problem: Problem, L: Float[Tensor, "m b"], R: Float[Tensor, "b n1"]) -> Spaces:
    """The spaces of the last hidden layer from its factorised gradient L R."""
    singular = R.norm(dim=1)
    rows = R / singular[:, None]
    lift = problem.affine(problem.last) @ rows.T
    return Spaces(L, singular, rows, lift, problem.weights[-1], phase.contrasts(problem.outputs, problem.loss, L))


def _refusal(problem: Problem, spaces: Spaces, low: LowRank) -> str | None:
    """Why the search cannot be trusted to say anything, or `None`."""
    widths = [len(w) for w in problem.weights[:-1]]
    rank, live = spaces.rank, int((spaces.basis.norm(dim=1) > 1e-9).sum())
    if problem.batch_size and rank > 2 * problem.batch_size and low.gap < MIN_GAP:
        return f"rank {rank} without a gap from a batch of {problem.batch_size}: there is noise on the gradient"
    if rank == min(problem.augmented(problem.last).shape) and low.gap < MIN_GAP:
        least = f"the last of {rank} is {low.smallest / low.largest:.0e} of the first"
        where = f"no gap in the singular values of the last hidden layer's gradient: {least}"
        return f"{where}: a batch too large for width {widths[-1]}, or noise on the gradient"
    if min(widths) < rank + MARGIN:
        k = widths.index(min(widths))
        needed = f"every hidden layer at least {rank + MARGIN} wide"
        return f"a batch of rank {rank} needs {needed}; layer {k + 1} has {widths[k]}"
    if live < rank + (2 if problem.loss == "cross_entropy" else problem.outputs) + MARGIN:
        return f"a batch of rank {rank} leaves too few live units in the last hidden layer: {live}"
    if problem.biases[problem.last] is None and problem.loss != "cross_entropy":
        return f"without biases the scale of an image shows in the softmax alone; the loss is {problem.loss}"
    return None


def conclude_partly(problem: Problem, run: Run, stats: Stats, refusal: str | None, budget: Budget) -> Recovery:
    """What is certain while others are missing; from there on projections from the input, sample by sample."""
    reason = refusal or searched(stats)
    lows = [problem.factors(k) for k in range(problem.last + 1)]
    rank = lows[0].rank
    stats = replace(stats, rank=rank, gap=lows[0].gap)
    seen = all(low.rank < min(problem.augmented(k).shape) for k, low in enumerate(lows))
    known = certain_singles(problem, run, lows) if stats.found and seen else _nobody(problem)
    sharp = [low for low in lows if low.rank == rank and low.gap > MIN_GAP]
    left = budget.seconds - stats.seconds
    ready = len(sharp) > 1 and sharp[0] is lows[0] and sharp[1] is lows[1] and problem.biases[0] is not None
    if ready and left > 0 and run.starts < budget.starts and rank < 0.4 * min(len(low.L) for low in lows[:2]):
        options = {"accept": sureness(problem), "seconds": left, "generator": run.generator}
        known = peel(problem, sharp, known, unit_weight(problem, rank), **options)
    if not len(known.inputs):
        return _nothing(problem, reason, stats)
    if len(known.inputs) == rank:
        return judge(problem, known.inputs, Targets(known.counts, unit_weight(problem, rank), 0.0), stats)
    sine = single.witness(problem, lows, known.inputs, known.counts).sine
    reason = f"{reason}; certain one by one: {number(len(known.inputs), 'sample')}"
    return Recovery(known.inputs, known.counts, sine, torch.ones_like(sine).bool(), False, reason, stats)


def sureness(problem: Problem) -> float:
    """The sine that a certain sample must stay under: rounding, amplified by the conditioning of a typical batch."""
    return 1e-9 if problem.precision < 1e-12 else 1e-5


def unit_weight(problem: Problem, rank: int) -> float:
    """One sample's weight in the loss; where the batch size is unknown, that of a batch without repetitions."""
    return problem.unit(problem.batch_size or rank)


def certain_singles(problem: Problem, run: Run, lows: list[LowRank]) -> Peeled:
    """The solved samples that are certain by themselves: each fits every hidden layer's spaces, with its weight."""
    unit = unit_weight(problem, lows[0].rank)
    if problem.last:
        rows, solved = run.singles()
    else:
        sure, s = single.softmax_coordinates(problem, run.spaces, run.solved)
        rows, solved = s[sure] @ run.spaces.rows, run.solved[sure]
    if not len(rows):
        return _nobody(problem)
    y, scale = activations(problem, rows, solved.mask, solved.d)
    inputs, determined = single.down(problem, lows, y)
    logits = forward(problem, inputs)[1]
    wanted = problem.activate(logits) - solved.d * scale[:, None] / unit
    labels = wanted.argmax(1) if problem.outputs > 1 else (wanted[:, 0] > 0.5).long()
    counts = F.one_hot(labels, problem.classes).to(inputs)
    seen = single.witness(problem, lows, inputs, counts)
    off = (seen.weight / unit - 1).abs().amax(1)
    certain = determined & (seen.sine < sureness(problem)) & (off < 10 * sureness(problem))
    return Peeled(inputs[certain], counts[certain])


def conclude(problem: Problem, spaces: Spaces, solved: Solved, stats: Stats) -> Recovery:
    """From all directions to samples: certified where they explain every layer's gradient."""
    rows = solve(solved.t, spaces.singular[:, None] * spaces.rows)
    sane = plausible(problem, rows, solved)
    rows, solved, best = rows[sane], solved[sane], None
    for positive, spans in masks_by(problem) if len(solved) else ():
        inputs, targets = descend(problem, rows, solved.mask, solved.d, positive=positive, spans=spans)
        result = judge(problem, inputs, targets, stats)
        if not result.complete:
            same = consistent(problem, spaces, solved, inputs, targets)
            result = _more(judge(problem, inputs[same], targets[same], stats), result) if same.any() else result
        if result.complete:
            return result
        best = _more(result, best) if best else result
    return best or _nothing(problem, searched(stats), stats)


def masks_by(problem: Problem) -> Iterator[tuple[PositiveRule, list[Tensor] | None]]:
    """Ways to tell which units below are active, the cheapest first; weak samples need the spans of the gradients."""
    yield above_gap, None
    if problem.last:
        yield above_noise, None
        yield above_gap, [problem.factors(k).L for k in range(problem.last)]


def plausible(problem: Problem, rows: Float[Tensor, "s in1"], solved: Solved) -> Bool[Tensor, " s"]:
    """Whose dLoss/dlogits is no larger than its loss can make it: a direction of mere noise has any size."""
    if problem.loss == "squared_error":
        return rows.isfinite().all(1)
    scale = activations(problem, rows, solved.mask, solved.d)[1]
    copies = 1 if problem.reduction == "mean" else problem.batch_size or 2 * len(rows)
    return (solved.d * scale[:, None]).abs().amax(1) < 1.01 * problem.unit(1) * copies


def consistent(
    problem: Problem, spaces: Spaces, solved: Solved, inputs: Float[Tensor, "s n"], targets: Targets
) -> Bool[Tensor, " s"]:
    """Whose own backward pass points along the direction found: not so where that was too weak to lead to an input."""
    own = phase.normalise(passes(problem, inputs, targets).deltas[problem.last] @ spaces.basis)
    return (own * solved.t).sum(1).abs() > 0.999


def judge(problem: Problem, inputs: Float[Tensor, "s n"], targets: Targets, stats: Stats) -> Recovery:
    """The whole batch held against the update, after corrections that rounding allows."""
    if not targets.whole:
        targets = reweighed(problem, inputs, targets)
    final, inputs = best_check(problem, inputs, targets)
    certified = certify(problem, final, targets)
    sure = certified.nonzero()[:, 0]  # an image that the evidence does not support is never returned
    weights = None if targets.whole else targets.copies[sure] * targets.unit / problem.unit(1)
    counts = (targets.counts if targets.whole else (targets.counts > 0).to(inputs))[sure]
    copies = int(counts.sum().round())
    size = problem.batch_size or (round(problem.unit(1) / targets.unit) if problem.reduction == "mean" else copies)
    good = len(sure) == stats.rank and copies == size
    reason = WHOLE if good else _why(final, targets, len(sure)) or weak(stats, len(sure), copies, size)
    stats = replace(stats, layers=final.layers)
    return Recovery(inputs[sure], counts, final.inputs[sure], certified[sure], good, reason, stats, weights)


def certify(problem: Problem, final: Check, targets: Targets) -> Bool[Tensor, " s"]:
    """Which samples of a batch that explains every layer's gradient are exact to 1e-6 (1e-3 for gradients in float32).

    Two images closer than e and with equal masks look like two copies of their mean, up to e squared: copies are held
    to that. Where the batch size is not known, pairs of such images look like one of each: then every layer is.
    """
    limit = 1e-6 if problem.precision < 1e-12 else 1e-3
    copied = targets.copies > 1.5 if targets.whole else torch.zeros_like(final.inputs, dtype=torch.bool)
    unsure = bool(copied.any()) or (problem.batch_size is None and problem.reduction == "mean")
    layer = limit**2 / 10 if unsure else max(1e-9, 100 * problem.precision)
    allowed = torch.where(copied, limit**2 / 10, limit / 2)
    return (final.inputs < allowed) & (max(final.layers) < layer) & (targets.error < 1e-4)


def best_check(
    problem: Problem, inputs: Float[Tensor, "s n"], targets: Targets, *, rounds: int = 8
) -> tuple[Check, Float[Tensor, "s n"]]:
    """Correct the inputs by what the check leaves over, as long as that helps; the best check and its inputs."""
    best, corrected = check(problem, inputs, targets)
    for _ in range(rounds):
        if best.worst < 500 * problem.precision:
            break
        trial, following = check(problem, corrected, targets)
        before, after = max(best.layers), max(trial.layers)
        if not after < before:
            break
        slow = after > before / 2
        best, inputs, corrected = trial, corrected, following
        if slow:
            break
    return best, inputs


def _why(final: Check, targets: Targets, certain: int) -> str:
    """Why no sample is certain: labels that are none, or an unexplained rest; empty where some are."""
    if targets.error >= 1e-4:
        off = f"labels do not come out as whole numbers (off by {targets.error:.1e})"
        return f"{off}: neither hard nor evenly smoothed labels of equal weight"
    layer, sample = max(final.layers), float(final.inputs.max())
    rest = f"the samples' gradients leave {layer:.1e} of a layer's gradient, {sample:.1e} of an input, unexplained"
    return "" if certain else rest


def weak(stats: Stats, certain: int, copies: int, size: int) -> str:
    """Why only some samples are certain: the others' gradients are weak, or lie under the noise floor altogether."""
    visible, hidden = stats.rank - certain, max(size - copies - (stats.rank - certain), 0)
    said = [f"{copies} of {size} samples are certain"]
    if visible:
        said.append(f"too weak for a certificate: {visible} of {stats.rank} gradient directions")
    if hidden:
        floor = f"{stats.noise:.0e} of the strongest direction"
        said.append(f"under the noise floor, {floor}: {number(hidden, 'sample')}")
    return "; ".join(said)


def _nobody(problem: Problem) -> Peeled:
    empty = problem.weights[0].new_zeros
    return Peeled(empty(0, problem.weights[0].shape[1]), empty(0, problem.classes))


def _nothing(problem: Problem, reason: str, stats: Stats) -> Recovery:
    empty = problem.weights[0].new_zeros
    return Recovery(
        empty(0, problem.weights[0].shape[1]),
        empty(0, problem.classes),
        empty(0),
        empty(0).bool(),
        False,
        reason,
        stats,
    )
