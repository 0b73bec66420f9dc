"""Rank and factorisation of a layer's gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make

from spear.models.streaming import Blocks
from spear.published.lowrank import augment, decompose, detect_rank, range_basis, rank_under_noise


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 90), st.integers(0, 9))
def test_factorisation(rank, rows, columns, seed):
    rank = min(rank, rows, columns)
    J = normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)
    low = decompose(J, rank)
    assert low.L.shape == (rows, rank)
    assert low.R.shape == (rank, columns)
    assert torch.linalg.norm(J - low.L @ low.R) < 1e-13 * torch.linalg.norm(J)
    torch.testing.assert_close(low.L.mT @ low.L, torch.eye(rank, dtype=J.dtype), atol=1e-12, rtol=0)
    s = torch.linalg.svdvals(J)[:rank]
    torch.testing.assert_close(torch.linalg.vector_norm(low.R, dim=1), s, rtol=1e-9, atol=1e-13 * float(s[0]))


@pytest.mark.parametrize("shape", [(60, 200), (300, 700), (700, 300), (200, 200)])
@pytest.mark.parametrize("rank", [1, 7, 33, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e9])
def test_rank_is_found(shape, rank, dtype, scale):
    J = scale * normal(shape[0], rank, dtype=dtype) @ normal(rank, shape[1], seed=1, dtype=dtype)
    low = decompose(J.double() if dtype == torch.float32 else J)
    assert low.rank == rank
    assert low.gap > 1e3
    assert low.noise < 1e-4 * low.smallest


@pytest.mark.parametrize("b", [1, 2, 9, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_rank_is_the_batch_size(b, dtype, seed):
    problem = make(b, 90, 40, dtype=dtype, seed=seed)
    assert problem.target.low.rank == b


def test_the_sketch_spans_what_the_whole_does():
    J = normal(400, 100) @ normal(100, 900, seed=2)
    small, whole = range_basis(Blocks(J, None, J), size=16), torch.linalg.qr(J)[0]
    assert small.shape[1] < 400
    assert torch.linalg.norm(J - small @ (small.mT @ J)) < 1e-12 * torch.linalg.norm(J)
    assert torch.linalg.norm(J - whole @ (whole.mT @ J)) < 1e-12 * torch.linalg.norm(J)


def test_exact_zeros_of_dead_neurons_fake_no_gap():
    s = torch.tensor([1.0, 0.5, 0.3, 1e-16, 3e-17, 0.0, 0.0], dtype=torch.float64)
    assert detect_rank(s)[0] == 3


@pytest.mark.parametrize("seed", range(3))
def test_no_gap_is_no_rank(seed):
    low = decompose(normal(40, 90, seed=seed))
    assert (low.rank, low.gap) == (40, 1.0)


@pytest.mark.parametrize("shape", [(100, 300), (400, 400)])
@pytest.mark.parametrize("rank", [3, 10])
@pytest.mark.parametrize("known", [True, False])
def test_rank_under_noise(shape, rank, known):
    for seed in range(3):
        J = normal(shape[0], rank, seed=seed) @ normal(rank, shape[1], seed=seed + 10)
        sigma = 0.1
        s = torch.linalg.svdvals(J + sigma * normal(*shape, seed=seed + 20))
        assert rank_under_noise(s, shape, sigma if known else None) == rank


@pytest.mark.parametrize("sigma", [None, 1.0])
def test_pure_noise_has_no_rank(sigma):
    assert rank_under_noise(torch.linalg.svdvals(normal(150, 600)), (150, 600), sigma) <= 1


def test_augment():
    W, beta = normal(3, 4), normal(3)
    assert torch.equal(augment(W, beta), torch.cat([W, beta.reshape(3, 1)], 1))


def test_bad_input():
    with pytest.raises(ValueError, match="rank 0: it is zero everywhere"):
        decompose(torch.zeros(4, 5, dtype=torch.float64))
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and 4"):
            decompose(normal(4, 9), rank)


def test_noise_and_gap_of_a_full_given_rank():
    low = decompose(normal(4, 9), 4)
    assert low.gap == math.inf
    assert low.noise == 0
