"""Laws of the fully connected networks."""

import pytest
import torch
from torch import nn

from spear import models


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_depth_counts_linear_layers(depth, bias):
    model = models.fcnn((3, 4, 4), width=7, depth=depth, classes=5, bias=bias)
    linear = [module for module in model if isinstance(module, nn.Linear)]
    assert [x.in_features for x in linear] == [48, *[7] * (depth - 1)]
    assert [x.out_features for x in linear] == [*[7] * (depth - 1), 5]
    assert sum(isinstance(module, nn.ReLU) for module in model) == depth - 1
    assert all((x.bias is not None) == bias for x in linear)
    assert model(torch.zeros(2, 3, 4, 4, dtype=torch.float64)).shape == (2, 5)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    first = models.fcnn((9,), 5, 2, 3, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    again, other = models.fcnn((9,), 5, 2, 3, seed=4), models.fcnn((9,), 5, 2, 3, seed=5)
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)


def test_initialisation_is_torchs():
    torch.manual_seed(3)
    expected = nn.Linear(9, 5, dtype=torch.float64)
    assert torch.equal(models.fcnn((9,), 5, 2, 3, seed=3).fc1.weight, expected.weight)


@pytest.mark.parametrize(
    ("shape", "width", "depth", "classes", "message"),
    [
        ((4,), 5, 0, 3, "depth of at least 1"),
        ((4,), 0, 2, 3, "must be positive"),
        ((4, 0), 5, 2, 3, "must be positive"),
    ],
)
def test_refused(shape, width, depth, classes, message):
    with pytest.raises(ValueError, match=message):
        models.fcnn(shape, width, depth, classes)


def test_activations_take_the_place_of_relu():
    model = models.fcnn((4,), 5, 3, 2, activation=nn.GELU)
    assert [type(module).__name__ for module in model] == ["Flatten", "Linear", "GELU", "Linear", "GELU", "Linear"]
    assert torch.equal(model.fc1.weight, models.fcnn((4,), 5, 3, 2).fc1.weight)
