"""From near a column to the column, by L q and the signs of z."""

import pytest
import torch
from problems import make

from spear.descent.sharpening import ARRIVED, KRYLOV, columns_near, lowest, sharpen
from spear.directions import unit_rows


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(problem, error, seed):
    """Directions and pre-activations with errors of that relative size, in single precision."""
    V = torch.linalg.inv(problem.q)
    z = problem.observed.B @ (V * torch.sign(problem.observed.d @ V))
    z = (z / z.square().mean(0).sqrt()).mT
    z = z + error * normal(*z.shape, seed=seed)
    q = unit_rows(problem.q + error * unit_rows(normal(*problem.q.shape, seed=seed + 1)))
    return problem.observed.L.float(), q.float(), z.float()


@pytest.mark.parametrize(("b", "m"), [(4, 80), (20, 150), (60, 200)])
@pytest.mark.parametrize("error", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_directions_near_a_column_come_to_it(b, m, error, seed):
    problem = make(b, m, 120, seed=seed)
    L, q, z = near(problem, error, seed)
    sharp, left = sharpen(L, q, z)
    cosine = (sharp.double() * problem.q).sum(1).abs()
    assert ((cosine > 1 - 1e-4) & (left < ARRIVED)).double().mean() > 0.9
    assert bool((cosine[left < ARRIVED] > 1 - 1e-3).all())


@pytest.mark.parametrize("seed", range(3))
def test_each_alone_is_all_at_once_and_signs_of_q_do_not_matter(seed):
    L, q, z = near(make(12, 120, 60, seed=seed), 0.2, seed)
    together = sharpen(L, q, z)[0]
    alone = torch.cat([sharpen(L, -one, its)[0] for one, its in zip(q.split(1), z.split(1), strict=True)])
    assert float((together * alone).sum(1).abs().min()) > 1 - 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_directions_anywhere_do_not_arrive(seed):
    problem = make(60, 200, 120, seed=seed)
    L, _, z = near(problem, 0.0, seed)
    anywhere = unit_rows(normal(60, 60, seed=seed)).float()
    assert bool((sharpen(L, anywhere, z.flip(1))[1] > ARRIVED).all())
    assert not len(columns_near(L, anywhere, z.flip(1), tolerance=1e-9))


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_tried_once(seed):
    problem = make(12, 120, 60, seed=seed)
    L, q, z = near(problem, 0.1, seed)
    found = columns_near(L, torch.cat([q, -q, q]), torch.cat([z, z, z]), tolerance=1e-9).double()
    assert len(found) <= 12
    assert ((found @ problem.q.mT).abs() > 1 - 1e-4).any(0).double().mean() > 0.8


def weighted(b, m, k, seed):
    """An orthonormal L, weights in [0, 1], unit directions, and the Gram matrices that the weights make."""
    L, weight = torch.linalg.qr(normal(m, b, seed=seed))[0], torch.rand(k, m, dtype=torch.float64)
    return L, weight, unit_rows(normal(k, b, seed=seed + 1)), L.mT @ (weight[:, :, None] * L)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("b", [1, 2, KRYLOV - 1, KRYLOV])
def test_in_few_dimensions_the_lowest_vector_is_that_of_the_gram_matrix(b, seed):
    L, weight, q, gram = weighted(b, 60, 5, seed)
    expected = torch.linalg.eigh(gram)[1][:, :, 0]
    assert float((lowest(L, weight, q) * expected).sum(1).abs().min()) > 1 - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_in_many_it_is_the_best_of_its_krylov_space(seed):
    L, weight, q, gram = weighted(50, 120, 5, seed)
    for one, its, matrix in zip(lowest(L, weight, q), q, gram, strict=True):
        powers = torch.stack([torch.linalg.matrix_power(matrix, k) @ its for k in range(KRYLOV)], 1)
        basis = torch.linalg.qr(powers)[0]
        best = torch.linalg.eigvalsh(basis.mT @ matrix @ basis)[0]
        torch.testing.assert_close(one @ matrix @ one, best, rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_direction_that_is_the_lowest_stays(seed):
    L, weight, _, gram = weighted(30, 90, 5, seed)
    there = torch.linalg.eigh(gram)[1][:, :, 0]
    assert float((lowest(L, weight, there) * there).sum(1).abs().min()) > 1 - 1e-9
