"""Low-rank matrices from some of their entries: the rank found, what is determined told from what is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from spear.accuracy import Accuracy
from spear.deployments import completion


def _matrix(m: int, n: int, rank: int, seed: int = 0, decay: float = 1.0) -> Tensor:
    generator = Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(m, rank) * decay ** torch.arange(rank) @ draw(rank, n)


def _drawn(J: Tensor, keep: float, seed: int = 0) -> Tensor:
    return torch.rand(J.shape, generator=Generator().manual_seed(seed + 1)) < keep


def _complete(J: Tensor, kept: Tensor, **options: object) -> completion.Completed:
    return completion.complete(J * kept, kept, generator=Generator().manual_seed(0), **options)


def _off(found: completion.Completed, J: Tensor) -> float:
    inside = found.rows[:, None] & found.columns
    return float(((found.J - J) * inside).norm() / (J * inside).norm())


@pytest.mark.parametrize(("m", "n", "rank", "keep"), [(60, 80, 1, 0.3), (60, 80, 5, 0.4), (50, 300, 6, 0.4)])
@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_rank_and_entries_are_found(m, n, rank, keep, decay, seed):
    J = _matrix(m, n, rank, seed, decay)
    found = _complete(J, _drawn(J, keep, seed))
    assert found.exact
    assert found.rank == rank
    assert _off(found, J) < 1e-10
    assert found.rows.double().mean() > 0.95
    assert found.columns.double().mean() > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_entries_do_as_well(seed):
    J = _matrix(80, 100, 4, seed)
    kept = J.abs() >= J.abs().flatten().quantile(0.6)
    found = _complete(J, kept, most=4)
    assert (found.exact, found.rank) == (True, 4)
    assert _off(found, J) < 1e-10


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5), scale=st.sampled_from((1e-9, 1.0, 1e6)))
@settings(max_examples=10, deadline=None)
def test_permutation_transposition_and_scale_change_nothing(seed, rank, scale):
    J = _matrix(50, 60, rank, seed)
    kept = _drawn(J, 0.6, seed)
    order = torch.randperm(50, generator=Generator().manual_seed(seed))
    found = [_complete(scale * J, kept), _complete(scale * J[order], kept[order]), _complete(scale * J.T, kept.T)]
    assert [f.rank for f in found] == [rank] * 3
    assert all(f.exact for f in found)
    assert _off(found[1], scale * J[order]) < 1e-9
    assert _off(found[2], scale * J.T) < 1e-9


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 12), keep=st.floats(0.02, 0.6))
@settings(max_examples=25, deadline=None)
def test_what_is_called_exact_is_right(seed, rank, keep):
    """From far too few entries to more than enough."""
    J = _matrix(24, 30, rank, seed)
    kept = _drawn(J, keep, seed)
    if kept.any():
        found = _complete(J, kept)
        assert not found.exact or _off(found, J) < 1e-7


def test_batched_least_squares_are_the_loops():
    A = torch.linalg.qr(_matrix(30, 5, 5))[0]
    J, kept = _matrix(30, 40, 7, 1), _drawn(torch.zeros(30, 40), 0.5)
    fast, _ = completion.masked_least_squares(A, J, kept.double())
    for k in range(40):
        on = kept[:, k]
        torch.testing.assert_close(fast[:, k], torch.linalg.lstsq(A[on], J[on, k : k + 1]).solution[:, 0])


def test_chunks_change_nothing(monkeypatch):
    A = torch.linalg.qr(_matrix(30, 5, 5))[0]
    J, kept = _matrix(30, 40, 7, 1), _drawn(torch.zeros(30, 40), 0.5).double()
    whole, pivots = completion.masked_least_squares(A, J, kept)
    assert (pivots > 0).all()
    monkeypatch.setattr(completion, "CHUNK", 100)
    torch.testing.assert_close(completion.masked_least_squares(A, J, kept)[0], whole, rtol=1e-12, atol=1e-14)


def test_rows_and_columns_that_hardly_arrived_stay_out():
    J = _matrix(60, 70, 3)
    kept = _drawn(J, 0.5)
    kept[5], kept[:, 8], kept[7] = False, False, False
    kept[7, :4] = True
    found = _complete(J, kept)
    assert found.exact
    assert (~found.rows).nonzero()[:, 0].tolist() == [5, 7]
    assert (~found.columns).nonzero()[:, 0].tolist() == [8]
    assert not found.J[5].any()
    assert _off(found, J) < 1e-10


def test_noise_is_not_called_exact():
    J = _matrix(60, 70, 3)
    noise = torch.randn(J.shape, generator=Generator().manual_seed(9), dtype=torch.float64)
    found = _complete(J + 1e-5 * noise, _drawn(J, 0.5), most=6)
    assert not found.exact
    rounded = _complete(J.float().double(), _drawn(J, 0.5), tolerance=Accuracy.of_dtype(torch.float32).completed)
    assert (rounded.exact, rounded.rank) == (True, 3)
    assert _off(rounded, J) < 1e-5


def test_the_largest_rank_leaves_fewer_unknowns_than_entries():
    kept = torch.ones(20, 30, dtype=torch.bool)
    kept[:, 10:] = False
    most = completion.most_rank(kept)
    assert most * (20 + 10 - most) < 0.9 * 200 <= (most + 1) * (20 + 10 - most - 1)


def test_nothing_that_arrived_is_an_error():
    with pytest.raises(ValueError, match="rank 0: it is zero everywhere"):
        _complete(torch.zeros(5, 6, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.bool))
