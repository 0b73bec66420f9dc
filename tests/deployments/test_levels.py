"""Few values, cells, spacings: every quantiser's cells hold what was rounded; other tensors have none."""

import pytest
import torch

from spear.deployments.levels import block_size, cells, held_by, spacing

CODE = torch.tensor(
    [-1, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
).double()


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _coded(values: torch.Tensor, size: int) -> torch.Tensor:
    """Each block's entries as the nearest of the codes times its largest entry."""
    blocks = values.flatten().view(-1, size)
    scale = blocks.abs().amax(1, keepdim=True)
    index = torch.bucketize(blocks / scale, (CODE[1:] + CODE[:-1]) / 2)
    return (CODE[index] * scale).view(values.shape)


def _uniform(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    largest = values.abs().max() if dim is None else values.abs().amax(dim, keepdim=True)
    largest = largest.clamp_min(1e-300)
    return (values / largest * 20).round() * (largest / 20)


QUANTISERS = {
    "tensor": (lambda t: _uniform(t), 120 * 200),
    "rows": (lambda t: _uniform(t, 1), 200),
    "blocks of 64": (lambda t: _coded(t, 64), 64),
    "signs": (torch.sign, 120 * 200),
}


@pytest.mark.parametrize("kind", QUANTISERS)
@pytest.mark.parametrize("seed", range(3))
def test_the_cells_hold_what_was_rounded(kind, seed):
    quantise, size = QUANTISERS[kind]
    values = _draw(120, 200, seed=seed)
    sent = quantise(values)
    found = cells(sent)
    inside = (found.low <= values + 1e-9) & (values - 1e-9 <= found.high)
    assert inside.double().mean() > (0.6 if kind == "signs" else 0.98)
    assert ((found.low <= sent) & (sent <= found.high)).all()
    assert block_size(sent.flatten(), 200) == size
    scaled = cells(-3.0 * sent)
    torch.testing.assert_close(scaled.width, 3.0 * found.width, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_not_rounded_has_no_cells(seed):
    product = _draw(100, 4, seed=seed) @ _draw(4, 150, seed=seed + 9)
    assert cells(product) is None
    product[:, ::2], product[::3] = 0, 0  # blank pixels, idle neurons
    assert cells(product) is None
    assert cells(_draw(10)) is None
    assert cells(torch.zeros(50, 50, dtype=torch.float64)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_spacing_of_a_type_is_the_next_number_s_distance(dtype):
    values = _draw(500).to(dtype)
    integers = {torch.float32: torch.int32}.get(dtype, torch.int16)
    following = (values.abs().view(integers) + 1).view(dtype)
    wanted = following.double() - values.abs().double()
    torch.testing.assert_close(spacing(values.double(), dtype), wanted)
    assert float(spacing(torch.zeros(1, dtype=torch.float64), dtype)) == 0


def test_which_type_holds_the_values():
    halves, values = (torch.bfloat16, torch.float16), _draw(200)  # the second holds the first's numbers
    assert held_by(values, halves) is None
    for dtype in halves:
        sent = values.to(dtype).double()
        assert held_by(sent / 0.1 * 0.1, halves) == dtype
        assert held_by(torch.cat([sent, values[:5]]), halves) == dtype
    assert held_by(values.half().double()[:20], halves) is None
