"""A batch that explains its update is returned whole: inputs known less well than a certificate needs, uncertified."""

import pytest
import torch
from problems import batch

import spear
from spear import models
from spear.federated import SharedUpdate, gradient
from spear.metrics import evaluate


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [1e-3, 3e-4])
def test_small_steps_of_single_precision(rate, seed):
    x, y = batch(10, 300, seed=seed, dtype=torch.float32)
    model = models.fcnn((300,), 200, 3, 10, seed=seed, dtype=torch.float32)
    sent = gradient(model, x, y)
    change = {n: p.detach() - (p.detach() - rate * sent.gradients[n]) for n, p in model.named_parameters()}
    result = spear.attack(model, SharedUpdate(change, learning_rate=rate, count=10), method="network", time_limit=30)
    report = evaluate(result, x, y)
    assert len(result.inputs) == 10, result.reason
    assert report.precision == 1
    if result.expected_error is None:
        bound = result.error_bound[report.match]
        assert bool((report.relative_error <= bound).all())
        assert bool((result.certified == (result.error_bound <= result.limit)).all())
