"""The attack that uses every layer: phase retrieval at the last hidden layer, least squares down, a certificate."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear import phase, single
from spear.chain import Problem, Targets
from spear.lowrank import LowRank, decompose
from spear.peeling import Check, above_gap, above_noise, activations, check, descend, solve
from spear.phase import Solved, Spaces
from spear.projection import Peeled, peel
from spear.rounds import Run

MARGIN = 8
MIN_GAP = 1e3


@dataclass(frozen=True)
class Budget:
    """When to stop: seconds, starts, and rounds in a row that found nothing."""

    seconds: float = float("inf")
    starts: int = 1_000_000
    idle: int = 12


@dataclass(frozen=True)
class Stats:
    """What the search cost and reached."""

    rank: int
    gap: float
    found: int
    starts: int
    rounds: int
    seconds: float
    layers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Recovery:
    """Recovered samples (k, n), their label counts (k, classes), residuals and certificates, and why it stopped."""

    inputs: Float[Tensor, "k n"]
    counts: Float[Tensor, "k classes"]
    residuals: Float[Tensor, " k"]
    certified: Bool[Tensor, " k"]
    complete: bool
    reason: str
    stats: Stats

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
    low = decompose(problem.augmented(problem.last), rank)
    spaces = open_spaces(problem, low.L, low.R)
    refusal = _refusal(problem, spaces, low.gap)
    run = Run(problem, spaces, low.gap, generator)
    while refusal is None and run.left:
        run.round()
        stats = figures(run, low.gap, begin)
        if progress:
            progress(stats)
        if stats.seconds > budget.seconds or run.starts >= budget.starts or run.idle >= budget.idle:
            break
        if run.idle == 2 and blurred(problem, run):
            break
    stats = figures(run, low.gap, begin)
    result = None if refusal or run.left else conclude(problem, spaces, run.found, stats)
    if result is None or not (result.complete or problem.last == 0):
        # Mixtures of samples whose masks resemble each other pass for samples: begin at the other end too.
        partly = conclude_partly(problem, run, stats, refusal or (result and result.reason), budget)
        result = partly if result is None or len(partly.inputs) > len(result.inputs) else result
    return replace(result, stats=replace(result.stats, seconds=time.perf_counter() - begin))


def blurred(problem: Problem, run: Run) -> bool:
    """Whether the last hidden layer no longer tells all samples apart: its gradient has less rank than the first."""
    return problem.last > 0 and decompose(problem.augmented(0)).rank > run.whole.rank


def figures(run: Run, gap: float, begin: float) -> Stats:
    """The figures so far of a run that began at `begin` on the performance counter."""
    rank = run.whole.rank
    return Stats(rank, gap, rank - run.left, run.starts, run.rounds, time.perf_counter() - begin)


def open_spaces(problem: Problem, L: Float[Tensor, "m b"], R: Float[Tensor, "b n1"]) -> Spaces:
    """The spaces of the last hidden layer from its factorised gradient L R."""
    singular = R.norm(dim=1)
    rows = R / singular[:, None]
    lift = problem.affine(problem.last) @ rows.T
    return Spaces(L, singular, rows, lift, problem.weights[-1], phase.contrasts(problem.outputs, problem.loss, L))


def _refusal(problem: Problem, spaces: Spaces, gap: float) -> str | None:
    """Why the search cannot be trusted to say anything, or `None`."""
    widths = [len(w) for w in problem.weights[:-1]]
    rank, live = spaces.rank, int((spaces.basis.norm(dim=1) > 1e-9).sum())
    widths = [len(w) for w in problem.weights[:-1]]
    rank, live = spaces.rank, int((spaces.basis.norm(dim=1) > 1e-9).sum())
    if gap < MIN_GAP:
        where = "no gap in the singular values of the last hidden layer's gradient"
        return f"{where}: a batch too large for width {widths[-1]}"
    if min(widths) < rank + MARGIN:
        k = widths.index(min(widths))
        needed = f"every hidden layer at least {rank + MARGIN} wide"
        return f"a batch of rank {rank} needs {needed}; layer {k + 1} has {widths[k]}"
    if live < rank + problem.classes + MARGIN:
        needed = f"{rank + problem.classes + MARGIN} live units in the last hidden layer"
        return f"a batch of rank {rank} with {problem.classes} classes needs {needed}; {live} are"
    return None


def conclude_partly(problem: Problem, run: Run, stats: Stats, refusal: str | None, budget: Budget) -> Recovery:
    """What is certain while others are missing; from there on projections from the input, sample by sample."""
    found = f"found {stats.found} of {stats.rank} gradient directions in {stats.rounds} rounds of {stats.starts} starts"
    reason = refusal or found
    if problem.last == 0:
        return _nothing(problem, reason if refusal else f"{found}; one hidden layer gives inputs only with all", stats)
    lows = [decompose(problem.augmented(k)) for k in range(problem.last + 1)]
    rank = lows[0].rank
    stats = replace(stats, rank=rank, gap=lows[0].gap)
    sharp = [low for low in lows if low.rank == rank and low.gap > MIN_GAP]
    single_ready = stats.found > 0 and len(sharp) == len(lows)
    known = certain_singles(problem, run, lows) if single_ready else _nobody(problem)
    left = budget.seconds - stats.seconds
    ready = len(sharp) > 1 and sharp[0] is lows[0] and sharp[1] is lows[1] and problem.biases[0] is not None
    if ready and left > 0 and run.starts < budget.starts and rank < 0.4 * min(len(low.L) for low in lows[:2]):
        options = {"accept": sureness(problem), "seconds": left, "generator": run.generator}
        known = peel(problem, sharp, known, unit_weight(problem, rank), **options)
    if len(known.inputs) == rank:
        return judge(problem, known.inputs, Targets(known.counts, unit_weight(problem, rank), 0.0), stats)
    if not len(known.inputs):
        return _nothing(problem, reason, stats)
    sine = single.witness(problem, sharp, known.inputs, known.counts).sine
    reason = f"{reason}; {len(known.inputs)} samples are certain one by one"
    return Recovery(known.inputs, known.counts, sine, torch.ones_like(sine).bool(), False, reason, stats)


def sureness(problem: Problem) -> float:
    """The sine that a certain sample must stay under: rounding, amplified by the conditioning of a typical batch."""
    return 1e-9 if problem.precision < 1e-12 else 1e-5


def unit_weight(problem: Problem, rank: int) -> float:
    """One sample's weight in the loss; where the batch size is unknown, that of a batch without repetitions."""
    return problem.unit(problem.batch_size or rank)


def certain_singles(problem: Problem, run: Run, lows: list[LowRank]) -> Peeled:
    """The solved samples that are certain by themselves: each fits every hidden layer's spaces, with its weight."""
    rows, solved = run.singles()
    if not len(rows):
        return _nobody(problem)
    y, scale = activations(problem, rows, solved.mask, solved.d)
    inputs, determined = single.down(problem, lows, y)
    counts = F.one_hot((solved.d * scale[:, None]).argmin(1), problem.classes).to(inputs)
    seen = single.witness(problem, lows, inputs, counts)
    off = (seen.weight / unit_weight(problem, lows[0].rank) - 1).abs().amax(1)
    certain = determined & (seen.sine < sureness(problem)) & (off < 10 * sureness(problem))
    return Peeled(inputs[certain], counts[certain])


def conclude(problem: Problem, spaces: Spaces, solved: Solved, stats: Stats) -> Recovery:
    """From all directions to samples: certified where they explain every layer's gradient."""
    rows = solve(solved.t, spaces.singular[:, None] * spaces.rows)
    for positive in (above_noise, above_gap):
        inputs, targets = descend(problem, rows, solved.mask, solved.d, positive=positive)
        result = judge(problem, inputs, targets, stats)
        if result.complete or problem.last == 0:
            break
    return result


def judge(problem: Problem, inputs: Float[Tensor, "s n"], targets: Targets, stats: Stats) -> Recovery:
    """The whole batch held against the update, after corrections that rounding allows."""
    final, inputs = best_check(problem, inputs, targets)
    certified = certify(final, targets, problem.precision)
    stats, good = replace(stats, layers=final.layers), bool(certified.all())
    reason = "every layer's gradient is the sum of the recovered samples'" if good else _why_not(final, targets)
    sure = certified.nonzero()[:, 0]  # an image that the evidence does not support is never returned
    return Recovery(inputs[sure], targets.counts[sure], final.inputs[sure], certified[sure], good, reason, stats)


def certify(final: Check, targets: Targets, precision: float) -> Bool[Tensor, " s"]:
    """Which samples of a batch that explains every layer's gradient are exact to 1e-6 (1e-3 for gradients in float32).

    Two images closer than e and with equal masks look like two copies of their mean, up to e squared: copies are held
    to that.
    """
    limit = 1e-6 if precision < 1e-12 else 1e-3
    allowed = torch.where(targets.copies > 1.5, limit**2 / 10, limit / 2)
    layer = max(1e-9, 100 * precision) if bool((targets.copies < 1.5).all()) else limit**2 / 10
    return (final.inputs < allowed) & (max(final.layers) < layer) & (targets.error < 1e-4)


def best_check(
    problem: Problem, inputs: Float[Tensor, "s n"], targets: Targets, *, rounds: int = 8
) -> tuple[Check, Float[Tensor, "s n"]]:
    """Correct the inputs by what the check leaves over, as long as that helps; the best check and its inputs."""
    best, corrected = check(problem, inputs, targets)
    for _ in range(rounds):
        if best.worst < 100 * problem.precision:
            break
        trial, following = check(problem, corrected, targets)
        if not trial.worst < best.worst:
            break
        slow = trial.worst > best.worst / 2
        best, inputs, corrected = trial, corrected, following
        if slow:
            break
    return best, inputs


def _why_not(final: Check, targets: Targets) -> str:
    if targets.error >= 1e-4:
        off = f"labels do not come out as whole numbers (off by {targets.error:.1e})"
        return f"{off}: neither hard nor evenly smoothed labels"
    layer, sample = max(final.layers), float(final.inputs.max())
    return f"the samples' gradients leave {layer:.1e} of a layer's gradient, {sample:.1e} of an input, unexplained"


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
