"""From candidate directions to the batch, against the true directions of small problems."""

import itertools
from dataclasses import replace

import pytest
import torch
from problems import make

from spear.published import filtering, greedy
from spear.published.view import Observed

SEEDS = range(4)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(q):
    return q / torch.linalg.vector_norm(q, dim=1, keepdim=True)


def textbook_zero_rows(L, q, tolerance):
    return [[abs(float(L[j] @ v)) <= tolerance * max(abs(float(r @ v)) for r in L) for j in range(len(L))] for v in q]


@pytest.mark.parametrize("seed", SEEDS)
def test_zero_rows_are_the_relu_mask(seed):
    problem = make(seed=seed)
    Z = problem.inputs @ problem.model.fc1.weight.mT + problem.model.fc1.bias
    zero = filtering.zero_rows(problem.observed.L, problem.q)
    assert torch.equal(zero, Z <= 0)
    assert zero.tolist() == textbook_zero_rows(problem.observed.L, problem.q, 1e-7)
    assert torch.equal(zero, filtering.zero_rows(problem.observed.L, -3 * problem.q))


@pytest.mark.parametrize("seed", SEEDS)
def test_sparsity_filter(seed):
    problem = make(seed=seed)
    L, q = problem.observed.L, torch.cat([problem.q, unit(normal(5, 6, seed=seed))])
    zeros = filtering.zero_rows(L, q).sum(1)
    for threshold in (0, 5, int(zeros[0]), 81):
        assert torch.equal(filtering.sparsity_filter(L, q, threshold), zeros >= threshold)
    assert filtering.sparsity_filter(L, q, 15).tolist() == [True] * 6 + [False] * 5


@pytest.mark.parametrize("seed", SEEDS)
def test_deduplicate_keeps_the_first_up_to_sign(seed):
    q = unit(normal(5, 6, seed=seed))
    repeated = torch.cat([q, -q, q[[3, 1]], q + 1e-9])
    assert filtering.deduplicate(repeated).tolist() == [0, 1, 2, 3, 4]
    assert filtering.deduplicate(q[:0]).tolist() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_true_columns_are_determined_and_mixtures_are_not(seed):
    problem = make(5, 120, 40, seed=seed)
    L, q = problem.observed.L, problem.q
    assert filtering.determined(L, q).all()
    mixtures = []
    for i, j in itertools.combinations(range(5), 2):  # vanishes where both do, and on one row more
        g, h = L @ q[i], L @ q[j]
        row = int(((g.abs() > 1e-3) & (h.abs() > 1e-3)).nonzero()[0])
        mixtures.append(h[row] * q[i] - g[row] * q[j])
    mixtures = unit(torch.stack(mixtures))
    assert (filtering.zero_rows(L, mixtures).sum(1) > 5).all()
    assert not filtering.determined(L, mixtures).any()


def textbook_determined(L, v, tolerance=1e-7):
    A = L[filtering.zero_rows(L, v[None], tolerance=tolerance)[0]]
    b = L.shape[1]
    rank = torch.linalg.matrix_rank
    return int(rank(A)) == b - 1 and all(int(rank(torch.cat([A[:i], A[i + 1 :]]))) == b - 1 for i in range(len(A)))


@pytest.mark.parametrize("seed", SEEDS)
def test_determined_is_the_textbook_rank_test(seed):
    problem = make(6, 40, 30, seed=seed)
    L = problem.observed.L
    blocks = torch.stack([L[torch.randperm(40, generator=torch.Generator().manual_seed(k))[:5]] for k in range(20)])
    kernels = torch.linalg.svd(blocks)[2][:, -1]
    q = torch.cat([problem.q, kernels, unit(normal(3, 6, seed=seed))])
    assert filtering.determined(L, q).tolist() == [textbook_determined(L, v) for v in q]


@pytest.mark.parametrize("at_once", [1, 700, 2**20])
@pytest.mark.parametrize("seed", SEEDS)
def test_each_direction_is_determined_by_itself(at_once, seed, monkeypatch):
    monkeypatch.setattr(filtering, "AT_ONCE", at_once)
    problem = make(6, 40, 30, seed=seed)
    L, q = problem.observed.L, torch.cat([problem.q, problem.q[:3] + problem.q[3:], normal(3, 6, seed=seed)])
    alone = [bool(filtering.determined(L, one[None])) for one in q]
    assert any(alone)
    assert not all(alone)
    assert filtering.determined(L, q).tolist() == alone
    assert filtering.determined(L, q.flip(0)).tolist() == alone[::-1]
    assert filtering.determined(L, q[:0]).shape == (0,)


@pytest.mark.parametrize("tolerance", [1e-3, 0.03, 0.1])
@pytest.mark.parametrize("seed", SEEDS)
def test_under_noise_determined_is_the_test_of_eigenvalues(tolerance, seed):
    problem = make(6, 80, 40, seed=seed)
    L = problem.observed.L + tolerance / 30 * normal(80, 6, seed=seed) / 80**0.5
    near = unit(torch.cat([problem.q, problem.q[:5] + problem.q[1:], normal(20, 6, seed=seed + 9)]))
    expected = []
    for direction in near:
        A = L[filtering.zero_rows(L, direction[None], tolerance=tolerance)[0]]
        values, vectors = torch.linalg.eigh(A.mT @ A)
        carried = (A @ vectors[:, 1:] / values[1:].clamp_min(1e-300).sqrt()).square().sum(1)
        firm = values[1] > max(1e-9, (3 * tolerance) ** 2) * values[-1]
        expected.append(bool(firm and (carried <= filtering.FULL_LEVERAGE).all()))
    assert all(expected[:6])
    assert not all(expected)
    assert filtering.determined(L, near, tolerance=tolerance).tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_basis(seed):
    q = unit(normal(4, 4, seed=seed))
    candidates = torch.stack([q[0], q[1], unit((q[0] + q[1])[None])[0], q[2], q[3]])
    zeros = torch.tensor([9, 8, 7, 3, 5])
    assert greedy.greedy_basis(candidates, zeros).tolist() == [0, 1, 4, 3]
    assert greedy.greedy_basis(candidates[:3], zeros[:3]).tolist() == [0, 1]
    assert greedy.greedy_basis(candidates[:0], zeros[:0]).tolist() == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("seed", SEEDS)
def test_scales_and_inputs(bias, reduction, seed):
    problem = make(seed=seed, bias=bias, reduction=reduction)
    signs = torch.sign(normal(6, 1, seed=seed)) * (1 + torch.arange(6.0, dtype=torch.float64))[:, None]
    G, X = greedy.disaggregate(problem.observed, problem.q * signs)
    truth = problem.inputs.mT if bias else (problem.inputs / problem.inputs.norm(dim=1, keepdim=True)).mT
    torch.testing.assert_close(X, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(G @ X.mT, problem.update.gradients["fc1.weight"], rtol=0, atol=1e-13)
    if bias:
        torch.testing.assert_close(G.sum(1), problem.update.gradients["fc1.bias"], rtol=0, atol=1e-13)


def textbook_matching(observed, q):
    G, _ = greedy.disaggregate(observed, q)
    Z = observed.B @ torch.linalg.inv(q) / greedy.recover_scales(observed, q)
    same = [
        [(float(Z[j, i]) > 0) == (abs(float(G[j, i])) > 1e-7 * float(G[:, i].abs().max())) for i in range(len(q))]
        for j in range(len(G))
    ]
    return sum(map(sum, same)) / G.numel()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_matching_coefficient(bias, seed):
    problem = make(seed=seed, bias=bias)
    observed, q = problem.observed, problem.q
    assert float(greedy.matching_coefficient(observed, q)) == 1
    wrong = q.clone()
    wrong[2] = unit(normal(1, 6, seed=seed))[0]
    singular = q[[0, 0, 1, 2, 3, 4]]
    batch = torch.stack([q, wrong, q.flip(0), -q])
    values = greedy.matching_coefficient(observed, batch)
    assert values[[0, 2, 3]].tolist() == [1, 1, 1]
    assert float(values[1]) < 1
    for alternative, value in zip(batch, values, strict=True):
        assert float(value) == pytest.approx(textbook_matching(observed, alternative))
        assert float(value) == float(greedy.matching_coefficient(observed, alternative))
    assert float(greedy.matching_coefficient(observed, singular)) < 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_second_stage_swaps_false_directions_out(bias, seed):
    problem = make(seed=seed, bias=bias)
    candidates = torch.cat([problem.q, unit(normal(4, 6, seed=seed))])
    basis, value = greedy.second_stage(problem.observed, candidates, torch.tensor([6, 1, 2, 7, 4, 5]))
    assert value == 1
    assert sorted(basis.tolist()) == list(range(6))


def test_second_stage_ends_without_candidates():
    problem = make()
    wrong = problem.q.clone()
    wrong[0] = unit(normal(1, 6))[0]
    basis, value = greedy.second_stage(problem.observed, wrong, torch.arange(6))
    assert basis.tolist() == list(range(6))
    assert value == float(greedy.matching_coefficient(problem.observed, wrong)) < 1


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("b", [2, 3, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_columns_need_no_sampling(missing, b, bias, seed):
    problem = make(b, 80, 40, seed=seed, bias=bias)
    found = greedy.last_columns(problem.observed, problem.q[missing:])
    assert ((found @ problem.q[:missing].mT).abs().amax(0) > 1 - 1e-9).all()


def test_the_last_columns_of_another_layers_weights_are_not_found():
    problem = make(7)
    other = replace(problem.observed, B=normal(*problem.observed.B.shape))
    assert isinstance(other, Observed)
    assert len(greedy.last_columns(other, problem.q[2:])) == 0
