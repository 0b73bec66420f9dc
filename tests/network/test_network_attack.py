"""`method="network"` through the front door: models, updates, the Reconstruction."""

import pytest
import torch
from torch import nn

from spear import data, metrics
from spear.federated import SharedUpdate, gradient
from spear.inversion import attack
from spear.models import fcnn


def batch(count: int = 16, classes: int = 10, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64), torch.randint(
        classes, (count,), generator=generator
    )


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_whole_batch(depth, reduction):
    model = fcnn((1, 8, 8), 120, depth, 10, seed=1)
    x, y = batch()
    result = attack(model, gradient(model, x, y, reduction=reduction), method="network")
    report = metrics.evaluate(result, x, y)
    assert result.complete, result.reason
    assert (report.recall, report.precision, report.label_accuracy) == (1, 1, 1)
    assert result.inputs.shape == x.shape


def test_repeated_images_are_returned_as_often():
    model = fcnn((1, 8, 8), 120, 3, 10)
    x, y = batch()
    x[1], x[2], y[2] = x[0], x[0], (y[0] + 1) % 10
    result = attack(model, gradient(model, x, y), method="network")
    assert (len(result.inputs), result.rank) == (16, 14)
    assert metrics.evaluate(result, x, y).recall == 1
    assert torch.equal(result.labels.bincount(minlength=10), y.bincount(minlength=10))


def test_any_traceable_chain():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(90, 5).double(), nn.Linear(64, 90).double()
            self.drop = nn.Dropout()

        def forward(self, x):
            return self.second(self.drop(torch.relu(self.first(x.flatten(1)))))

    torch.manual_seed(0)
    model = Chain().eval()
    x, y = batch(classes=5)
    result = attack(model, gradient(model, x, y), method="network")
    assert metrics.evaluate(result, x, y).recall == 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [nn.Linear(64, 30), nn.Softmax(1), nn.Linear(30, 5)],
            "with elementwise activations between them; behind 1 comes 2 \\(Softmax\\)",
        ),
        ([nn.Linear(64, 30), nn.Linear(30, 5)], "needs one chain of linear layers with elementwise activations"),
        ([nn.Linear(64, 5)], "needs a hidden layer"),
    ],
)
def test_other_models_are_an_error_that_says_why(layers, message):
    model = nn.Sequential(nn.Flatten(), *layers).double()
    x, y = batch(4, 5)
    with pytest.raises(ValueError, match=message):
        attack(model, gradient(model, x, y), method="network")


def test_a_layer_cannot_be_chosen():
    model = fcnn((1, 8, 8), 120, 3, 10)
    x, y = batch(4)
    with pytest.raises(ValueError, match="layer='fc2' cannot be chosen"):
        attack(model, gradient(model, x, y), method="network", layer="fc2")


def test_a_missing_gradient_is_named():
    model = fcnn((1, 8, 8), 120, 3, 10)
    x, y = batch(4)
    update = gradient(model, x, y)
    kept = {name: g for name, g in update.gradients.items() if name != "fc2.weight"}
    with pytest.raises(ValueError, match=r"the update has none for fc2\.weight"):
        attack(model, SharedUpdate(kept), method="network")


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_two_classes_never_give_a_label_or_an_image_that_is_none(copies, seed):
    """With two classes any two numbers look like smoothed labels; copies are not certified."""
    x, y = batch(2 + seed % 3, 2, seed)
    if copies:
        x[-1] = x[0]
    model = fcnn((1, 8, 8), 30, 3, 2, seed=seed)
    result = attack(model, gradient(model, x, y, reduction="sum"), method="network", time_limit=5)
    assert result.inputs.isfinite().all()
    assert not (copies and result.certified.any())
    assert result.labels is None or len(result.labels) == len(result.inputs)
    assert metrics.evaluate(result, x, y).precision == 1


@pytest.mark.parametrize("seed", [2, 4])
def test_mixtures_that_the_last_hidden_layer_takes_for_samples_do_not_end_the_attack(seed):
    """Deep in a network masks resemble each other so much that mixtures of samples fit it as well as samples do."""
    inputs, labels = data.load("photos", count=8, seed=seed)
    model = fcnn((3, 32, 32), 200, 8, 7, seed=seed)
    result = attack(model, gradient(model, inputs, labels), method="network")
    report = metrics.evaluate(result, inputs, labels)
    assert result.complete, result.reason
    assert report.recall == report.precision == report.label_accuracy == 1


@pytest.mark.parametrize("seed", range(2))
def test_more_samples_than_inputs_are_told_apart_by_the_layers_above(seed):
    x, y = batch(70, seed=seed)  # of 64 entries each
    model = fcnn((1, 8, 8), 160, 3, 10, seed=seed)
    report = metrics.evaluate(attack(model, gradient(model, x, y), method="network"), x, y)
    assert (report.recall, report.precision) == (1, 1)
