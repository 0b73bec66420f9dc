"""What stands between linear layers: normalisation by module, by function and by hand; what is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear.models.normalised import normalised_chain
from spear.reconstruction import Refusal

M, N = 40, 12


def network(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(N, M), *between, nn.Linear(M, 5))


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.norm, self.head = nn.Linear(N, M), nn.BatchNorm1d(M), nn.Linear(M, 5)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        arguments = (norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.2, 1e-4)
        return self.head(F.batch_norm(self.low(x), *arguments).relu())


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-8])
@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_of_a_sample(kind, eps):
    norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "group": lambda m, eps: nn.GroupNorm(1, m, eps=eps)}
    made, generator = norms[kind](M, eps=eps), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(M, generator=generator))
    layers, (between,) = normalised_chain(network(made, nn.ReLU()), (N,))
    norm = between.norm
    assert [layer.name for layer in layers] == ["1", "4"]
    assert norm.kind == ("rms" if kind == "rms" else "layer")
    assert norm.eps == pytest.approx(eps, rel=1e-3)
    assert torch.allclose(norm.scale.float(), made.weight, atol=1e-6)
    assert norm.scale_name == "2.weight"
    if kind != "rms":
        assert norm.shift_name == "2.bias"
        assert torch.allclose(norm.shift.float(), made.bias, atol=1e-6)


@pytest.mark.parametrize(("momentum", "rate"), [(0.1, 0.1), (0.3, 0.3), (None, 1.0)])
def test_of_the_batch(momentum, rate):
    _, (between,) = normalised_chain(network(nn.BatchNorm1d(M, momentum=momentum, eps=1e-4), nn.ReLU()).train(), (N,))
    norm = between.norm
    assert (norm.kind, norm.eps, norm.rate) == ("batch", 1e-4, rate)
    names = (norm.scale_name, norm.shift_name, norm.mean_name, norm.variance_name)
    assert names == ("2.weight", "2.bias", "2.running_mean", "2.running_var")


def test_by_function():
    _, (between,) = normalised_chain(ByFunction().train(), (N,))
    norm = between.norm
    assert (norm.kind, norm.eps, norm.rate) == ("batch", 1e-4, 0.2)
    assert norm.variance_name == "norm.running_var"


@pytest.mark.parametrize(
    "between",
    [
        (nn.ReLU(), nn.Dropout(0.3)),
        (nn.Dropout(0.3), nn.ReLU(inplace=True)),
        (nn.BatchNorm1d(M), nn.ReLU(), nn.Dropout(0.3, inplace=True)),
        (nn.LayerNorm(M), nn.Dropout(0.3), nn.ReLU()),
    ],
)
def test_dropout(between):
    _, (found,) = normalised_chain(network(*between).train(), (N,))
    assert found.drop == pytest.approx(0.3)
    off = normalised_chain(network(*between).eval(), (N,))
    assert off is None or not off[1][0].drop


@pytest.mark.parametrize(
    ("between", "norm", "after", "is_relu"),
    [
        ((nn.ReLU(), nn.BatchNorm1d(M)), None, "batch", True),
        ((nn.GELU(), nn.BatchNorm1d(M)), None, "batch", False),
        ((nn.BatchNorm1d(M), nn.SiLU()), "batch", None, False),
        ((nn.LayerNorm(M), nn.GELU(approximate="tanh")), "layer", None, False),
        ((nn.RMSNorm(M), nn.LeakyReLU()), "rms", None, False),
    ],
)
def test_beside_an_activation(between, norm, after, is_relu):
    layers, (found,) = normalised_chain(network(*between).train(), (N,))
    assert (found.norm and found.norm.kind, found.after and found.after.kind) == (norm, after)
    assert layers[0].activation.is_relu == is_relu
    z = torch.linspace(-3, 3, M, dtype=torch.float64)[None]
    activation = between[0] if norm is None else between[1]
    assert torch.allclose(layers[0].activation.value(z), activation(z))


def test_what_normalises_nowhere():
    assert normalised_chain(network(nn.ReLU()), (N,)) is None
    assert normalised_chain(network(nn.BatchNorm1d(M), nn.ReLU()).eval(), (N,)) is None
    assert normalised_chain(network(nn.ReLU(), nn.LogSoftmax(1)), (N,)) is None


@pytest.mark.parametrize(
    ("between", "message"),
    [
        ((nn.BatchNorm1d(M), nn.ReLU(), nn.BatchNorm1d(M)), "behind 1 comes"),
        ((nn.Dropout(0.5), nn.BatchNorm1d(M), nn.ReLU()), "behind 1 comes"),
        ((nn.ReLU(), nn.AlphaDropout(0.5)), "behind 1 comes"),
        ((nn.ReLU(), nn.Dropout(0.5), nn.Dropout(0.2)), "behind 1 comes"),
        ((nn.LayerNorm(M), nn.Softmax(1)), "behind 1 comes"),
        ((nn.Dropout(0.5), nn.GELU()), "behind 1 comes"),
        ((nn.BatchNorm1d(M),), "behind 1 comes"),
    ],
)
def test_another_form_is_named(between, message):
    with pytest.raises(Refusal, match=message):
        normalised_chain(network(*between).train(), (N,))


def test_one_normalisation_for_two_layers():
    norm = nn.LayerNorm(M)
    model = nn.Sequential(nn.Linear(N, M), norm, nn.ReLU(), nn.Linear(M, M), norm, nn.ReLU(), nn.Linear(M, 5))
    with pytest.raises(Refusal, match="1.weight is of several layers"):
        normalised_chain(model, (N,))
