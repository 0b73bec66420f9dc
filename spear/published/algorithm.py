"""The search for all columns of the disaggregation matrix: SPEAR's loop of sampling, filtering and greedy choice."""

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

import torch

from spear.published import kernels, sampling, theory
from spear.published.filtering import merge, thresholds
from spear.published.greedy import Candidates, choose
from spear.published.view import Observed
from spear.reconstruction import Terms

PATIENCE = 40  # times the expected number of proposals, before directions of fewer zeros are let in


@dataclass(frozen=True)
class Sampling:
    """SPEAR as published. `false_rejection` is the chance at which the sparsity filter may reject a true direction.

    `executor` computes the rounds, which otherwise run in threads: with one of a cluster, for example
    `distributed.Client(ADDRESS).get_executor()`, many machines share one large batch, and the result is the same.
    """

    name: ClassVar[str] = "sampling"
    stands_noise: ClassVar[bool] = False
    false_rejection: float = 1e-9
    executor: Executor | None = None

    def search(self, observed: Observed, terms: Terms, device: str | torch.device | None = None) -> Candidates:
        """All columns of Q (`find_columns`); kernels are computed on `device`."""
        return find_columns(observed, terms, self, device)


def find_columns(
    observed: Observed, terms: Terms, options: Sampling = Sampling(), device: str | torch.device | None = None
) -> Candidates:
    """Sample, filter and choose, round by round, until lambda = 1 or the budget is spent (SPEAR, Algorithm 1).

    Rounds are taken in order, whoever computes them: the result does not depend on the executor.
    """
    observed = observed.alive()
    b, budget, false_rejection = observed.L.shape[1], terms.budget, options.false_rejection
    q, proposals, rounds, spent = observed.L.new_zeros(0, b), 0, 0, ""
    q, basis, matching = choose(observed, q, thresholds(observed, false_rejection)[0])
    drawn = _draw(observed, options, terms, device)
    with closing(drawn):
        while matching < 1 and not (spent := budget.spent(proposals)):
            threshold, found = next(drawn, (0, None))
            if found is None:  # the time was up while a round was waited for
                continue
            proposals, rounds, before = proposals + found.count, rounds + 1, len(q)
            q = merge(observed, q, found.directions, threshold)
            if len(q) > before:
                q, basis, matching = choose(observed, q, threshold)
            terms.report(options.name, len(basis), b, proposals)
    return Candidates(q, basis, matching, proposals, rounds, spent)


def _draw(
    observed: Observed, options: Sampling, terms: Terms, device: str | torch.device | None
) -> Iterator[tuple[int, kernels.Proposals]]:
    """Proposals with the number of zeros asked of them: half of the rows are expected to vanish, with the usual
    scatter, as they do at initialisation; once far more proposals were drawn than that takes, as few as a trained
    network leaves."""
    m, b = observed.L.shape
    patience = PATIENCE * theory.expected_proposals(theory.half_rates(m, b))
    usual, fewest = thresholds(observed, options.false_rejection)
    proposals, budget = 0, terms.budget
    for k, threshold in enumerate((usual, fewest)):
        asked = {"threshold": threshold, "limit": budget.proposals}
        where = {"device": device, "until": budget.until, "executor": options.executor}
        with closing(sampling.proposal_rounds(observed, seed=terms.seed + k, **asked, **where)) as drawn:
            for found in drawn:
                yield threshold, found
                proposals += found.count
                if threshold > fewest and proposals > patience:
                    break
