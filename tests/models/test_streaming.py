"""Arithmetic by blocks of rows equals that of whole matrices in float64, derivatives of any order included."""

import pytest
import torch
from torch import nn

from spear.models import streaming, tracing
from spear.models.streaming import Blocks, Outer, Streamed


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=[1, 12, 10**6], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one row, of a few, of all."""
    monkeypatch.setattr(streaming, "CHUNK", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
def test_blocks_are_the_matrix(dtype: torch.dtype, biased: bool) -> None:
    weight, column = normal(7, 5, dtype=dtype), normal(7, seed=1, dtype=dtype) if biased else None
    J = torch.cat([weight, column[:, None]], 1).double() if biased else weight.double()
    blocks, right, left = Blocks(weight, column, normal(0)), normal(5 + biased, 3, seed=2), normal(7, 2, seed=3)
    assert blocks.shape == tuple(J.shape)
    torch.testing.assert_close(blocks.times(right), J @ right)
    torch.testing.assert_close(blocks.after(left), left.mT @ J)
    assert torch.equal(blocks.whole(), J)
    assert blocks.any()
    assert not Blocks(torch.zeros(7, 5), None, normal(0)).any()


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_a_streamed_layer_and_its_derivatives(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(5, 6)
    wide, x = Streamed(linear, torch.device("cpu")), normal(*shape, 5).requires_grad_()
    torch.testing.assert_close(wide(x), x @ linear.weight.double().mT + linear.bias.double())
    assert torch.autograd.gradcheck(wide, (x,))
    assert torch.autograd.gradgradcheck(lambda x: wide(x).tanh(), (x,))
    assert wide.weight.data_ptr() == linear.weight.data_ptr()


def test_a_streamed_tail_leaves_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3))
    tail = streaming.streamed(tracing.find_layer(model).tail, torch.device("cpu"))
    z = normal(2, 5)
    torch.testing.assert_close(tail(z), model[1:].double()(z), rtol=1e-12, atol=0)
    assert set(dict(tail.named_parameters())) == {"2.weight", "2.bias"}
    assert set(streaming.weight_names(tail)) == set(dict(model.named_parameters())) - {"0.weight", "0.bias"}


def test_outer_products() -> None:
    deltas, inputs = normal(3, 6), normal(3, 4, seed=1)
    torch.testing.assert_close(Outer(deltas, inputs)[2:5], (deltas.mT @ inputs)[2:5])
