"""Conditions that the network method finds out by itself: trained and saturated networks, other losses, float32."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from network_problems import Case, assert_labels, case, errors
from torch import nn

from spear import data, metrics, models
from spear.federated import gradient
from spear.inversion import attack
from spear.network import whole_batch
from spear.reconstruction import Budget, Terms


def trained(
    kind: str, steps: int, depth: int, rate: float | None = None
) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A network on digits after `steps` mini-batches of 32, and 20 images that it has not seen."""
    inputs, labels = data.load("digits", count=500)
    model = models.fcnn(inputs.shape[1:], 120, depth, 10)
    rate = rate or {"sgd": 0.1, "adam": 1e-3}[kind]
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(20, 500, (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[index]), labels[index]).backward()
        optimizer.step()
    return model, inputs[:20], labels[:20]


def strengths(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|p - e| of every sample: how strong a trace it leaves."""
    with torch.no_grad():
        return (model(x).softmax(1) - F.one_hot(y, 10)).norm(dim=1)


@pytest.mark.parametrize(
    ("kind", "steps", "depth"),
    [("sgd", 1000, 2), ("sgd", 0, 3), ("sgd", 100, 3), ("sgd", 1000, 3), ("adam", 10, 3), ("adam", 1000, 3)],
)
def test_trained_networks(kind, steps, depth):
    model, x, y = trained(kind, steps, depth)
    result = attack(model, gradient(model, x, y), method="network", time_limit=300)
    report = metrics.evaluate(result, x, y)
    assert report.precision == 1
    assert report.recovered[strengths(model, x, y) > 1e-5].all(), result.reason
    assert result.complete or "every layer" not in result.reason


@pytest.mark.parametrize(("depth", "rate"), [(2, 0.03), (3, 0.01)])
def test_saturated_networks_give_every_visible_sample_and_count_the_others(depth, rate):
    model, x, y = trained("adam", 300, depth, rate)
    update = gradient(model, x, y)
    strong = strengths(model, x, y)
    assert strong.min() < 1e-10 < 0.1 < strong.max()
    result = attack(model, update, method="network", time_limit=300)
    report = metrics.evaluate(result, x, y)
    assert report.precision == 1
    assert report.recovered[strong > 1e-2 * strong.max()].all(), result.reason
    assert not result.complete


def saturated(seed, count, spread, draw=torch.rand):
    """One hidden layer of large weights and no biases: a softmax that knows two classes only."""
    generator = torch.Generator().manual_seed(seed)
    x = draw(count, 150, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (count,), generator=generator)
    model = models.fcnn((150,), 300, 2, 10, dtype=torch.float64)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread
        parameter.data = values if parameter.dim() > 1 else torch.zeros_like(values)
    return model, x, y


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_large_weights_whose_softmax_knows_two_classes(seed, draw):
    model, x, y = saturated(seed, 40, 1.0, draw)
    strong = strengths(model, x, y)
    result = attack(model, gradient(model, x, y), method="network", time_limit=300)
    report = metrics.evaluate(result, x, y)
    assert report.precision == 1
    assert report.recovered[strong > 1e-5 * strong.max()].all(), result.reason


@pytest.mark.parametrize("seed", [0, 1, 3, 5, 6, 9])
def test_samples_of_a_billionth_of_the_strongest_gradient(seed):
    """Single noise-ridden directions, and a softmax that multiplies the rounding of its logits."""
    model, x, y = saturated(seed, 60, 0.7)
    strong = strengths(model, x, y)
    faint = (strong > 1e-9 * strong.max()) & (strong < 1e-6 * strong.max())
    assert faint.any()
    result = attack(model, gradient(model, x, y), method="network", time_limit=300)
    report = metrics.evaluate(result, x, y)
    assert report.precision == 1
    assert report.recovered[strong > 1e-9 * strong.max()].all(), result.reason


@pytest.mark.parametrize("seed", range(3))
def test_large_weights_in_a_crowd_from_which_solved_samples_leave(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(50, 150, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (50,), generator=generator)
    model = models.fcnn((150,), 120, 3, 10, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    result = attack(model, gradient(model, x, y), method="network", time_limit=300)
    assert metrics.evaluate(result, x, y).precision == 1


@pytest.mark.parametrize("sizes", [(60, 120), (60, 120, 120)])
@pytest.mark.parametrize("outputs", [1, 2, 10])
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize(("reduction", "known"), [("mean", False), ("sum", True)])
def test_other_losses(loss, outputs, sizes, reduction, known):
    made = case((*sizes, outputs), 20, seed=1, loss=loss, reduction=reduction, known=known)
    found = whole_batch.distinct_samples(made.problem, Terms(Budget(20.0)))
    assert found.complete == known, found.reason
    assert errors(found.inputs, made.inputs).max() < 1e-9
    assert_labels(made, found)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_one_output_through_the_front_door(loss):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 40, generator=generator, dtype=torch.float64), torch.arange(12) % 2
    x[3] = x[1]
    model = models.fcnn((40,), 100, 3, 1)
    result = attack(model, gradient(model, x, y, loss=loss), method="network")
    report = metrics.evaluate(result, x, y)
    assert (report.recall, report.precision, report.label_accuracy) == (1, 1, 1)


def test_without_biases_other_losses_are_a_refusal():
    found = whole_batch.distinct_samples(case((60, 120, 120, 4), 10, bias=False, loss="squared_error").problem, Terms())
    assert (len(found.inputs), found.complete) == (0, False)
    assert found.reason == (
        "without biases the scale of an image shows in the softmax alone; the loss is squared_error"
    )


def permuted(made: Case, order: torch.Tensor) -> Case:
    """The same client with its classes in another order."""
    p = made.problem
    swap = lambda parts: (*parts[:-1], parts[-1][order])  # noqa: E731
    parts = (swap(p.weights), swap(p.biases), swap(p.weight_gradients), swap(p.bias_gradients))
    return Case(
        replace(p, **dict(zip(("weights", "biases", "weight_gradients", "bias_gradients"), parts, strict=True))),
        made.inputs,
        order.argsort()[made.labels],
    )


@pytest.mark.parametrize("sizes", [(60, 120, 10), (60, 120, 120, 10)])
def test_permuting_classes_permutes_labels(sizes):
    made = permuted(case(sizes), torch.randperm(10, generator=torch.Generator().manual_seed(4)))
    found = whole_batch.distinct_samples(made.problem, Terms(Budget(20.0)))
    assert found.complete, found.reason
    assert errors(found.inputs, made.inputs).max() < 1e-9
    assert_labels(made, found)


@pytest.mark.parametrize("seed", range(3))
def test_single_precision_gives_certain_samples_while_others_are_missing(seed):
    made = case((60, 250, 250, 10), 50, seed=seed, dtype=torch.float32)
    found = whole_batch.distinct_samples(made.problem, Terms(Budget(proposals=1)))
    assert not found.complete
    assert 0 < len(found.inputs) < 50
    assert (errors(made.inputs, found.inputs) < 1e-3).all()
    assert_labels(made, found, 1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_one_hidden_layer_gives_certain_samples_while_a_few_others_are_missing(seed):
    """Each missing sample costs one equation of the softmax: ten classes bear six."""
    made = case((60, 160, 40), 40, seed=seed)
    found = whole_batch.distinct_samples(made.problem, Terms(Budget(proposals=1)))
    assert not found.complete
    assert 0 < len(found.inputs) < 40, found.reason
    assert (errors(made.inputs, found.inputs) < 1e-6).all()
    assert_labels(made, found)
    assert not found.certified.any()
    assert f"found one by one: {len(found.inputs)} sample" in found.reason


@pytest.mark.parametrize("sizes", [(60, 200, 1000), (60, 200, 200, 1000)])
@pytest.mark.parametrize("known", [True, False])
def test_a_thousand_classes_on_a_narrow_layer(sizes, known):
    """More classes than units: the space of all h says nothing, one h for each class does."""
    made = case(sizes, 20, known=known)
    found = whole_batch.distinct_samples(made.problem, Terms(Budget(20.0)))
    assert found.complete == known, found.reason
    assert errors(found.inputs, made.inputs).max() < 1e-9
    assert_labels(made, found)


def test_pairs_of_nearly_equal_images_are_not_certified_as_their_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, generator=generator, dtype=torch.float64).repeat(2, 1)
    x[1] += 1e-4
    made = case((2, 39, 2), inputs=x, labels=torch.tensor([1, 1]), known=False)
    assert not whole_batch.distinct_samples(made.problem, Terms()).certified.any()


@pytest.mark.parametrize("known", [True, False])
def test_two_nearly_equal_images_with_two_labels_are_not_one_with_a_smoothed_label(known):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 2, generator=generator, dtype=torch.float64).repeat(2, 1)
    x[1] += 3e-3
    made = case((2, 13, 19, 2), seed=4, inputs=x, labels=torch.tensor([0, 1]), known=known)
    assert not whole_batch.distinct_samples(made.problem, Terms()).certified.any()
