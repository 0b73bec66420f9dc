"""The search for all columns of the disaggregation matrix: SPEAR's loop of sampling, filtering and greedy choice."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing

import torch

from spear.published import kernels, sampling, theory
from spear.published.filtering import merge, thresholds
from spear.published.greedy import Candidates, choose
from spear.published.view import Observed
from spear.reconstruction import Budget, Progress

PATIENCE = 40  # times the expected number of proposals, before directions of fewer zeros are let in


def find_columns(
    observed: Observed,
    budget: Budget,
    false_rejection: float,
    seed: int,
    device: str | torch.device | None,
    progress: Callable[[Progress], None] | None,
    executor: Executor | None = None,
) -> Candidates:
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
    return Candidates(q, basis, matching, proposals, rounds, spent)


def _draw(
    observed: Observed,
    false_rejection: float,
    seed: int,
    budget: Budget,
    device: str | torch.device | None,
    executor: Executor | None,
) -> Iterator[tuple[int, kernels.Proposals]]:
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
        with closing(sampling.proposal_rounds(observed.L, seed=seed + k, **options, **where)) as drawn:
            for found in drawn:
                yield threshold, found
                proposals += found.count
                if threshold > fewest and proposals > patience:
                    break
