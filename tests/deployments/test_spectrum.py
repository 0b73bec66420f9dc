"""The rank and level of a low-rank matrix under noise that is not the same everywhere."""

import pytest
import torch

from spear.deployments.spectrum import balance, scaled


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(signal: torch.Tensor) -> torch.Tensor:
    return signal.pow(2).mean(1, keepdim=True).sqrt().expand_as(signal)


PROFILES = {
    "even": torch.ones_like,
    "entries": torch.abs,
    "rows": _rows,
    "columns": lambda s: _rows(s.mT).mT,
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
@pytest.mark.parametrize("seed", range(3))
def test_noise_in_proportion_to_anything_hides_no_rank_and_adds_none(profile, shape, seed):
    m, n = shape
    sizes = torch.logspace(0, 1.5, m, dtype=torch.float64)[:, None], torch.logspace(1, 0, n, dtype=torch.float64)
    signal = _draw(m, 6, seed=seed) @ _draw(6, n, seed=seed + 50) * sizes[0] * sizes[1]
    noise = 0.02 * PROFILES[profile](signal) * _draw(m, n, seed=seed + 99)
    found = scaled(signal + noise)
    part = found.standing()
    assert part.low.rank == 6
    assert part.is_noise
    assert part.sigma == pytest.approx(float(noise.square().mean().sqrt()), rel=0.1)
    identity = part.low.L.mT @ part.low.L
    torch.testing.assert_close(identity, torch.eye(6, dtype=torch.float64))
    rows = part.low.R @ part.low.R.mT
    torch.testing.assert_close(rows, torch.diag(rows.diagonal()), rtol=0, atol=1e-8 * float(rows.max()))


@pytest.mark.parametrize("seed", range(3))
def test_a_guess_that_no_rows_and_columns_make_is_used(seed):
    signal = _draw(150, 5, seed=seed) @ _draw(5, 220, seed=seed + 7)
    widths = torch.where(_draw(150, 220, seed=seed + 1) > 1, 3.0, 0.3)
    widths[:, :100] *= 8
    J = signal + 0.01 * widths * _draw(150, 220, seed=seed + 2)
    assert scaled(J, guesses=[widths.square]).rank == 5


def test_blank_rows_and_columns_have_no_part():
    signal = _draw(100, 3) @ _draw(3, 130) + 0.01 * _draw(100, 130, seed=5)
    whole = torch.zeros(140, 200, dtype=torch.float64)
    whole[20:120, 50:180] = signal
    outer, inner = scaled(whole).standing(), scaled(signal).standing()
    assert (outer.low.rank, outer.sigma) == (inner.low.rank, pytest.approx(inner.sigma))
    torch.testing.assert_close((outer.low.L @ outer.low.R)[20:120, 50:180], inner.low.L @ inner.low.R)
    assert not outer.low.L[:20].any()


def test_balanced_rows_and_columns_have_the_mean_variance_one():
    variance = _draw(60, 90).exp()
    left, right = balance(variance)
    even = left.square()[:, None] * variance / variance.mean() * right.square()
    torch.testing.assert_close(even.mean(1), torch.ones(60, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(even.mean(0), torch.ones(90, dtype=torch.float64), rtol=1e-6, atol=0)
