"""Normal vectors given signs: against a slow sampler, and what must not matter."""

import numpy as np
import pytest
import scipy
import torch

from spear.signs import given_signs

SEEDS = range(5)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(seed, count=8, functions=400, unknown=20):
    """Functions of normal vectors of variance 4, a quarter of each known, with their signs."""
    slope, a = normal(functions, unknown, seed=seed), 2 * normal(count, unknown, seed=seed + 100)
    offset = 4 * normal(count, functions, seed=seed + 200)
    return slope, offset, (offset + a @ slope.T).sign(), a


def sampled(slope, offset, sign, variance, sweeps=1500):
    """Mean and covariance of one vector, the textbook way: coordinate by coordinate, a normal variable cut off."""
    generator, size = np.random.default_rng(0), float(variance) ** 0.5
    A, c = (sign[:, None] * slope).numpy(), (sign * offset).numpy()  # A a + c > 0
    a = scipy.optimize.linprog(
        np.r_[np.zeros(A.shape[1]), -1.0], np.c_[-A, np.ones(len(A))], c, bounds=[(-9, 9)] * A.shape[1] + [(0, 1)]
    ).x[:-1]
    seen = []
    for _ in range(sweeps):
        for k in range(A.shape[1]):
            bounds = -(A @ a + c - A[:, k] * a[k]) / A[:, k]
            low, high = bounds[A[:, k] > 0].max(initial=-99), bounds[A[:, k] < 0].min(initial=99)
            ends = scipy.special.ndtr(np.array([low, high]) / size)
            a[k] = np.clip(size * scipy.special.ndtri(generator.uniform(*ends)), low, high)
        seen.append(a.copy())
    return np.mean(seen, 0), np.cov(np.array(seen).T)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_answer_is_near_the_posterior_mean_of_a_slow_sampler(seed):
    slope, offset, sign, _ = problem(seed, functions=120, unknown=8)
    mean, covariance = given_signs(slope, offset, sign, torch.tensor(4.0))
    slow = [sampled(slope, *pair, 4.0) for pair in zip(offset, sign, strict=True)]
    spread = sum(np.trace(c) for _, c in slow) / len(slow)
    off = sum(((m - fast.numpy()) ** 2).sum() for (m, _), fast in zip(slow, mean, strict=True)) / len(slow)
    assert off < 0.8 * spread  # what stays open is more than what the short way loses
    assert 0.4 < float(covariance.trace()) / spread < 2.5


@pytest.mark.parametrize("seed", SEEDS)
def test_means_are_near_the_truth_by_as_much_as_the_covariance_says(seed):
    slope, offset, sign, a = problem(seed)
    mean, covariance = given_signs(slope, offset, sign, torch.tensor(4.0))
    off = (mean - a).square().sum(1)
    assert off.mean() < 0.1 * a.square().sum(1).mean()
    assert 0.3 < off.mean() / covariance.trace() < 3
    more = given_signs(slope[:100], offset[:, :100], sign[:, :100], torch.tensor(4.0))
    assert more[1].trace() > 2 * covariance.trace()


@pytest.mark.parametrize("seed", SEEDS)
def test_units_and_the_orientation_of_a_row_do_not_matter(seed):
    slope, offset, sign, _ = problem(seed)
    mean, covariance = given_signs(slope, offset, sign, torch.tensor(4.0))
    scale = normal(len(slope), seed=seed + 300).abs() + 0.1
    turn = torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    other = given_signs(5 * scale[:, None] * slope, scale * offset, turn * sign, torch.tensor(4.0 / 25))
    assert torch.allclose(5 * other[0], mean, atol=1e-3 * float(mean.abs().max()))
    assert torch.allclose(25 * other[1], covariance, atol=1e-3 * float(covariance.abs().max()))


def test_signs_that_no_vector_has_leave_numbers():
    slope, offset, sign, _ = problem(0)
    mixed = sign * torch.tensor([1.0, -1.0]).repeat(200)
    mean, covariance = given_signs(slope, 1e6 * offset, mixed, torch.tensor(4.0))
    assert mean.isfinite().all()
    assert covariance.isfinite().all()


def test_the_default_dtype_does_not_matter():
    usual, told, variance = torch.get_default_dtype(), problem(0)[:3], torch.tensor(4.0, dtype=torch.float64)
    mean, covariance = given_signs(*told, variance)
    torch.set_default_dtype(torch.float64)
    try:
        again = given_signs(*told, variance)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(again[0], mean)
    assert torch.equal(again[1], covariance)
