"""Prior attacks: each where it is known to work, and honest about what it cannot vouch for."""

import math

import pytest
import torch
from problems import batch
from torch import nn

from spear import data, metrics, models
from spear.baselines import gradient_matching
from spear.baselines.closed_form import closed_form, infer_labels
from spear.baselines.gradient_matching import dlg, inverting_gradients
from spear.baselines.server import Trial, server_of, uncertified
from spear.federated import SharedUpdate, gradient
from spear.models.tracing import linear_layers
from spear.reconstruction import Stats

DIGITS = (1, 8, 8)


def smooth_network(seed=0, hidden=40):
    """A sigmoid network on digits: twice differentiable, as DLG asks."""
    model = models.fcnn(DIGITS, hidden, 2, 10, seed=seed)
    model.relu1 = nn.Sigmoid()
    return model


def digits_problem(count, *, width=100, seed=0, reduction="mean"):
    inputs, labels = data.load("digits", count=count, seed=seed)
    model = models.fcnn(DIGITS, width, 3, 10, seed=seed)
    return model, inputs, labels, gradient(model, inputs, labels, reduction=reduction)


def mean_image_psnr(inputs, count=300):
    """PSNR of guessing the mean image of the data set: what knows the data but not the gradient."""
    average = data.load("digits", count=count, seed=99)[0].mean(0).expand(len(inputs), *DIGITS)
    guess = uncertified(Trial(average, torch.zeros(len(inputs), dtype=torch.long), 0.0), "", Stats(0.0))
    return metrics.evaluate(guess, inputs).psnr


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_truth_has_no_distance(reduction):
    model, inputs, labels, update = digits_problem(3, reduction=reduction)
    server = server_of(model, update, None, None, None)
    soft = nn.functional.one_hot(labels, 10).double()
    for distance in (server.squared_distance, server.cosine_distance):
        assert abs(distance(inputs, labels).item()) < 1e-12
        assert abs(distance(inputs, soft).item()) < 1e-12
        assert distance(inputs.roll(1, 3), labels).item() > 1e-3


def test_distances_are_the_textbook_ones():
    model, inputs, labels, update = digits_problem(2)
    other = inputs.flip(2)
    g = torch.cat([x.flatten() for x in gradient(model, other, labels).gradients.values()])
    seen = torch.cat([x.flatten() for x in update.gradients.values()])
    server = server_of(model, update, None, None, None)
    expected = float((g - seen).norm() ** 2 / seen.norm() ** 2), float(1 - g @ seen / g.norm() / seen.norm())
    assert server.squared_distance(other, labels).item() == pytest.approx(expected[0])
    assert server.cosine_distance(other, labels).item() == pytest.approx(expected[1])


def test_variation_is_the_textbook_one():
    x, _ = batch(2, 3 * 4 * 5)
    x = x.view(2, 3, 4, 5)
    across = [abs(float(x[i, c, h, w + 1] - x[i, c, h, w])) for i in range(2) for c in range(3) for h in range(4)
              for w in range(4)]  # fmt: skip
    down = [abs(float(x[i, c, h + 1, w] - x[i, c, h, w])) for i in range(2) for c in range(3) for h in range(3)
            for w in range(5)]  # fmt: skip
    expected = sum(across) / len(across) + sum(down) / len(down)
    assert float(gradient_matching.variation(x)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_dlg_recovers_a_digit_and_its_label_from_a_smooth_network(seed):
    inputs, labels = data.load("digits", count=1, seed=seed)
    model = smooth_network(seed)
    result = dlg(model, gradient(model, inputs, labels), steps=25, restarts=2, seed=1)
    report = metrics.evaluate(result, inputs, labels)
    assert float(report.relative_error.max()) < 1e-4
    assert report.label_accuracy == 1
    assert not result.certified.any()
    assert not result.complete


def test_idlg_recovers_two_digits():
    inputs, labels = data.load("digits", count=2, seed=0)
    model = smooth_network()
    update = gradient(model, inputs, labels)
    result = dlg(model, update, labels=infer_labels(model, update), steps=30)
    assert float(metrics.evaluate(result, inputs, labels).relative_error.max()) < 1e-3


@pytest.mark.parametrize("count", [1, 2])
def test_inverting_gradients_beats_the_mean_image_by_far(count):
    model, inputs, labels, update = digits_problem(count)
    result = inverting_gradients(model, update, steps=300)
    report = metrics.evaluate(result, inputs, labels)
    assert bool((report.psnr > mean_image_psnr(inputs) + 10).all())
    assert report.label_accuracy == 1
    assert not result.certified.any()
    assert not result.complete


def test_images_stay_within_bounds():
    model, _, _, update = digits_problem(1)
    low, high = torch.tensor(-0.3), torch.tensor(0.2)
    result = inverting_gradients(model, update, steps=5, bounds=(low, high))
    assert float(result.inputs.min()) == pytest.approx(-0.3)
    assert float(result.inputs.max()) == pytest.approx(0.2)


def test_a_prior_on_images_smooths():
    model, _, _, update = digits_problem(1)
    plain, smooth = (inverting_gradients(model, update, steps=60, total_variation=w).inputs for w in (0, 1.0))
    assert float(gradient_matching.variation(smooth)) < 0.5 * float(gradient_matching.variation(plain))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.GELU])
def test_the_closed_form_is_exact_for_one_sample(seed, activation):
    inputs, labels = data.load("photos", count=1, seed=seed)
    model = models.fcnn(inputs.shape[1:], 30, 2, 10, seed=seed)
    model.relu1 = activation()
    result = closed_form(model, gradient(model, inputs, labels))
    report = metrics.evaluate(result, inputs, labels)
    assert float(report.relative_error) < 1e-12
    assert report.label_accuracy == 1
    assert result.inputs.shape == inputs.shape
    assert not result.certified.any()


def test_the_closed_form_of_a_deeper_layer_gives_its_features():
    model, inputs, _, update = digits_problem(1)
    features = model.relu1(model.fc1(inputs.flatten(1)))
    torch.testing.assert_close(closed_form(model, update, layer="fc2").inputs, features.detach())


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_label_is_inferred_whatever_the_weights(scale, seed, reduction):
    x, y = batch(1, 30, seed=seed)
    model = models.fcnn((30,), 40, 3, 10, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    assert infer_labels(model, gradient(model, x, y, reduction=reduction)).tolist() == y.tolist()


@pytest.mark.parametrize("count", [2, 8, 20])
@pytest.mark.parametrize("seed", range(3))
def test_labels_of_a_batch_are_inferred_before_training(count, seed):
    x, y = batch(count, 50, seed=seed)
    model = models.fcnn((50,), 60, 4, 10, seed=seed)
    assert infer_labels(model, gradient(model, x, y)).tolist() == y.sort().values.tolist()


@pytest.mark.parametrize("method", [dlg, inverting_gradients])
def test_the_seed_decides_and_the_reduction_does_not_matter(method):
    model, _, _, update = digits_problem(2)
    *_, total = digits_problem(2, reduction="sum")
    first, again, other = (method(model, update, steps=3, seed=s).inputs for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(method(model, total, steps=3, seed=5).inputs, first)


@pytest.mark.parametrize("method", [dlg, inverting_gradients])
def test_the_nearest_start_is_kept(method):
    model, _, labels, update = digits_problem(2)
    server = server_of(model, update, None, None, None)
    distance = server.squared_distance if method is dlg else server.cosine_distance
    reached = []
    for restarts in (1, 3):
        result = method(model, update, labels=labels, steps=4, restarts=restarts)
        reached.append(distance(result.inputs, result.labels).item())
        assert (result.stats.proposals, result.stats.rounds) == (restarts, 4 * restarts)
    assert reached[1] <= reached[0]


@pytest.mark.parametrize("method", [dlg, inverting_gradients])
def test_precision_progress_and_time_limit(method):
    model, inputs, _, update = digits_problem(2)
    seen = []
    result = method(model, update, steps=500, restarts=9, time_limit=0, dtype=torch.float32, progress=seen.append)
    assert result.inputs.dtype == torch.float32
    assert result.inputs.shape == inputs.shape
    assert result.stats.rounds == len(seen) == 1
    assert (seen[0].found, seen[0].rank, seen[0].proposals) == (0, 2, 1)
    assert next(model.parameters()).dtype == torch.float64
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_start_that_diverges_is_left_and_its_best_returned():
    model, _, _, update = digits_problem(1)
    huge = SharedUpdate({k: 1e30 * g for k, g in update.gradients.items()}, count=1, input_shape=DIGITS)
    result = dlg(model, huge, steps=3, dtype=torch.float32)  # whose squares overflow
    assert result.stats.rounds <= 3
    assert result.inputs.shape == (1, *DIGITS)
    assert "distance" in result.reason


def test_bad_input():
    model, inputs, labels, update = digits_problem(2)
    bare = SharedUpdate(update.gradients)
    with pytest.raises(ValueError, match="does not disclose its batch size: give batch_size"):
        dlg(model, bare)
    with pytest.raises(ValueError, match="does not disclose the shape of a sample"):
        dlg(model, bare, batch_size=2)
    with pytest.raises(ValueError, match="a batch has at least 1 sample, not 0"):
        dlg(model, update, batch_size=0)
    with pytest.raises(ValueError, match="1 labels for a batch of 2"):
        inverting_gradients(model, update, labels=labels[:1])
    with pytest.raises(ValueError, match="at least 1 step and 1 start, not 0 and 1"):
        inverting_gradients(model, update, steps=0)
    with pytest.raises(ValueError, match="not the gradient of one sample"):
        closed_form(model, update)
    with pytest.raises(ValueError, match="needs the gradients of weight and bias of fc9"):
        closed_form(model, update, layer="fc9")
    rows, _ = batch(2, 30)
    plain = models.fcnn((30,), 40, 2, 10)
    with pytest.raises(ValueError, match="total variation is of images, not of samples of shape \\(30,\\)"):
        inverting_gradients(plain, gradient(plain, rows, labels))
    unbiased = models.fcnn(DIGITS, 20, 2, 10, bias=False)
    with pytest.raises(ValueError, match="inferred from the bias gradient of fc2"):
        infer_labels(unbiased, gradient(unbiased, inputs, labels))
    with pytest.raises(ValueError, match="gradient of fc1.weight has shape"):
        dlg(models.fcnn(DIGITS, 20, 3, 10), update)


def test_every_layer_of_the_model_is_matched():
    model, _, _, update = digits_problem(1)
    server = server_of(model, update, None, None, None)
    assert len(server.observed) == 2 * len(linear_layers(model))
    assert math.isclose(sum(p.numel() for p in server.parameters), sum(g.numel() for g in update.gradients.values()))
