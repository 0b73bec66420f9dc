"""The search for all columns of the disaggregation matrix: SPEAR's loop of sampling, filtering and greedy choice."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear import filtering, sampling, sparsity, theory
from spear.filtering import Observed

PATIENCE = 40  # times the expected number of proposals, before directions of fewer zeros are let in
CROWD = 8  # candidates for each column that are kept: noise lets false ones through in numbers
FEWEST_ZEROS = 0.15  # share of a layer's rows: networks that were trained leave down to 0.21 of them zero


@dataclass(frozen=True)
class Progress:
    """Where a running attack stands: directions `found` of the `rank` needed, `proposals` so far, `seconds` so far."""

    found: int
    rank: int
    proposals: int
    seconds: float


@dataclass(frozen=True)
class Budget:
    """When a search gives up: `seconds` after it `started`, or after `proposals`; `None` is no limit."""

    started: float
    seconds: float | int | None
    proposals: int | None

    @property
    def until(self) -> float:
        """What `time.monotonic` shows when the time is up."""
        return math.inf if self.seconds is None else self.started + self.seconds

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return max(0.0, self.until - time.monotonic())

    def spent(self, proposals: int) -> str:
        """Which limit is reached, in words; empty while none is."""
        if time.monotonic() >= self.until:
            return f"the time limit of {self.seconds:g} s was reached"
        if self.proposals is not None and proposals >= self.proposals:
            return f"the budget of {self.proposals:,} proposals was spent"
        return ""


@dataclass(frozen=True)
class Found:
    """What a search ended with: candidate directions `q` (h, b), a `basis` among them (b,), lambda and the cost."""

    q: Float[Tensor, "h b"]
    basis: Int[Tensor, " k"]
    matching: float
    proposals: int
    rounds: int
    spent: str


def search(
    observed: Observed,
    budget: Budget,
    false_rejection: float,
    seed: int,
    device: str | torch.device | None,
    progress: Callable[[Progress], None] | None,
    executor: Executor | None = None,
) -> Found:
    """Sample, filter and choose, round by round, until lambda = 1 or the budget is spent (SPEAR, Algorithm 1).

    Rounds are taken in order, whoever computes them: the result does not depend on `executor`.
    """
    observed = observed.alive()
    b = observed.L.shape[1]
    q, proposals, rounds, spent = observed.L.new_zeros(0, b), 0, 0, ""
    q, basis, matching = choose(observed, q, thresholds(observed, false_rejection)[0])
    drawn = _draw(observed, false_rejection, seed, budget, device, executor)
    with closing(drawn):
        while matching < 1 and not (spent := budget.spent(proposals)):
            threshold, found = next(drawn, (0, None))
            if found is None:  # the time was up while a round was waited for
                continue
            proposals, rounds, before = proposals + found.count, rounds + 1, len(q)
            q = merge(observed, q, found.directions, threshold)
            if len(q) > before:
                q, basis, matching = choose(observed, q, threshold)
            if progress is not None:
                progress(Progress(len(basis), b, proposals, time.monotonic() - budget.started))
    return Found(q, basis, matching, proposals, rounds, spent)


def _draw(
    observed: Observed,
    false_rejection: float,
    seed: int,
    budget: Budget,
    device: str | torch.device | None,
    executor: Executor | None,
) -> Iterator[tuple[int, sampling.Proposals]]:
    """Proposals with the number of zeros asked of them: half of the rows are expected to vanish, with the usual
    scatter, as they do at initialisation; once far more proposals were drawn than that takes, as few as a trained
    network leaves."""
    m, b = observed.L.shape
    patience = PATIENCE * theory.expected_proposals(theory.half_rates(m, b))
    usual, fewest = thresholds(observed, false_rejection)
    proposals = 0
    for k, threshold in enumerate((usual, fewest)):
        options = {"threshold": threshold, "tolerance": observed.tolerance, "limit": budget.proposals}
        where = {"device": device, "until": budget.until, "executor": executor}
        with closing(sampling.search(observed.L, seed=seed + k, **options, **where)) as drawn:
            for found in drawn:
                yield threshold, found
                proposals += found.count
                if threshold > fewest and proposals > patience:
                    break


def thresholds(observed: Observed, false_rejection: float) -> tuple[int, int]:
    """How many zeros to ask of a direction: as many as at initialisation, and as few as a trained network leaves.

    A neuron that no sample activates is a zero of every direction, true or false: `observed` is to be without those.
    """
    m, b = observed.L.shape
    least = b + 2
    usual = max(least, sparsity.threshold(m, false_rejection=false_rejection))
    return usual, max(least, min(usual, 2 * b, round(FEWEST_ZEROS * m)))


def merge(
    observed: Observed, q: Float[Tensor, "h b"], new: Float[Tensor, "k b"], threshold: int
) -> Float[Tensor, "j b"]:
    """The candidates q and those of the `new` directions that are sparse enough, determined, and not there yet."""
    if not len(new):
        return q
    new = new[filtering.sparsity_filter(observed.L, new, threshold, tolerance=observed.tolerance)]
    new = new[filtering.determined(observed.L, new, tolerance=observed.tolerance)]
    both = torch.cat([q, new])
    both = both[filtering.deduplicate(both)]
    if len(both) <= CROWD * both.shape[1]:
        return both
    zeros = filtering.zero_rows(observed.L, both, tolerance=observed.tolerance).sum(1)
    return both[zeros.argsort(descending=True, stable=True)[: CROWD * both.shape[1]]]


def choose(
    observed: Observed, q: Float[Tensor, "h b"], threshold: int, *, last: int = 2
) -> tuple[Float[Tensor, "j b"], Int[Tensor, " k"], float]:
    """Candidates, the best basis among them and its lambda (0 while they do not span): both greedy stages.

    The `last` columns, one or two, are not searched but solved for, and join the candidates. The very last has the
    signs of its pre-activations to determine it, where its zeros alone may not: it need only complete the pattern.
    """
    basis = _greedy(observed, q)
    b = observed.L.shape[1]
    if b - last <= len(basis) < b:
        solved = sampling.refine(observed.L, filtering.last_columns(observed, q[basis]), tolerance=observed.tolerance)
        whole = torch.cat([q[basis], solved])
        if len(whole) == b and filtering.matching_coefficient(observed, whole) == 1:
            return whole, torch.arange(b, device=q.device), 1.0
        q = merge(observed, q, solved, threshold)
        basis = _greedy(observed, q)
    if len(basis) < b:
        return q, basis, 0.0
    basis, matching = filtering.second_stage(observed, q, basis)
    return q, basis, matching


def _greedy(observed: Observed, q: Float[Tensor, "h b"]) -> Int[Tensor, " k"]:
    zeros = filtering.zero_rows(observed.L, q, tolerance=observed.tolerance).sum(1)
    return filtering.greedy_basis(q, zeros)
