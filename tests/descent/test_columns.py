"""The loop over columns that the descents share: starts, polish, mixtures."""

import itertools
import math

import pytest
import torch
from problems import make

from spear.descent import columns
from spear.descent.columns import Lengths
from spear.directions import complement, unit_rows
from spear.published import filtering, greedy
from spear.reconstruction import Terms

SEEDS = range(5)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("known", [0, 1, 5, 6])
def test_complement(known):
    q = unit_rows(normal(known, 6))
    free = complement(q)
    assert free.shape == (6, 6 - known)
    torch.testing.assert_close(free.mT @ free, torch.eye(6 - known, dtype=torch.float64))
    assert float((q @ free).abs().sum()) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_starts_lie_in_the_free_space_with_the_sign_of_v(seed):
    problem = make(8, 60, 40, seed=seed)
    free = complement(problem.q[:3])
    generator = torch.Generator().manual_seed(seed)
    q = columns.draw(problem.observed, free, 50, generator)
    torch.testing.assert_close(q.norm(dim=1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(q @ free @ free.mT, q)
    assert (q @ problem.observed.d >= 0).all()
    V = torch.linalg.inv(problem.q)
    scale = greedy.recover_scales(problem.observed, problem.q)
    torch.testing.assert_close((V / scale).mT @ problem.observed.d, torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("seed", SEEDS)
def test_polish_brings_near_directions_to_machine_precision(seed):
    problem = make(8, 120, 40, seed=seed)
    near = unit_rows(problem.q + 0.02 * normal(8, 8, seed=seed))
    q, exact = columns.polish(problem.observed.L, near)
    assert exact.all()
    assert ((q * problem.q).sum(1).abs() > 1 - 1e-14).all()
    alone = [columns.polish(problem.observed.L, each[None])[0][0] for each in near]
    torch.testing.assert_close(torch.stack(alone), q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("thin", [1e-2, 1e-4, 2e-6, 1e-6, 6e-7])
def test_polish_is_exact_where_the_trusted_rows_nearly_leave_a_plane(seed, thin):
    """Two samples share most zeros: the rows that vanish first hardly tell one column from a mixture of both."""
    L = torch.cat([normal(120, 6, seed=seed), normal(80, 6, seed=seed + 100)])
    L[:120, 0] = 0
    L[:100, 1] *= thin
    L = torch.linalg.qr(L)[0]
    column = torch.linalg.svd(L[:120])[2][-1]
    other = torch.linalg.svd(L[:100])[2][-2]
    q, exact = columns.polish(L, unit_rows(column + 1e-4 * other)[None])
    r = (L @ q[0]).abs()
    assert exact.all()
    assert float(r[:120].max() / r.max()) < 1e-10


@pytest.mark.parametrize("seed", SEEDS)
def test_smallest_rows_are_the_textbook_kernel(seed):
    """Against the last right singular vector of the rows of the smallest entries."""
    problem = make(7, 90, 40, seed=seed)
    L, near = problem.observed.L, unit_rows(problem.q + 1e-3 * normal(7, 7, seed=seed))
    count = torch.tensor([20, 22, 24, 26, 28, 30, 32])
    q, residual = columns.smallest_rows(L, near, count)
    for direction, start, number, left in zip(q, near, count.tolist(), residual, strict=True):
        rows = L[(L @ start).abs().argsort()[:number]]
        kernel = torch.linalg.svd(rows)[2][-1]
        assert abs(float(direction @ kernel)) > 1 - 1e-12
        assert float(left) == pytest.approx(float((rows @ kernel).abs().max() / (L @ kernel).abs().max()), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_directions_are_not_exact(seed):
    problem = make(8, 60, 40, seed=seed)
    _, exact = columns.polish(problem.observed.L, unit_rows(normal(20, 8, seed=seed)) * 1.0)
    q, whole = columns.polish(problem.observed.L, unit_rows(normal(20, 8, seed=seed)))
    assert torch.equal(exact, whole)
    true = ((q @ problem.q.mT).abs() > 1 - 1e-9).any(1)
    sparse = filtering.sparsity_filter(problem.observed.L, q, 11, tolerance=problem.observed.tolerance)
    sure = sparse & filtering.determined(problem.observed.L, q, tolerance=problem.observed.tolerance)
    assert torch.equal(sure & whole, true & whole)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mixture_is_separated_into_its_two_columns(seed):
    """A combination of two columns that vanishes on one row more than they share."""
    problem = make(6, 100, 40, seed=seed)
    observed = problem.observed
    G = observed.L @ problem.q.mT
    both = ((G[:, 0].abs() > 1e-9) & (G[:, 1].abs() > 1e-9)).nonzero()[0, 0]
    mixture = unit_rows(G[both, 1] * problem.q[0] - G[both, 0] * problem.q[1])[None]
    shared = int(filtering.zero_rows(observed.L, mixture, tolerance=observed.tolerance).sum())
    assert not filtering.determined(observed.L, mixture, tolerance=observed.tolerance).any()
    parts = columns.separate(observed, mixture, shared)
    met = (parts @ problem.q.mT).abs() > 1 - 1e-9
    assert met.any(0).tolist() == [True, True, False, False, False, False]
    assert met.any(1).all()


def test_a_column_is_not_separated():
    problem = make(6, 100, 40)
    assert len(columns.separate(problem.observed, problem.q, 10)) == 0


def test_groups():
    q = unit_rows(normal(4, 9))
    alike = torch.cat([q, -q, unit_rows(q + 1e-3)])
    first, group = columns.groups(alike)
    assert torch.equal(first, q)
    assert group.tolist() == [0, 1, 2, 3] * 3


def test_lengths_go_up_where_few_starts_succeed_and_down_where_nearly_all_do():
    lengths = Lengths(shortest=80, longest=2160)
    assert lengths.next(80, 0.0) == 240
    assert lengths.next(720, 0.2) == lengths.next(2160, 0.0) == 2160
    assert lengths.next(240, 0.5) == 240
    assert lengths.next(240, 1.0) == lengths.next(80, 1.0) == 80


def test_settle_counts_the_starts_that_led_to_a_column():
    problem = make(8, 120, 40)
    ends = torch.cat([problem.q[[0, 0, 1]], unit_rows(normal(1, 8))])
    q, hits = columns.settle(problem.observed, ends, 20)
    assert hits in (3, 4)
    assert ((q @ problem.q.mT).abs() > 1 - 1e-12).any(0)[:2].all()


def test_a_search_that_failed_once_is_not_given_up_for_one_that_never_found_anything():
    """The first search brings a column a round, but nothing in its third; the other brings nothing at all."""
    problem, calls = make(10, 120, 60), {"brings": 0, "barren": 0}

    def brings(known, count, steps, generator):
        calls["brings"] += 1
        return problem.q[[0 if calls["brings"] == 3 else len(known)] * count]

    def barren(known, count, steps, generator):
        calls["barren"] += 1
        return unit_rows(torch.randn(count, 10, generator=generator, dtype=torch.float64))

    lengths = Lengths(shortest=10, longest=10)
    found = columns.collect(problem.observed, (barren, brings), lengths, Terms())
    assert found.matching == 1, found.spent
    assert calls["brings"] > calls["barren"] > 0


def test_a_search_that_brings_nothing_waits_as_long_after_each_try():
    """One search brings a column a round; ten times less is hoped of the other: it waits until 1.2^rounds is ten."""
    problem, rounds = make(40, 300, 80), []

    def brings(known, count, steps, generator):
        rounds.append("brings")
        return problem.q[[len(known)] * count]

    def barren(known, count, steps, generator):
        rounds.append("barren")
        return known[:0]

    lengths = Lengths(shortest=10, longest=10, starts=16)
    found = columns.collect(problem.observed, (brings, barren), lengths, Terms())
    assert found.matching == 1, found.spent
    assert found.proposals == 16 * len(rounds)
    tries = [k for k, name in enumerate(rounds) if name == "barren"]
    waits = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert len(tries) >= 3
    assert min(waits) > math.log(5, columns.CURIOSITY)


def test_collecting_stops_where_no_search_brings_anything():
    problem, lengths = make(10, 120, 60), Lengths(10, 10, idle=7)

    def barren(known, count, steps, generator):
        return unit_rows(torch.randn(count, 10, generator=generator, dtype=torch.float64))

    found = columns.collect(problem.observed, (barren,), lengths, Terms())
    assert (found.matching, found.rounds) == (0, lengths.idle)
    assert f"{lengths.idle} rounds of 10 steps found no further column" in found.spent
