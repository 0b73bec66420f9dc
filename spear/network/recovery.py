"""What the attacks on every layer share: budget, figures, the recovered samples with their label counts."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear import reconstruction
from spear.network.phase_search import PhaseSearch
from spear.network.problem import NetworkView
from spear.published.lowrank import LowRank
from spear.reconstruction import Reconstruction

WHOLE_COUNT = 1e-4  # distance from a whole number up to which a count of copies is one


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
    `error_bound` (k,) is that of the certificate, infinite where none was tried.
    """

    inputs: Float[Tensor, "k n"]
    counts: Float[Tensor, "k classes"]
    residuals: Float[Tensor, " k"]
    certified: Bool[Tensor, " k"]
    complete: bool
    reason: str
    stats: Stats
    weights: Float[Tensor, " k"] | None = None
    error_bound: Float[Tensor, " k"] | None = None

    def __post_init__(self) -> None:
        if self.error_bound is None:
            object.__setattr__(self, "error_bound", torch.full_like(self.residuals, torch.inf))

    @property
    def entries(self) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """The batch entry by entry: which sample, which label; a repeated sample appears as often as it is in it."""
        whole = ((self.counts - self.counts.round()).abs() < WHOLE_COUNT).all(1, keepdim=True)
        largest = F.one_hot(self.counts.argmax(1), self.counts.shape[1])  # of smoothed labels
        counts = torch.where(whole, self.counts.round().long(), largest)
        pairs = counts.nonzero()
        times = counts[pairs[:, 0], pairs[:, 1]]
        return pairs[:, 0].repeat_interleave(times), pairs[:, 1].repeat_interleave(times)


def searched(stats: Stats) -> str:
    """How far the search came, in words."""
    rounds = number(stats.rounds, "round")
    return f"found {stats.found} of {stats.rank} gradient directions in {rounds} of {stats.starts} starts"


def number(count: int, noun: str) -> str:
    """The count and the noun, in the plural where it is not one."""
    return f"{count} {noun}{'s' * (count != 1)}"


def figures(run: PhaseSearch, low: LowRank, begin: float) -> Stats:
    """The figures so far of a run that began at `begin` on the performance counter."""
    noise, found = low.noise / low.largest, low.rank - run.left
    return Stats(low.rank, low.gap, noise, found, run.starts, run.rounds, time.perf_counter() - begin)


def nothing(problem: NetworkView, reason: str, stats: Stats) -> Recovery:
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


def limits(budget: reconstruction.Budget) -> Budget:
    return Budget(
        budget.left,
        Budget.starts if budget.proposals is None else budget.proposals,
    )


def entries(found: Recovery, problem: NetworkView) -> Reconstruction:
    """What was recovered, entry by entry of the batch."""
    sample, label = found.entries
    inputs = found.inputs[sample].unflatten(1, problem.input_shape).contiguous()
    stats = reconstruction.Stats(found.stats.seconds, found.stats.starts, found.stats.rounds)
    evidence = (found.residuals[sample], found.certified[sample], found.complete, found.reason, stats)
    weights = None if found.weights is None else found.weights[sample]
    rest = {"weights": weights, "error_bound": found.error_bound[sample], "limit": problem.accuracy.recovered}
    return Reconstruction(inputs, label, found.stats.rank, *evidence, **rest)
