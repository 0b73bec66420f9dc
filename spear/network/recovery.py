"""What the attacks on every layer share: how far a search came, and the samples that it ended with."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from spear.network.problem import NetworkView
from spear.reconstruction import Reconstruction, Stats


@dataclass(frozen=True)
class Reached:
    """How far a search came, and what for: `found` of `rank` directions, in `rounds` of `starts` starts together.

    The directions are those above the gradient's noise, which is `noise` of the strongest.
    """

    rank: int
    noise: float
    found: int
    starts: int
    rounds: int

    def __str__(self) -> str:
        rounds = number(self.rounds, "round")
        return f"found {self.found} of {self.rank} gradient directions in {rounds} of {self.starts} starts"


@dataclass(frozen=True)
class Judged:
    """Distinct samples (k, n) held against the update: label counts (k, classes), residuals, certificates, the verdict.

    `weights` (k,) in the loss are given where they are not all alike; each sample then has one label, counted once.
    """

    inputs: Float[Tensor, "k n"]
    counts: Float[Tensor, "k classes"]
    residuals: Float[Tensor, " k"]
    certified: Bool[Tensor, " k"]
    complete: bool
    reason: str
    reached: Reached
    weights: Float[Tensor, " k"] | None = None

    def entries(self, problem: NetworkView, seconds: float, method: str) -> Reconstruction:
        """The batch entry by entry: a sample comes as often as it is in it, with a label each time."""
        pairs = self.counts.round().nonzero()  # smoothed labels are near one-hot
        times = self.counts[pairs[:, 0], pairs[:, 1]].round().long()
        sample, label = (column.repeat_interleave(times) for column in pairs.T)
        return Reconstruction(
            problem.shaped(self.inputs[sample]),
            label,
            self.reached.rank,
            self.residuals[sample],
            self.certified[sample],
            self.complete,
            self.reason,
            Stats(seconds, self.reached.starts, self.reached.rounds),
            weights=None if self.weights is None else self.weights[sample],
            method=method,
        )


def nothing(problem: NetworkView, reason: str, reached: Reached) -> Judged:
    """No sample, and why."""
    empty = problem.weights[0].new_zeros
    none = empty(0, problem.weights[0].shape[1]), empty(0, problem.classes), empty(0), empty(0).bool()
    return Judged(*none, False, reason, reached)


def number(count: int, noun: str) -> str:
    """The count and the noun, in the plural where it is not one."""
    return f"{count} {noun}{'s' * (count != 1)}"
