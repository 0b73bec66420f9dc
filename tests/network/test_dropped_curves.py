"""The curve of an activation behind dropout: its pieces, its nearest points, and how many units may be gone; and the
three values of two slopes."""

from dataclasses import replace

import pytest
import torch
from torch import Generator, nn

from spear.directions import unit_rows
from spear.models.activations import recognise
from spear.network.curves.dropped import Dropping
from spear.network.curves.reflections import nearest
from spear.network.phase_retrieval import Iterate, Reflections, retrieve_phases
from spear.network.spaces import ACTIVE, GONE, INACTIVE, Levels

SHARE = 0.3


def dropping(function):
    return Dropping.behind(recognise(function.double(), 4), SHARE)


@pytest.mark.parametrize("function", [nn.GELU(), nn.Hardswish(), nn.LeakyReLU(0.2)])
def test_pieces_are_those_of_phi_over_what_is_kept_and_zero(function):
    made = dropping(function)
    plain, z = recognise(function.double(), 4), torch.linspace(-4, 4, 40, dtype=torch.float64).reshape(10, 4)
    for kept, own in zip(made.at_piece(z, made.piece(z)), plain.at(z), strict=True):
        assert torch.allclose(kept, own / (1 - SHARE))
    gone = torch.full_like(z, made.gone, dtype=torch.long)
    assert not any(part.any() for part in made.at_piece(z, gone))
    assert torch.equal(made.within(z, gone), z)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("function", [nn.GELU(), nn.Hardswish()])
def test_a_unit_is_gone_where_zero_is_nearer_than_the_curve(function, seed):
    """Held against a grid of points of the curve, one entry at a time."""
    made, generator = dropping(function), Generator().manual_seed(seed)
    u, z, h = torch.randn(3, 5, 40, generator=generator, dtype=torch.float64)
    weight = torch.full((5, 1), 100.0, dtype=torch.float64)  # z hardly moves
    point = nearest(made, 0.3 * u, z, h, weight)
    off = (0.3 * u - h * made.at(z)[1]).abs()
    clear = (off - (0.3 * u).abs()).abs() > 0.05
    gone = point.piece == made.gone
    room = gone.sum(1, keepdim=True) < int(gone.shape[1] * 0.55)
    assert bool((gone == ((0.3 * u).abs() < off))[clear & room].all())
    assert not point.u[gone].any()
    assert torch.equal(point.z[gone], z[gone])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slope", [-0.3, 0.0, 0.01, 0.5])
def test_of_two_slopes_a_mask_says_which_of_three_values_is_nearest(slope, seed):
    levels = replace(Levels.of(recognise(nn.LeakyReLU(slope).double(), 40), 40), dropped=True)
    u, h = torch.randn(2, 5, 40, generator=Generator().manual_seed(seed), dtype=torch.float64)
    mask = levels.mask(u, h)
    values = torch.stack([torch.zeros_like(h), slope * h, h])
    least = (values - u).abs().amin(0)
    assert torch.equal((levels.slopes(mask) * h - u).abs(), least)
    assert torch.equal(mask == GONE, u.abs() <= (values[1:] - u).abs().amin(0))
    assert torch.equal(levels.mask(levels.slopes(mask) * h, h), mask)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("partnered", [False, True])
def test_reflections_behind_dropout_stay_at_a_solution(partnered, moving):
    m, b = 60, 6
    generator = Generator().manual_seed(0)
    levels = replace(Levels.of(recognise(nn.LeakyReLU(0.2).double(), m), m), dropped=True)
    z, h = unit_rows(torch.randn(2, m, generator=generator, dtype=torch.float64))[:, None]
    gone = torch.rand(1, m, generator=generator) < SHARE
    u = torch.where(gone, 0.0, levels.slopes(torch.where(z > 0, ACTIVE, INACTIVE)) * h)
    basis, partner, heads = (
        torch.linalg.qr(torch.cat([x.T, torch.randn(m, b, generator=generator, dtype=torch.float64)], 1))[0]
        for x in (u, z, h)
    )
    options = Reflections(20, partner if partnered else None, 0.5, heads if moving else None, levels=levels)
    end = retrieve_phases(Iterate(u, h, z, u), basis, options)
    for found, there in ((end.u, u), (end.target, u), (end.h, h), (end.v, z)):
        assert torch.allclose(found, there, atol=1e-5)


@pytest.mark.parametrize("m", [20, 200, 2000])
def test_no_more_units_are_gone_than_chance_takes(m):
    made = dropping(nn.GELU())
    gain = torch.rand(6, m, generator=Generator().manual_seed(0), dtype=torch.float64)
    gone = made.taken(gain)
    most = SHARE + 4 * (SHARE * (1 - SHARE) / m) ** 0.5
    assert bool((gone.sum(1) <= most * m).all())
    assert bool((gone.sum(1) >= most * m - 1).all())
    for own, these in zip(gain, gone, strict=True):
        assert float(own[these].min()) > float(own[~these].max())
    assert not made.taken(-gain).any()
