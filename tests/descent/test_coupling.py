"""What ties q to v: M = Q Q^T, and what the signs of known columns tell about their v."""

import math

import pytest
import torch
from problems import make

from spear.descent import coupling
from spear.descent.coupling import Coupling, Prior, duals, marchenko_pastur
from spear.directions import complement, unit_rows

SEEDS = range(5)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def partners(problem):
    """The true v of every sample, of length 1, with the signs of its pre-activations."""
    v = unit_rows(torch.linalg.inv(problem.q).mT)
    return torch.where((v @ problem.observed.d < 0)[:, None], -v, v)


@pytest.mark.parametrize("seed", SEEDS)
def test_m_maps_every_v_to_its_q_whatever_their_lengths(seed):
    q = unit_rows(normal(9, 9, seed=seed)) * torch.logspace(-2, 2, 9, dtype=torch.float64)[:, None]
    v = torch.linalg.inv(q).mT
    for weight in (torch.ones(9, dtype=torch.float64), normal(9, seed=seed + 1).abs() + 0.1):
        M = q.mT @ (weight[:, None] * q)
        torch.testing.assert_close(v @ M, weight[:, None] * q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.9, 1.0])
def test_the_law_is_that_of_random_columns(ratio):
    m = 1200
    b = round(ratio * m)
    G = normal(m, b)
    seen = torch.linalg.eigvalsh(G.mT @ G / m).flip(0)
    law = marchenko_pastur(b, ratio)
    assert law.shape == (b,)
    assert (law.diff() <= 0).all()
    assert (law > 0).all()
    assert float(law.mean()) == pytest.approx(1)
    assert float((law - seen / seen.mean()).abs().mean()) < 0.02


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.1])
def test_a_ratio_without_a_law_is_refused(ratio):
    with pytest.raises(ValueError, match=f"ratio {ratio:g} is not in"):
        marchenko_pastur(5, ratio)


@pytest.mark.parametrize(
    ("k", "ridge", "parting"), [(0.0, 0.0, 0.0), (0.5, 0.0, 0.0), (2.0, 0.1, 0.0), (0.3, 0.2, 0.7)]
)
@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_linear_step_solves_the_least_squares_problem(k, ridge, parting, known, seed):
    """Against the minimiser of the five squares, stacked."""
    m, b = 50, 8
    L, B = torch.linalg.qr(normal(m, b, seed=seed))[0], normal(m, b, seed=seed + 10)
    q = unit_rows(normal(known, b, seed=seed + 20))
    free, root = complement(q), torch.linalg.cholesky(torch.cov(normal(b, 20, seed=seed + 30))).mT
    away = torch.linalg.qr(normal(b, b, seed=seed + 40))[0][:known]
    moment, r = root.mT @ root, b - known
    basis, triangle = torch.linalg.qr(B @ free)
    t = float((B @ free).norm() / (root @ free).norm())
    rg, rz = normal(m, seed=seed + 50), normal(m, seed=seed + 60)
    empty = torch.zeros
    rows = torch.cat(
        [
            torch.cat([L, empty(m, r)], 1),
            torch.cat([empty(m, b), B @ free], 1),
            math.sqrt(k) * torch.cat([torch.linalg.inv(root).mT, -t * root @ free], 1),
            math.sqrt(ridge) * t * torch.cat([empty(b, b), root @ free], 1),
            math.sqrt(parting) * torch.cat([away, empty(known, r)], 1),
        ]
    )
    right = torch.cat([rg, rz, torch.zeros(len(rows) - 2 * m, dtype=torch.float64)])
    own, w = torch.linalg.lstsq(rows, right).solution.split([b, r])
    step = Coupling(free, moment, away.mT @ away).step(triangle, k, ridge, parting)
    got = torch.cat([rg @ L, rz @ basis]) @ step
    torch.testing.assert_close(got, torch.cat([own, triangle @ w]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_prior_is_exact_when_every_column_is_known_and_fresh_when_none_is(seed):
    problem = make(8, 90, 40, seed=seed)
    given = Prior(problem.observed)
    fresh, full = given(problem.q[:0]), given(problem.q)
    torch.testing.assert_close(full.moment, problem.q.mT @ problem.q)
    torch.testing.assert_close(torch.linalg.eigvalsh(fresh.moment).flip(0), marchenko_pastur(8, 8 / 90))
    assert full.free.shape == (8, 0)
    assert fresh.free.shape == (8, 8)
    assert not fresh.away.any()


@pytest.mark.parametrize("known", [1, 4, 9])
@pytest.mark.parametrize("seed", SEEDS)
def test_signs_tell_the_v_of_known_columns(known, seed):
    """The v found are duals of the known q, and nearer to the true v than q itself; nothing but q is given."""
    problem = make(12, 150, 60, seed=seed)
    fresh = Prior(problem.observed)(problem.q[:0]).moment
    v, doubt = duals(problem.observed, problem.q[:known], fresh)
    near = (v * partners(problem)[:known]).sum(1).abs()
    assert (near > 0.9).all()
    assert (near > (problem.q * partners(problem)).sum(1).abs()[:known]).double().mean() > 0.7
    assert ((doubt > 0) & (doubt < 0.3)).all()
    cross = v @ problem.q[:known].mT
    assert float((cross - cross.diagonal().diag()).abs().max()) < 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_the_signs_and_the_order_of_known_columns_do_not_matter(seed):
    problem = make(10, 120, 50, seed=seed)
    given, known = Prior(problem.observed), problem.q[:5]
    turned = known[torch.tensor([3, 1, 4, 0, 2])] * torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])[:, None]
    one, other = given(known), given(turned)
    torch.testing.assert_close(one.away, other.away, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.moment, other.moment)
    torch.testing.assert_close(one.free @ one.free.mT, other.free @ other.free.mT)


def test_columns_whose_signs_fit_no_v_are_left_out():
    """Directions that are no columns of Q: their masks belong to no sample."""
    problem = make(10, 120, 50)
    fresh = Prior(problem.observed)(problem.q[:0]).moment
    v, doubt = duals(problem.observed, unit_rows(normal(4, 10)), fresh)
    assert not v.any()
    assert torch.isinf(doubt).all()
    assert not Prior(problem.observed)(unit_rows(normal(4, 10))).away.any()


def test_far_out_signs_leave_numbers():
    """An offset that contradicts the signs by far: the answer stays finite or is left out, never NaN in the step."""
    problem = make(10, 120, 50)
    mixed = unit_rows(problem.q[:5] + 1e-7 * problem.q[5:])
    given = Prior(problem.observed)(mixed)
    assert given.away.isfinite().all()
    step = given.step(torch.linalg.qr(problem.observed.B @ given.free)[1], 0.5, 0.1, 0.1)
    assert step.isfinite().all()
    assert coupling.AGREED > 0.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("left", [2, 8])
def test_known_columns_hold_no_other_away_where_few_are_left(left, seed):
    """Uncoupled, what errors of the known v add up to against the true columns stays below what the others pay."""
    problem = make(40, 400, 120, seed=seed)
    known, others = problem.q[left:], problem.q[:left]
    free = Prior(problem.observed).uncoupled(known)
    torch.testing.assert_close(free.moment, torch.eye(40, dtype=torch.float64))
    assert float((known @ free.free).abs().max()) < 1e-9
    costs = ((others @ free.away) * others).sum(1), ((known @ free.away) * known).sum(1)
    assert float(costs[0].max()) < 0.1 * float(costs[1].min())
    coupled = Prior(problem.observed)(known).away
    torch.testing.assert_close(free.away, coupled * left / len(known))


def test_nothing_known_holds_nothing_away():
    free = Prior(make(12, 100, 60).observed).uncoupled(normal(0, 12))
    assert not free.away.any()
    torch.testing.assert_close(free.free, torch.eye(12, dtype=torch.float64))
