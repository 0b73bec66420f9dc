"""Laws of the linear layer, of the expected work and of the failure probability."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import structural_rank

from spear.published.sparsity import threshold
from spear.published.theory import (
    expected_proposals,
    failure_approximation,
    failure_bound,
    failure_simulation,
    full_rank_probability,
    half_rates,
    independent_rates,
    linear_gradients,
    proposal_quantiles,
    single_sample,
    success_probability,
)

# reference: E = H_b / p for independent half zeros, and for exactly m / 2 zeros at m = 200, 400, 2000
EXPECTED_WORK = {
    10: (1.50e3, 1.81e3, 1.64e3, 1.53e3),
    15: (5.44e4, 8.86e4, 6.88e4, 5.69e4),
    20: (1.89e6, 4.85e6, 2.95e6, 2.06e6),
    25: (6.40e7, 3.07e8, 1.33e8, 7.36e7),
    30: (2.14e9, 2.31e10, 6.40e9, 2.64e9),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relu_gradient(m, b, seed):
    """A generic G with independent half zeros."""
    return normal(m, b, seed=seed) * (normal(m, b, seed=seed + 1000) > 0)


def harmonic(b):
    return sum(1 / k for k in range(1, b + 1))


# ------------------------------------------------------------------------------------------------- the linear layer


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("m", "n", "b"), [(5, 3, 1), (4, 6, 3), (20, 30, 7)])
def test_linear_gradients_are_autograds(m, n, b, seed):
    X, G = normal(n, b, seed=seed), normal(m, b, seed=seed + 1)
    W, beta = normal(m, n).requires_grad_(), normal(m).requires_grad_()
    Z = W @ X + beta[:, None]
    expected = torch.autograd.grad((Z * G).sum(), (W, beta))
    torch.testing.assert_close(linear_gradients(G, X), expected)


def test_linear_gradients_batched_equals_the_loop():
    G, X = normal(4, 2, 5, 3), normal(4, 2, 6, 3)
    dW, dbeta = linear_gradients(G, X)
    for i, j in itertools.product(range(4), range(2)):
        torch.testing.assert_close((dW[i, j], dbeta[i, j]), linear_gradients(G[i, j], X[i, j]))


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8))
@settings(deadline=None)
def test_one_sample_is_read_off_exactly(seed, m, n):
    X, G = normal(n, 1, seed=seed), normal(m, 1, seed=seed + 1)
    torch.testing.assert_close(single_sample(*linear_gradients(G, X)), X[:, 0], rtol=1e-13, atol=1e-13)


def test_an_input_of_zeros_is_read_off_too():
    assert torch.equal(single_sample(torch.zeros(3, 2), torch.tensor([0.0, 2.0, 0.0])), torch.zeros(2))


@pytest.mark.parametrize(
    ("b", "scale", "message"), [(1, 0.0, "no neuron of this layer was active"), (2, 1.0, "not the gradient of one")]
)
def test_one_sample_refuses(b, scale, message):
    with pytest.raises(ValueError, match=message):
        single_sample(*linear_gradients(scale * normal(6, b), normal(4, b)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("b", [1, 2, 8])
def test_any_two_factorisations_give_the_same_gradient_and_inputs(b, seed):
    m, n = 24, 16
    G, X = relu_gradient(m, b, seed), normal(n, b, seed=seed + 1)
    dW, _ = linear_gradients(G, X)
    assert torch.linalg.matrix_rank(dW) == b
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    mixing = normal(b, b, seed=seed + 2)
    for L, R in [(U[:, :b], S[:b, None] * Vh[:b]), (dW @ normal(n, b, seed=seed + 3), None), (G @ mixing, None)]:
        R = torch.linalg.lstsq(L, dW).solution if R is None else R
        Q = torch.linalg.lstsq(L, G).solution  # unique, since L has full column rank
        torch.testing.assert_close(L @ Q, G)
        torch.testing.assert_close(torch.linalg.solve(Q, R), X.T)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("b", [2, 3, 6])
def test_the_kernel_of_zero_rows_is_a_column_of_q(b, seed):
    m, n = 40, 20
    G, X = relu_gradient(m, b, seed), normal(n, b, seed=seed + 1)
    U, _, _ = torch.linalg.svd(linear_gradients(G, X)[0], full_matrices=False)
    L = U[:, :b]
    Q = L.T @ G
    for i in range(b):
        zero_rows = torch.nonzero(G[:, i] == 0)[:, 0]
        assert torch.linalg.matrix_rank(L[zero_rows]) == b - 1
        kernel = torch.linalg.svd(L[zero_rows])[2][-1]
        q = Q[:, i] / Q[:, i].norm()
        assert abs(float(kernel @ q)) == pytest.approx(1, abs=1e-12)


# ------------------------------------------------------------------------------------------------- the expected work


@given(st.integers(1, 300), st.data())
def test_success_probability_is_the_ratio_of_binomials(m, data):
    b = data.draw(st.integers(1, m))
    zeros = data.draw(st.lists(st.integers(0, m), min_size=1, max_size=5))
    expected = [math.comb(z, b - 1) / math.comb(m, b - 1) for z in zeros]
    assert success_probability(torch.tensor(zeros), m, b).tolist() == pytest.approx(expected, rel=1e-10)


def test_success_probability_batched_equals_the_loop():
    zeros = torch.randint(0, 41, (3, 5), generator=torch.Generator().manual_seed(0))
    rates = success_probability(zeros, 40, 6)
    for i in range(3):
        assert torch.equal(rates[i], success_probability(zeros[i], 40, 6))


def test_success_probability_is_the_share_of_row_sets_that_vanish():
    column = torch.tensor([0, 1, 0, 0, 1, 0, 1])
    sets = list(itertools.combinations(range(7), 3))
    share = sum(not column[list(rows)].any() for rows in sets) / len(sets)
    assert float(success_probability((column == 0).sum(), 7, 4)) == pytest.approx(share)


def test_the_far_tail_neither_overflows_nor_vanishes():
    assert float(success_probability(torch.tensor(10_000), 20_000, 300)) == pytest.approx(
        math.comb(10_000, 299) / math.comb(20_000, 299), rel=1e-9
    )


@pytest.mark.parametrize("b", EXPECTED_WORK)
def test_expected_work_of_the_reference_table(b):
    rates = [independent_rates(b), *(half_rates(m, b) for m in (200, 400, 2000))]
    assert [f"{expected_proposals(p):.2e}" for p in rates] == [f"{e:.2e}" for e in EXPECTED_WORK[b]]


@given(st.integers(1, 60), st.floats(-30, 0))
def test_equal_rates_give_the_harmonic_number(b, power):
    rates = torch.full((b,), 10.0**power, dtype=torch.float64)
    assert expected_proposals(rates) == pytest.approx(harmonic(b) / 10.0**power, rel=1e-9)


@given(st.lists(st.floats(-12, 0), min_size=1, max_size=6))
def test_unequal_rates_agree_with_inclusion_and_exclusion(powers):
    rates = [10.0**p for p in powers]
    subsets = [s for k in range(1, len(rates) + 1) for s in itertools.combinations(rates, k)]
    expected = math.fsum((-1) ** (len(s) + 1) / math.fsum(s) for s in subsets)
    assert expected_proposals(torch.tensor(rates, dtype=torch.float64)) == pytest.approx(expected, rel=1e-8)


def draws_until_all_met(rates, trials, seed):
    """Coupon collecting, one draw at a time: each draw meets column i with probability rates[i], or none."""
    g, counts = np.random.default_rng(seed), []
    for _ in range(trials):
        missing, draws = set(range(len(rates))), 0
        while missing:
            draws += 1
            missing.discard(int(np.searchsorted(np.cumsum(rates), g.random())))
        counts.append(draws)
    return np.array(counts)


@pytest.mark.parametrize("rates", [[0.02] * 4, [0.01, 0.02, 0.05], [0.3, 0.7]])
def test_expectation_and_quantiles_agree_with_drawing(rates):
    counts = draws_until_all_met(rates, 1500, seed=len(rates))
    p = torch.tensor(rates, dtype=torch.float64)
    assert counts.mean() == pytest.approx(expected_proposals(p), abs=4 * counts.std() / math.sqrt(len(counts)))
    if max(rates) < 0.1:  # quantiles are those of a continuous time
        quantiles = proposal_quantiles(p, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
        assert np.quantile(counts, [0.1, 0.5, 0.9]) == pytest.approx(quantiles.numpy(), rel=0.1)


@pytest.mark.parametrize("b", [1, 5, 20])
@pytest.mark.parametrize("p", [1e-9, 1e-3, 0.5])
def test_quantiles_of_equal_rates_have_a_closed_form(b, p):
    levels = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    expected = -torch.log1p(-(levels ** (1 / b))) / p
    rates = torch.full((b,), p, dtype=torch.float64)
    torch.testing.assert_close(proposal_quantiles(rates, levels), expected, rtol=1e-10, atol=0)


def test_a_column_with_too_few_zeros_is_never_met():
    rates = success_probability(torch.tensor([3, 20]), 40, 5)
    assert rates[0] == 0
    assert expected_proposals(rates) == math.inf
    assert proposal_quantiles(rates, torch.tensor([0.5])).tolist() == [math.inf]


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_full_rank_probability_is_near_the_share_of_all_masks(rows, columns):
    cells = rows * columns
    masks = (np.array(mask).reshape(rows, columns) for mask in itertools.product((0, 1), repeat=cells))
    share = sum(structural_rank(csr_array(mask)) == columns for mask in masks) / 2**cells
    assert full_rank_probability(rows, columns + 1) == pytest.approx(share, abs=0.05)


# ------------------------------------------------------------------------------------------------- failure


def slow_failure(m, b, trials, generator):
    """The definition column by column, with the rank of generic values read from the mask alone (a matching)."""
    failures, least = 0, max(threshold(m), b - 1)
    for _ in range(trials):
        torch.randn(m, b, dtype=torch.float64, generator=generator)
        zero = torch.rand(m, b, generator=generator) < 0.5
        failed = False
        for i in range(b):
            others = np.delete((~zero[zero[:, i]]).numpy(), i, axis=1).astype(int)
            enough = len(others) >= least
            failed |= not enough or (b > 1 and len(others) > 0 and structural_rank(csr_array(others)) < b - 1)
        failures += failed
    return failures / trials


@pytest.mark.parametrize(("m", "b"), [(4, 1), (6, 2), (12, 4), (16, 5), (24, 8)])
def test_simulated_failures_are_the_definitions(m, b):
    seeds = [torch.Generator().manual_seed(b) for _ in range(2)]
    fast = failure_simulation(m, b, trials=100, generator=seeds[0])
    # the fast one stops drawing nowhere, so both see the same masks
    assert fast == slow_failure(m, b, 100, seeds[1])


@pytest.mark.parametrize(("m", "b"), [(10, 2), (12, 3), (16, 4), (25, 6), (30, 8), (50, 20)])
def test_bound_and_approximation_hold_the_simulation(m, b):
    trials = 400
    share = failure_simulation(m, b, trials=trials, generator=torch.Generator().manual_seed(0))
    sigma = math.sqrt(max(share * (1 - share), 1 / trials) / trials)
    assert share <= failure_bound(m, b) + 4 * sigma
    assert share == pytest.approx(failure_approximation(m, b), abs=4 * sigma + 0.06)


@pytest.mark.parametrize("b", [1, 2, 5, 10, 25])
def test_the_approximation_stays_under_the_bound_and_meets_it_where_failure_is_rare(b):
    for m in (30, 60, 100, 200, 400):
        bound, approximation = failure_bound(m, b), failure_approximation(m, b)
        assert 0 <= approximation <= bound + 1e-14 <= 1 + 1e-14  # one minus a sum that is nearly 1
        if bound < 1e-3:
            assert approximation == pytest.approx(bound, rel=0.1)


def test_wide_layers_fail_only_by_false_rejection_and_large_batches_fail_more():
    for m in (200, 400, 1000):
        bounds = [failure_bound(m, b) for b in (2, 5, 10, 20, 40)]
        assert bounds == sorted(bounds)
        assert all(f <= b * 1e-9 * 1.01 for f, b in zip(bounds, (2, 5, 10, 20, 40), strict=True))
    assert failure_bound(40, 10) > 1e3 * failure_bound(80, 10)


def test_the_bound_follows_the_false_rejection_rate():
    for rate in (1e-3, 1e-6, 1e-9):
        assert 0.1 * rate < failure_bound(400, 10, false_rejection=rate) / 10 <= rate * 1.001


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: success_probability(torch.tensor([3]), 4, 5), "a batch of 5 needs a layer at least that wide"),
        (lambda: success_probability(torch.tensor([5]), 4, 2), "between 0 and 4 zeros"),
        (lambda: half_rates(10, 11), "the width is 10"),
        (lambda: expected_proposals(torch.tensor([0.5, 1.5])), r"numbers in \[0, 1\]"),
        (lambda: expected_proposals(torch.zeros(0)), "at least one"),
        (lambda: proposal_quantiles(torch.tensor([0.5]), torch.tensor([1.0])), "strictly between 0 and 1"),
        (lambda: failure_bound(5, 6), "a batch of 6"),
        (lambda: failure_approximation(5, 0), "a batch of 0"),
        (lambda: failure_bound(50, 5, false_rejection=2.0), r"false-rejection rate lies in \[0, 1\], not 2.0"),
        (lambda: failure_simulation(50, 5, trials=0), "at least 1 trial, not 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
