"""An activation is recognised by what it computes, with its slope, its breaks and its inverse."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear.models.activations import RELU, recognise
from spear.models.tracing import chain, find_layer
from spear.reconstruction import Refusal

UNITS = 24


class Written(nn.Module):
    """An activation that is a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def model(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, UNITS), activation, nn.Linear(UNITS, 3)).double()


def channels() -> nn.PReLU:
    made = nn.PReLU(UNITS)
    made.weight.data.uniform_(0.05, 0.9)
    return made


CASES = {
    "leaky": (nn.LeakyReLU(0.2), (0.0,), True),
    "prelu": (nn.PReLU(init=0.4), (0.0,), True),
    "prelu of channels": (channels(), (0.0,), True),
    "relu6": (nn.ReLU6(), (0.0, 6.0), True),
    "hardtanh": (nn.Hardtanh(), (-1.0, 1.0), True),
    "softshrink": (nn.Softshrink(), (-0.5, 0.5), True),
    "relu clipped": (Written(lambda x: torch.relu(x).clamp(max=2)), (0.0, 2.0), True),
    "hardswish": (nn.Hardswish(), (-3.0, 3.0), False),
    "gelu": (nn.GELU(), (), False),
    "gelu by tanh": (nn.GELU("tanh"), (), False),
    "silu": (nn.SiLU(), (), False),
    "mish": (nn.Mish(), (), False),
    "softplus": (nn.Softplus(), (), False),
    "softplus by hand": (Written(lambda x: torch.log(1 + torch.exp(x))), (), False),
    "tanh": (nn.Tanh(), (), False),
    "sigmoid": (nn.Sigmoid(), (), False),
    "elu": (nn.ELU(), (0.0,), False),
    "selu": (nn.SELU(), (0.0,), False),
    "softsign": (nn.Softsign(), (0.0,), False),
    "relu squared": (Written(lambda x: F.relu(x) ** 2), (0.0,), False),
    "gelu scaled": (Written(lambda x: 2 * F.gelu(3 * x + 1) - 1), (), False),
}


@pytest.mark.parametrize("name", CASES)
def test_activation_is_read_off_what_a_model_computes(name):
    activation, breaks, flat = CASES[name]
    network = model(activation)
    first, second = chain(network, (12,))
    found = first.activation
    assert (found.breaks, found.is_flat, found.is_relu) == (breaks, flat, False)
    x = 3 * torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = first.linear(x).detach()
    torch.testing.assert_close(second.linear(found.value(z)), network(x))
    value, slope, bend = found.at(z)
    torch.testing.assert_close(value, found.value(z))
    torch.testing.assert_close(slope, found.slope(z))
    h = 1e-6
    torch.testing.assert_close(slope, (found.value(z + h) - found.value(z - h)) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bend, (found.slope(z + h) - found.slope(z - h)) / (2 * h), rtol=1e-6, atol=1e-7)
    single = found.slope(z.float())
    torch.testing.assert_close(single.double(), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_inverse_is_sure_only_where_no_other_pre_activation_gives_the_value(name):
    found = chain(model(CASES[name][0]), (12,))[0].activation
    z = 2 * torch.randn(40, UNITS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = found.value(z)
    noise = 1e-9 * (2 * torch.rand(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 1)
    back, sure = found.inverse(y + noise, 1e-8)
    steep = sure & (found.slope(z).abs() > 1e-2)
    assert float((back - z).abs()[steep].max()) < 1e-6
    torch.testing.assert_close(found.value(back)[sure], (y + noise)[sure])
    assert 0.1 < float(sure.double().mean()) <= 1


def test_relu_by_any_name_keeps_its_own_way():
    for function in (torch.relu, lambda x: x.clamp_min(0), lambda x: x * (x > 0)):
        assert chain(model(Written(function)), (12,))[0].activation is RELU


@pytest.mark.parametrize("activation", [nn.Softmax(1), nn.LayerNorm(UNITS), Written(lambda x: x - x.mean(0))])
def test_what_mixes_entries_or_samples_is_no_activation(activation):
    with pytest.raises(Refusal, match="elementwise activations"):
        chain(model(activation), (12,))
    assert recognise(activation.double(), UNITS) is None


def test_functions_without_a_slope_are_none():
    for function in (torch.sign, torch.round, lambda x: torch.log(x), lambda x: 0 * x, lambda x: x[:, :3]):
        assert recognise(Written(function), UNITS) is None


def test_random_slopes_in_training_are_named():
    network = model(nn.RReLU())
    with pytest.raises(Refusal, match="random slopes"):
        chain(network.train(), (12,))
    assert chain(network.eval(), (12,))[0].activation.is_flat


def test_methods_of_one_layer_still_need_relu():
    with pytest.raises(Refusal, match="no ReLU follows"):
        find_layer(model(nn.GELU()))
    assert find_layer(model(Written(lambda x: F.relu(x) ** 2))).relu


def test_which_activations_leave_a_length_open() -> None:
    """phi(c z) is a power of c times phi(z): of ReLU, of its square, of a slope on each side."""
    found = {
        name for name, (activation, *_) in CASES.items() if recognise(activation.double(), UNITS).degree is not None
    }
    assert found == {"leaky", "prelu", "prelu of channels", "relu squared"}
    assert RELU.degree == 1
