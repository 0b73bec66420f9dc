"""Where a layer stands in a model is found by tracing."""

import pytest
import torch
import torch.nn.functional as F
from problems import batch, make
from torch import nn

from spear import attack, models
from spear.models import tracing
from spear.models.memory import remembered
from spear.models.tracing import find_layer, linear_layers, trace


class Plain(nn.Module):
    """Names out of order, functional ReLU, dropout between layer and ReLU, a reshape that asks for a size."""

    def __init__(self, activation=F.relu, branch=False):
        super().__init__()
        self.z, self.a, self.out = nn.Linear(12, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.drop = nn.Dropout(0.5)
        self.activation, self.branch = activation, branch

    def forward(self, x):
        h = self.activation(self.drop(self.z(x.reshape(x.size(0), -1))))
        return self.out(h + self.a(h).relu() if self.branch else self.a(h).relu())


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("activation", [F.relu, torch.relu, lambda z: z.relu(), nn.ReLU()])
def test_order_of_computation_and_relu(activation):
    layers = linear_layers(Plain(activation))
    assert [(x.name, x.from_data, x.relu) for x in layers] == [
        ("z", True, True),
        ("a", False, True),
        ("out", False, False),
    ]


@pytest.mark.parametrize("activation", [F.gelu, F.leaky_relu, torch.tanh, nn.LeakyReLU(), nn.GELU()])
def test_other_activations_are_not_relu(activation):
    with pytest.raises(ValueError, match="no ReLU follows z"):
        find_layer(Plain(activation))


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_tail_computes_the_logits(depth, index):
    model = models.fcnn((3, 2, 2), 9, depth, 4)
    layers = linear_layers(model)
    layer = layers[min(index, depth - 1)]
    x, _ = batch(5, 12)
    caught = {}
    handle = layer.linear.register_forward_hook(lambda _m, _i, z: caught.update(z=z))
    expected = model(x.reshape(5, 3, 2, 2))
    handle.remove()
    assert torch.equal(layer.tail(caught["z"]), expected)
    assert set(dict(layer.tail.named_parameters())) < set(dict(model.named_parameters()))


def test_a_branch_around_the_layer_has_no_tail():
    layers = {layer.name: layer for layer in linear_layers(Plain(branch=True))}
    assert layers["a"].tail is None
    x = torch.randn(4, 12)
    model = Plain(branch=True).eval()
    layer = linear_layers(model)[0]
    torch.testing.assert_close(layer.tail(model.z(x)), model(x))


def test_errors():
    model = models.fcnn((12,), 9, 3, 4)
    with pytest.raises(ValueError, match="no linear layer named 'fc9'; the model's linear layers: fc1, fc2, fc3"):
        find_layer(model, "fc9")
    with pytest.raises(ValueError, match="no ReLU follows fc3"):
        find_layer(model, "fc3")
    with pytest.raises(ValueError, match="torch.fx cannot trace Untraceable"):
        find_layer(Untraceable())
    with pytest.raises(ValueError, match="no linear layer reads the data directly.*: 1"):
        find_layer(nn.Sequential(nn.Sigmoid(), nn.Linear(3, 4), nn.ReLU()))
    assert find_layer(nn.Sequential(nn.Sigmoid(), nn.Linear(3, 4), nn.ReLU()), "1").name == "1"


def test_a_model_is_traced_once_for_all_attacks_within_one_memory(monkeypatch):
    problem, traced = make(3, 40, 30, 3), []
    monkeypatch.setattr(tracing, "trace", lambda *given: traced.append(given) or trace(*given))
    with remembered():
        first, second = (attack(problem.model, problem.update) for _ in range(2))
    assert first.complete
    assert torch.equal(first.inputs, second.inputs)
    within = len(traced)
    attack(problem.model, problem.update)
    assert len(traced) == 2 * within > 0
