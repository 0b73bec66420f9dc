"""What solved samples disclose of their s, and starts that keep away from them."""

import pytest
import torch
from network_problems import case

from spear.directions import unit_rows
from spear.network.problem import Targets, passes
from spear.network.repulsion import Repulsion, duals
from spear.network.spaces import Solved, project
from spear.network.whole_batch import open_spaces

SEEDS = range(3)
SIZES, BATCH, KNOWN = (80, 600, 10), 60, 50


def alike(seed, batch=BATCH, inputs=SIZES[0]):
    """Inputs that resemble each other as photos do: positive, with a large part in common."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.rand(inputs, generator=generator, dtype=torch.float64)
    return common + 0.5 * torch.rand(batch, inputs, generator=generator, dtype=torch.float64)


def problem(seed, sizes=SIZES):
    """Spaces, the true directions of all samples, and their true x = s / S at the scale where ⟨x_k, t_k⟩ = 1."""
    made = case(sizes, BATCH, seed=seed, inputs=alike(seed))
    low = made.problem.factors(made.problem.last)
    spaces = open_spaces(made.problem, low.L, low.R)
    counts = torch.nn.functional.one_hot(made.labels, 10).double()
    run = passes(made.problem, made.inputs, Targets(counts, 1 / BATCH, 0.0))
    t = run.deltas[-2] @ spaces.basis
    size = t.norm(dim=1, keepdim=True)
    y = torch.nn.functional.pad(run.inputs[-2], (0, 1), value=1.0)
    x = y @ spaces.rows.T / spaces.singular * size
    return spaces, Solved(t / size, run.deltas[-1] / size, run.deltas[-2] != 0), x


@pytest.mark.parametrize("sizes", [SIZES, (80, 300, 600, 10)])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_truth_is_dual_and_so_are_the_means(seed, sizes):
    spaces, every, true = problem(seed, sizes)
    assert torch.allclose(true @ every.t.T, torch.eye(BATCH).double(), atol=1e-7)
    known = every[torch.arange(KNOWN)]
    x, _ = duals(spaces, known)
    assert torch.allclose(x.double() @ known.t.T, torch.eye(KNOWN).double(), atol=1e-3)


@pytest.mark.parametrize("sizes", [SIZES, (80, 300, 600, 10)])
@pytest.mark.parametrize("seed", SEEDS)
def test_masks_tell_of_x_what_solved_directions_do_not_and_how_much_is_left(seed, sizes):
    spaces, every, true = problem(seed, sizes)
    known, true = every[torch.arange(KNOWN)], true[:KNOWN]
    x, blur = duals(spaces, known)
    told = torch.linalg.pinv(known.t).T
    off = (x - true).square().sum(1)
    assert off.mean() < 0.5 * (told - true).square().sum(1).mean()
    assert 0.3 < off.median() / blur.trace() < 3
    assert torch.allclose(known.t.float() @ blur, torch.zeros(KNOWN, BATCH), atol=1e-4 * float(blur.trace()))


@pytest.mark.parametrize("seed", SEEDS)
def test_order_and_sign_of_what_is_solved_do_not_matter(seed):
    spaces, every, _ = problem(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(KNOWN, generator=generator)
    sign = torch.randint(2, (KNOWN, 1), generator=generator) * 2.0 - 1
    x, blur = duals(spaces, every[torch.arange(KNOWN)])
    turned = Solved(sign * every.t[order], sign * every.d[order], every.mask[order])
    other, other_blur = duals(spaces, turned)
    assert torch.allclose(sign.float() * other, x[order], atol=2e-3 * float(x.abs().max()))
    assert torch.allclose(other_blur, blur, atol=2e-3 * float(blur.abs().max()))


@pytest.mark.parametrize("seed", SEEDS)
def test_projection_holds_solved_directions_back_and_hardly_others(seed):
    spaces, every, _ = problem(seed)
    away = Repulsion.of(spaces, every[torch.arange(KNOWN)])
    u = every.t.float() @ spaces.basis.float().T
    shares = away.shares(u)
    assert ((shares > 0) & (shares <= 1)).all()
    kept = away.project(u, shares).norm(dim=1)
    assert (kept <= 1 + 1e-5).all()
    assert kept[:KNOWN].amax() < kept[KNOWN:].amin()  # a step; a search takes dozens
    assert kept[KNOWN:].amin() > 0.97
    outside = torch.randn(5, len(spaces.basis), generator=torch.Generator().manual_seed(seed))
    outside = outside - project(outside, spaces.basis.float())
    assert away.project(outside, away.shares(outside)).abs().max() < 1e-4


def test_shares_do_not_depend_on_a_starts_size_and_a_zero_one_is_no_error():
    spaces, every, _ = problem(0)
    away = Repulsion.of(spaces, every[torch.arange(KNOWN)])
    u = unit_rows(torch.randn(6, len(spaces.basis), generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(away.shares(u), away.shares(-7 * u), atol=1e-5)
    assert away.shares(0 * u).isfinite().all()


def test_nothing_is_repelled_by_nobody_nor_by_directions_that_depend_on_each_other():
    spaces, every, _ = problem(0)
    assert Repulsion.of(spaces, Solved.none(spaces)) is None
    twice = torch.tensor([0, 1, 2, 0])
    assert Repulsion.of(spaces, every[twice]) is None
