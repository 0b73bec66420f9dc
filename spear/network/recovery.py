"""What the attacks on every layer share: how far a search came, and the samples that it ended with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.network.labels import WHOLE_NUMBERS
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
    `error_bound` (k,) is that of the certificate, infinite where none was tried. Samples that are not `labelled` count
    once; `targets` (k, outputs) are then what a squared error compares the outputs with.
    """

    inputs: Float[Tensor, "k n"]
    counts: Float[Tensor, "k classes"]
    residuals: Float[Tensor, " k"]
    certified: Bool[Tensor, " k"]
    complete: bool
    reason: str
    reached: Reached
    weights: Float[Tensor, " k"] | None = None
    error_bound: Float[Tensor, " k"] | None = None
    labelled: bool = True
    targets: Float[Tensor, "k outputs"] | None = None

    def __post_init__(self) -> None:
        if self.error_bound is None:
            object.__setattr__(self, "error_bound", torch.full_like(self.residuals, torch.inf))

    def entries(self, problem: NetworkView, seconds: float, method: str) -> Reconstruction:
        """The batch entry by entry: a sample comes as often as it is in it, with a label each time."""
        pairs = self._whole.nonzero()
        times = self._whole[pairs[:, 0], pairs[:, 1]]
        sample, label = (column.repeat_interleave(times) for column in pairs.T)
        return Reconstruction(
            problem.shaped(self.inputs[sample]),
            label if self.labelled else None,
            self.reached.rank,
            self.residuals[sample],
            self.certified[sample],
            self.complete,
            self.reason,
            Stats(seconds, self.reached.starts, self.reached.rounds),
            weights=None if self.weights is None else self.weights[sample],
            method=method,
            error_bound=self.error_bound[sample],
            limit=problem.accuracy.recovered,
            targets=None if self.targets is None else self.targets[sample],
        )

    @property
    def _whole(self) -> Int[Tensor, "k classes"]:
        """The label counts as whole numbers; of smoothed labels, the largest one."""
        whole = ((self.counts - self.counts.round()).abs() < WHOLE_NUMBERS).all(1, keepdim=True)
        return torch.where(whole, self.counts.round().long(), F.one_hot(self.counts.argmax(1), self.counts.shape[1]))


def nothing(problem: NetworkView, reason: str, reached: Reached) -> Judged:
    """No sample, and why."""
    empty = problem.weights[-1].new_zeros
    none = empty(0, problem.weights[0].shape[1]), empty(0, problem.classes), empty(0), empty(0).bool()
    return Judged(*none, False, reason, reached)


def number(count: int, noun: str) -> str:
    """The count and the noun, in the plural where it is not one."""
    return f"{count} {noun}{'s' * (count != 1)}"
