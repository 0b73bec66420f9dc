"""Unit vectors, complements, copies and zeros, each against a slow textbook version."""

import pytest
import torch

from spear.directions import (
    apart,
    away_from,
    complement,
    distinct,
    first_of_each,
    least_squares,
    times,
    unit_rows,
    zero_entries,
)

SEEDS = range(4)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def crowd(seed, count=40):
    """Unit vectors in a plane: many are near each other, some are opposite."""
    return unit_rows(normal(count, 2, seed=seed))


def textbook(x, cosine, known, order, signed):
    """One after the other, each held against those kept so far."""
    kept = []
    for k in sorted(range(len(x)), key=lambda k: order[k]):
        near = [float(x[k] @ y) for y in [*known, *x[kept]]]
        if all((c if signed else abs(c)) <= cosine for c in near):
            kept.append(k)
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype_of_basis", [torch.bfloat16, torch.float32])
def test_products_are_those_of_any_number_of_rows(rows, dtype, dtype_of_basis):
    x, basis = normal(rows, 30).to(dtype), normal(30, 7, seed=1).to(dtype_of_basis)
    got = times(x, basis)
    assert got.dtype == dtype
    assert got.shape == (rows, 7)
    expected = x.to(dtype_of_basis).double() @ basis.double()  # of the rounded numbers, exactly
    size = x.double().norm(dim=1, keepdim=True) * basis.double().norm(dim=0)
    unit = max(torch.finfo(t).eps for t in (dtype, dtype_of_basis))
    assert bool(((got.double() - expected).abs() <= unit * size).all())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unit_rows(seed, dtype):
    x = (normal(3, 5, 7, seed=seed) * 10.0 ** torch.arange(-8, -1)[:, None, None][:3]).to(dtype)
    x[0, 0] = 0
    unit = unit_rows(x)
    assert float(unit[0, 0].abs().max()) == 0
    expected = torch.stack([row / row.norm() for row in x.flatten(0, 1)[1:]])
    torch.testing.assert_close(unit.flatten(0, 1)[1:], expected)


@pytest.mark.parametrize("known", [0, 1, 5, 6])
def test_complement_and_what_is_away_from_the_known(known):
    x, others = normal(known, 6), normal(4, 6, seed=1)
    free = complement(x)
    assert free.shape == (6, 6 - known)
    torch.testing.assert_close(free.mT @ free, torch.eye(6 - known, dtype=torch.float64))
    assert float((x @ free).abs().sum()) < 1e-12
    torch.testing.assert_close(away_from(x, others), others @ free @ free.mT, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("cosine", [0.5, 0.97, 0.9999])
@pytest.mark.parametrize("known", [0, 3])
def test_distinct_equals_one_after_the_other(seed, signed, cosine, known):
    x, before, order = crowd(seed), crowd(seed + 10, known), normal(40, seed=seed + 20)
    index = distinct(x, cosine, known=before, order=order, signed=signed)
    assert index.tolist() == textbook(x, cosine, before, order.tolist(), signed)
    as_they_come = distinct(x, cosine, known=before, signed=signed)
    assert as_they_come.tolist() == textbook(x, cosine, before, range(40), signed)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_dropped_is_near_something_kept(seed):
    x = crowd(seed)
    kept = x[distinct(x, 0.99)]
    assert float((x @ kept.mT).abs().amax(1).min()) > 0.99
    assert float((kept @ kept.mT).abs().fill_diagonal_(0).max()) <= 0.99


def test_none_and_signs():
    x = unit_rows(normal(5, 9))
    both = torch.cat([x, -x, x])
    assert distinct(both, 0.999).tolist() == [0, 1, 2, 3, 4]
    assert distinct(both, 0.999, signed=True).tolist() == [*range(10)]
    assert distinct(x[:0], 0.999, known=x).tolist() == []
    assert distinct(both, 0.999, known=x).tolist() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_first_of_each(seed):
    code = torch.randint(6, (30,), generator=torch.Generator().manual_seed(seed))
    values = code.tolist()
    assert first_of_each(code).tolist() == [k for k, v in enumerate(values) if v not in values[:k]]
    assert first_of_each(code[:0]).tolist() == []


@pytest.mark.parametrize("least", [0.1, 0.5, 2.0])
def test_points_apart_from_known_and_earlier_ones(least):
    known, x = normal(4, 3), normal(12, 3, seed=1)
    everything = torch.cat([known, x])
    for k, far in enumerate(apart(x, known, least).tolist()):
        before = everything[: 4 + k]
        assert far == bool(((x[k] - before).norm(dim=1) >= least * before.norm(dim=1)).all())


@pytest.mark.parametrize("dim", [0, 1])
def test_zero_entries_are_relative_to_the_largest(dim):
    x = torch.tensor([[1.0, 1e-3, 0.0], [1e-3, 1e-3, 0.0], [-2e-3, 0.0, 0.0]], dtype=torch.float64)
    vectors = x if dim == 1 else x.mT
    assert zero_entries(vectors, 1e-3, dim=dim)[0, 1 if dim == 1 else 0] == (dim == 1)
    for tolerance in (0.0, 1e-3, 0.6):
        zero = zero_entries(x, tolerance)
        expected = [[abs(v) <= tolerance * max(abs(w) for w in row) for v in row] for row in x.tolist()]
        assert zero.tolist() == expected
        assert torch.equal(zero_entries(x.mT, tolerance, dim=0), zero.mT)


@pytest.mark.parametrize("seed", SEEDS)
def test_least_squares_leaves_a_rest_that_is_orthogonal(seed):
    A, B = normal(12, 5, seed=seed), normal(12, 3, seed=seed + 10)
    rest = B - A @ least_squares(A, B)
    torch.testing.assert_close(A.T @ rest, torch.zeros(5, 3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("column", range(3))
def test_least_squares_of_what_nothing_tells_is_none(column):
    A = normal(6, 3)
    A[:, column] = 0
    assert bool(least_squares(A, normal(6, 2)).isnan().all())


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_least_squares_of_what_is_no_number_is_none(side, odd):
    both = [normal(6, 2), normal(6, 3)]
    both[side][1, 0] = odd
    assert bool(least_squares(*both).isnan().all())
