"""The curve of an activation behind dropout: its pieces, its nearest points, and how many units may be gone."""

import pytest
import torch
from torch import Generator, nn

from spear.models.activations import recognise
from spear.network.curves.dropped import Dropping
from spear.network.curves.reflections import nearest

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
