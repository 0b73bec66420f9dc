"""The search asks for zeros that mean something, and completes a batch whose last column the zeros do not determine."""

import pytest
import torch
from problems import batch, make

from spear import attack, models
from spear.federated import gradient
from spear.metrics import evaluate
from spear.metrics.truth import true_directions
from spear.published import filtering, sparsity
from spear.published.filtering import thresholds
from spear.published.view import open_layer

RATE = 1e-9


def nested(seed: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A batch of four in which sample 0 fires wherever sample 1 does, but for one neuron: one zero row tells 0 from a
    mixture with 1."""
    inputs, labels = batch(4, 30, seed=seed)
    model = models.fcnn((30,), 80, 3, 10, seed=seed)
    with torch.no_grad():
        z = model[:2](inputs)
        turned = ((z[0] < 0) & (z[1] > 0)).nonzero()[1:, 0]
        model.fc1.weight[turned] *= -1
        model.fc1.bias[turned] *= -1
    return model, inputs, labels


@pytest.mark.parametrize("seed", range(5))
def test_a_last_column_that_its_zeros_leave_open_is_settled_by_the_signs(seed):
    model, inputs, labels = nested(seed)
    update = gradient(model, inputs, labels)
    observed = open_layer(model, update).observed
    q = true_directions(observed, inputs)
    assert filtering.determined(observed.L, q).tolist() == [False, True, True, True]
    result = attack(model, update, method="sampling", max_proposals=100_000)
    report = evaluate(result, inputs, labels)
    assert result.complete, result.reason
    assert report.recall == report.precision == report.label_accuracy == 1


@pytest.mark.parametrize("dead", [0, 30, 60])
@pytest.mark.parametrize("seed", range(3))
def test_neurons_that_nobody_activates_do_not_count_as_zeros(dead, seed):
    inputs, labels = batch(5, 40, seed=seed)
    model = models.fcnn((40,), 120, 3, 10, seed=seed)
    with torch.no_grad():
        model.fc1.bias[:dead] = -100.0
    update = gradient(model, inputs, labels)
    observed = open_layer(model, update).observed
    live = observed.L.norm(dim=1) > 1e-9
    assert int(live.sum()) <= 120 - dead
    awake = observed.alive()
    assert torch.equal(awake.L, observed.L[live])
    assert torch.equal(awake.B, observed.B[live])
    usual, fewest = thresholds(awake, RATE)
    assert usual == max(sparsity.threshold(int(live.sum())), 5 + 2)
    assert 5 + 2 <= fewest <= usual
    result = attack(model, update, method="sampling", max_proposals=1_000_000)
    assert result.complete, result.reason
    assert evaluate(result, inputs, labels).recall == 1


def test_the_usual_threshold_is_that_of_half_zeros():
    assert thresholds(make(6, 80, 40).observed, RATE) == (sparsity.threshold(80), 2 * 6)
