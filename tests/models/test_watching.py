"""What passes through a layer is seen as it passes, and nothing is left behind."""

import pytest
import torch
from torch import nn

from spear import models
from spear.models.watching import linear_layer, watched


def test_each_use_is_seen_and_no_hook_stays():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    with watched(layer) as seen:
        result = model(x)
    model(x)
    (first, between), (second, last) = seen
    assert torch.equal(first, x)
    assert torch.equal(second, between.relu())
    assert torch.equal(last, result)
    with pytest.raises(RuntimeError), watched(layer) as seen:
        model(torch.zeros(2, 4))
    assert seen == []
    assert not layer._forward_hooks


def test_a_layer_is_found_by_its_name_or_the_names_are_told():
    model = models.fcnn((4,), 5, 2, 3)
    assert linear_layer(model, "fc2") is model.fc2
    with pytest.raises(ValueError, match="no linear layer named 'flatten'; the model has fc1, fc2"):
        linear_layer(model, "flatten")
    with pytest.raises(ValueError, match="no linear layer named ''; the model has none"):
        linear_layer(nn.ReLU(), "")
