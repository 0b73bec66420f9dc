"""Local training retraced step by step: every sample, in any order of the later epochs, or an honest end."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import batch

from spear import attack, data, metrics, models
from spear.deployments import simulation
from spear.deployments.local_training import retrace
from spear.federated import SharedUpdate, clients, gradient
from spear.network.problem import open_network
from spear.reconstruction import Budget, Terms


def _client(b: int = 8, m: int = 150, n: int = 60, seed: int = 0):
    inputs, labels = batch(b, n, seed=seed)
    return models.fcnn((n,), m, 3, 10, seed=seed), inputs, labels


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mini_batch", [8, 4, 3])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_every_sample_of_local_training(mini_batch, epochs, rate):
    model, inputs, labels = _client()
    update = clients.local_training(model, inputs, labels, epochs=epochs, mini_batch=mini_batch, learning_rate=rate)
    result = attack(model, update)
    seen = metrics.evaluate(result, inputs, labels)
    assert result.complete, result.reason
    assert (seen.recall, seen.precision, seen.label_accuracy) == (1, 1, 1)


@pytest.mark.parametrize("options", [{"shuffle": True}, {"momentum": 0.9}, {"shuffle": True, "momentum": 0.5}])
def test_shuffled_epochs_and_momentum(options):
    model, inputs, labels = _client(seed=1)
    update = clients.local_training(
        model, inputs, labels, epochs=2, mini_batch=4, learning_rate=0.05, generator=_generator(), **options
    )
    seen = metrics.evaluate(attack(model, update, method="network"), inputs, labels)
    assert (seen.recall, seen.precision, seen.label_accuracy) == (1, 1, 1)


def test_simulated_steps_are_the_clients():
    model, inputs, labels = _client()
    update = clients.local_training(model, inputs, labels, epochs=2, mini_batch=3, learning_rate=0.1, momentum=0.9)
    training = simulation.Training.of(update)
    problem = open_network(model, replace(update, local_steps=1, learning_rate=None))
    assert training.sizes == (3, 3, 2, 3, 3, 2)
    state, T = simulation.State(problem), torch.zeros(8, 150, dtype=torch.float64)
    for step, index in enumerate([*torch.arange(8).split(3)] * 2):
        state, deltas = state.after(inputs[index], labels[index], training)
        T[index] += training.scale(step) * deltas
    for k in range(3):
        change = problem.affine(k) - state.problem.affine(k)
        torch.testing.assert_close(change, problem.augmented(k), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(T.T @ inputs, problem.weight_gradients[0], rtol=1e-9, atol=1e-14)


@given(seed=st.integers(0, 1000), wrong=st.sampled_from(("rate", "momentum", "weights", "noise", "count")))
@settings(max_examples=8, deadline=None)
def test_a_false_story_is_never_certified(seed, wrong):
    model, inputs, labels = _client(b=4, m=60, n=40, seed=seed)
    update = clients.local_training(model, inputs, labels, epochs=2, mini_batch=2, learning_rate=0.05)
    if wrong == "rate":
        update = replace(update, learning_rate=0.04)
    elif wrong == "momentum":
        update = replace(update, momentum=0.3)
    elif wrong == "count":
        update = replace(update, count=2, local_steps=2)
    elif wrong == "weights":
        model = models.fcnn((40,), 60, 3, 10, seed=seed + 1)
    else:
        noise = {
            n: g + 1e-9 * torch.randn(g.shape, generator=_generator(seed), dtype=g.dtype)
            for n, g in update.gradients.items()
        }
        update = replace(update, gradients=noise)
    result = attack(model, update, time_limit=1)
    assert metrics.evaluate(result, inputs, labels).precision == 1


def test_too_many_samples_for_the_width_is_said():
    model, inputs, labels = _client(b=20, m=30)
    update = clients.local_training(model, inputs, labels, epochs=2, mini_batch=10)
    result = attack(model, update)
    assert not len(result.inputs)
    assert "20 samples in 4 steps need layers wider than 55; the narrowest has 30" in result.reason


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ({"mini_batch": None}, "mini_batch is not disclosed"),
        ({"count": None, "learning_rate": None}, "count and learning_rate are not disclosed"),
        ({"local_steps": 3}, "3 local steps are no whole epochs of 2 mini-batches"),
    ],
)
def test_what_a_simulation_needs(hidden, message):
    model, inputs, labels = _client()
    update = replace(clients.local_training(model, inputs, labels, epochs=2, mini_batch=4), **hidden)
    with pytest.raises(ValueError, match=message):
        attack(model, update)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_output_bias_without_a_change_is_said(frozen):
    model, inputs, labels = _client(b=4, m=60, n=40)
    model.fc3.bias.requires_grad_(not frozen)
    update = clients.local_training(model, inputs, labels, mini_batch=2)
    update = replace(update, gradients={name: g for name, g in update.gradients.items() if name != "fc3.bias"})
    said = retrace(model, update, None, None, Terms(Budget()))
    assert not len(said.inputs)
    assert "the update has no change of the output bias" in said.reason
    result = attack(model, update, time_limit=2)
    assert not result.certified.any()
    assert metrics.evaluate(result, inputs, labels).precision == 1


def test_aggregation_hides_nobody():
    model, inputs, labels = _client(b=12)
    parts = zip(inputs.split(4), labels.split(4), strict=True)
    update = clients.aggregated([gradient(model, x, y) for x, y in parts])
    result = attack(model, update)
    assert result.complete
    assert metrics.evaluate(result, inputs, labels).recall == 1


def test_small_steps_leave_enough_to_tell_them_apart():
    model, inputs, labels = _client()
    update = clients.local_training(model, inputs, labels, epochs=3, mini_batch=4, learning_rate=0.001)
    result = attack(model, update)
    assert result.complete, result.reason
    assert metrics.evaluate(result, inputs, labels).recall == 1


def _single(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, **options) -> SharedUpdate:
    return clients.local_training(model.float(), inputs.float(), labels, **options)


@pytest.mark.parametrize("mini_batch", [4, 3])
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_weights_in_single_precision_give_samples_with_their_expected_error(mini_batch, rate):
    off = []
    for seed in range(4):
        model, inputs, labels = _client(seed=seed)
        result = attack(model, _single(model, inputs, labels, learning_rate=rate, mini_batch=mini_batch))
        seen = metrics.evaluate(result, inputs.float(), labels)
        assert (seen.recall, seen.precision, seen.label_accuracy) == (1, 1, 1), result.reason
        assert not result.certified.any()
        assert "times the weights' rounding: expected relative error" in result.reason
        off.append(20 * torch.log10(result.expected_error[seen.match].double() / seen.relative_error))
    assert float((torch.cat(off).abs() < 3).double().mean()) >= 0.9


@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": 3, "shuffle": True}])
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_in_single_precision_steps_that_look_alike_cost_accuracy_and_the_error_says_so(options, rate):
    for seed in range(2):
        model, inputs, labels = _client(seed=seed)
        options = {"mini_batch": 4, "learning_rate": rate, "generator": _generator()} | options
        result = attack(model, _single(model, inputs, labels, **options))
        seen = metrics.evaluate(result, inputs.float(), labels)
        assert seen.label_accuracy == 1, result.reason
        assert not result.certified.any()
        assert (seen.relative_error < 1.41 * result.expected_error[seen.match]).double().mean() >= 0.9


def test_one_small_step_in_single_precision_is_a_gradient_with_noise():
    model, inputs, labels = _client(m=300)
    result = attack(model, _single(model, inputs, labels, learning_rate=1e-4))
    seen = metrics.evaluate(result, inputs, labels)
    assert not result.certified.any()
    assert (seen.label_accuracy, bool((seen.psnr > 40).all())) == (1, True), result.reason
    off = 20 * torch.log10(result.expected_error[seen.match] / seen.relative_error)
    assert float((off.abs() < 3).double().mean()) >= 0.9


def test_a_change_below_the_rounding_of_the_weights_is_lost():
    model, inputs, labels = _client()
    result = attack(model, _single(model, inputs, labels, learning_rate=1e-7, epochs=2))
    assert not len(result.inputs)
    assert "the change of the weights is lost in their rounding" in result.reason


@pytest.mark.parametrize("steps", [1, 7])
def test_the_rounding_of_weights(steps):
    weights = torch.randn(200, 100, generator=_generator(), dtype=torch.float64)
    change = 1e-4 * torch.randn(steps, 200, 100, generator=_generator(1), dtype=torch.float64)
    rounded = weights = weights.float()
    for step in change:
        rounded = (rounded.double() + step).float()
    error = rounded.double() - weights.double() - change.sum(0)
    expected = simulation.rounding(weights.double(), torch.finfo(torch.float32).eps, steps)
    assert float(error.std()) == pytest.approx(expected, rel=0.05)


def test_a_step_from_float64_weights_is_rounded_more_than_its_gradient():
    model, inputs, labels = _client()
    update = clients.local_training(model, inputs, labels, learning_rate=1e-5)
    problem = open_network(model, update)
    exact = gradient(model, inputs, labels).gradients["fc1.weight"]
    error = float((problem.weight_gradients[0] - exact).norm() / exact.norm())
    assert 2.0**-52 < error < 5 * problem.precision
    assert metrics.evaluate(attack(model, update), inputs, labels).recall == 1


@pytest.mark.parametrize(("mini_batch", "epochs", "rate"), [(5, 1, 0.001), (5, 2, 0.01), (20, 5, 0.001)])
def test_samples_that_random_starts_hardly_meet(mini_batch, epochs, rate):
    try:
        inputs, labels = data.load("mnist", count=20, seed=1)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = models.fcnn(inputs.shape[1:], 400, 3, 10, seed=1)
    options = {"mini_batch": mini_batch, "epochs": epochs, "learning_rate": rate}
    result = attack(model, clients.local_training(model, inputs, labels, **options))
    assert result.complete, result.reason
    assert metrics.evaluate(result, inputs, labels).recall == 1
