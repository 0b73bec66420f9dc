"""SCAFFOLD's control variates, given, are taken off: the batch comes back as if they had not been added."""

from dataclasses import replace

import pytest
import torch
from problems import batch

import spear
from spear import models
from spear.federated import SharedUpdate, clients, gradient
from spear.federated.control import without_control


def client():
    x, y = batch(6, 40, 5)
    model = models.fcnn((40,), 120, 3, 5)
    generator = torch.Generator().manual_seed(1)
    control = {n: 1e-2 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    return model, x, y, control


@pytest.mark.parametrize("rate", [None, 0.1])
def test_a_step_with_control_variates(rate):
    model, x, y, control = client()
    plain = gradient(model, x, y)
    sent = SharedUpdate(
        {n: (rate or 1) * (g + control[n]) for n, g in plain.gradients.items()}, count=6, learning_rate=rate
    )
    assert "control variates" in spear.attack(model, sent, method="network", time_limit=20).reason
    result = spear.attack(model, without_control(sent, control), time_limit=20)
    assert result.complete, result.reason
    assert spear.metrics.evaluate(result, x, y).recall == 1


def test_several_steps_add_it_as_often():
    model, x, y, control = client()
    plain = clients.local_training(model, x, y, epochs=2, learning_rate=0.1)
    sent = replace(plain, gradients={n: g + 0.2 * control[n] for n, g in plain.gradients.items()})
    less = without_control(sent, control)
    assert all(torch.allclose(less.gradients[n], g) for n, g in plain.gradients.items())
    with pytest.raises(ValueError, match="with momentum"):
        without_control(replace(sent, momentum=0.9), control)


def test_control_variates_that_do_not_fit():
    model, x, y, control = client()
    sent = gradient(model, x, y)
    with pytest.raises(ValueError, match=r"control variate of fc1.bias has shape \(1,\), its gradient \(120,\)"):
        without_control(sent, control | {"fc1.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="do not both have 'other'"):
        without_control(sent, control | {"other": torch.zeros(1)})
