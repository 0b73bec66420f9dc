"""The clients that notebooks attack: the same as the lines that a reader would write."""

import pytest
import torch
from torch import nn

from spear import data, federated, models, study


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_a_client_is_its_lines_by_hand(dtype, activation):
    sent = study.client("digits", 3, width=20, depth=3, seed=4, activation=activation, dtype=dtype)
    inputs, labels = data.load("digits", count=3, seed=4)
    classes = len(data.classes("digits"))
    model = models.fcnn(inputs.shape[1:], 20, 3, classes, activation=activation, seed=4, dtype=dtype)
    update = federated.gradient(model, inputs.to(dtype), labels)
    assert torch.equal(sent.inputs, inputs.to(dtype))
    assert torch.equal(sent.labels, labels)
    for name, weight in model.state_dict().items():
        assert torch.equal(sent.model.state_dict()[name], weight)
    for name, g in update.gradients.items():
        assert torch.equal(sent.update.gradients[name], g)
    assert (sent.update.count, sent.update.input_shape) == (3, (1, 8, 8))


def test_a_network_fits_its_data_set():
    model = study.network("photos", width=7, depth=2, seed=1)
    assert model(data.load("photos", count=2)[0]).shape == (2, len(data.classes("photos")))
    assert torch.equal(model.fc1.weight, study.client("photos", 2, width=7, depth=2, seed=1).model.fc1.weight)


def test_bad_clients():
    with pytest.raises(ValueError, match="unknown data set 'letters'"):
        study.client("letters", 2, width=5, depth=2, seed=0)
    with pytest.raises(ValueError, match="depth of at least 1"):
        study.network("digits", width=5, depth=0, seed=0)
