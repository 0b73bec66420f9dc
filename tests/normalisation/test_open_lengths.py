"""Lengths of inputs behind a normalisation or dropout: certified where more tells them than the biases' gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import spear
from spear.certificate import BY_BIASES
from spear.federated import SharedUpdate, gradient


def at_rates(update: SharedUpdate, weights: float, biases: float) -> SharedUpdate:
    rates = {name: biases if name.endswith("bias") else weights for name in update.gradients}
    return replace(update, gradients={name: g * rates[name] for name, g in update.gradients.items()})


def off(result: spear.Reconstruction, x: Tensor) -> Tensor:
    """Of each certified input, the relative distance to the nearest true one over its bound."""
    apart = torch.cdist(result.inputs.flatten(1).double(), x.flatten(1).double()).amin(1) / x.double().norm(dim=1).min()
    return (apart / result.error_bound)[result.certified]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("zero", [True, False])
def test_behind_a_normalisation(zero, activation, norm):
    """It takes the length of all that enters it away, but for its epsilon and the biases."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 96), norm(96), activation(), nn.Linear(96, 5)).float()
    if zero:
        nn.init.zeros_(model[0].bias)
    x, y = 10 * torch.randn(4, 20), torch.arange(4)
    update = gradient(model, x, y)
    twice = replace(update, gradients=update.gradients | {"0.bias": 2 * update.gradients["0.bias"]})
    for sent in (update, twice):
        result = spear.attack(model, sent, method="network", time_limit=20)
        assert bool((off(result, x) <= 1).all())
        if zero:
            assert len(result.inputs) == 4
            assert BY_BIASES in result.reason
    assert zero or spear.attack(model, update, method="network", time_limit=20).complete


@pytest.mark.parametrize(("outputs", "loss"), [(2, "cross_entropy"), (1, "binary_cross_entropy")])
def test_one_sample_of_two_classes_behind_dropout(outputs, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, outputs)).double().train()
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[3].bias)
    x = torch.randn(1, 20, dtype=torch.float64)
    update = at_rates(gradient(model, x, torch.tensor([1]), loss=loss), 1.0, 2.0)
    result = spear.attack(model, update, time_limit=20)
    assert not result.certified.any()
    assert "two classes" in result.reason


@pytest.mark.parametrize("rates", [(0.5, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("silent", [1e-10, 1e4])
@pytest.mark.parametrize(("outputs", "b"), [(2, 1), (5, 1), (5, 4)])
def test_behind_dropout_where_labels_say_nothing(outputs, b, silent, rates):
    """Logits near zero, or a softmax that is sure of other classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 96), nn.ReLU(), nn.Dropout(0.3), nn.Linear(96, outputs)).double().train()
    with torch.no_grad():
        model[0].bias.zero_(), model[3].bias.zero_(), model[3].weight.mul_(silent)
    x = torch.randn(b, 20, dtype=torch.float64)
    update = gradient(model, x, model(x).argmin(1))
    result = spear.attack(model, at_rates(update, *rates), time_limit=20)
    assert not result.certified.any()


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("outputs", [2, 5])
def test_behind_batch_norm_weights_at_half_the_rate_are_no_batchs(outputs, zero):
    """Its γ and η and its weights no longer belong together; it raised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, outputs)).double().train()
    if zero:
        nn.init.zeros_(model[0].bias)
        nn.init.zeros_(model[3].bias)
    x, y = torch.randn(4, 20, dtype=torch.float64), torch.randint(outputs, (4,))
    result = spear.attack(model, at_rates(gradient(model, x, y), 0.5, 1.0), method="network", time_limit=20)
    assert not result.certified.any()
