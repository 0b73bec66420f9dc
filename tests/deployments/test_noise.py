"""Noisy updates: what comes out of them, how well that is known, and that nothing of it is ever certified."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import batch, permuted_neurons

from spear import attack, data, metrics, models
from spear.deployments.spectrum import scaled
from spear.federated import defences, gradient, privacy
from spear.network.problem import open_network


def _client(b: int = 8, m: int = 150, n: int = 120, depth: int = 3, seed: int = 0):
    inputs, labels = batch(b, n, seed=seed)
    return models.fcnn((n,), m, depth, 10, seed=seed), inputs, labels


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _honest(result, inputs, labels) -> metrics.Evaluation:
    """Nothing certified, all found, and the expected errors within 3 dB of the true ones on 90 % of the samples."""
    seen = metrics.evaluate(result, inputs, labels)
    assert not result.certified.any()
    assert not result.complete
    assert (seen.match >= 0).all(), result.reason
    off = 20 * torch.log10(seen.relative_error / result.expected_error[seen.match])
    assert (off.abs() < 3).double().mean() >= 0.9, off
    return seen


@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2, 0.05])
@pytest.mark.parametrize("seed", [0, 1])
def test_noise_of_unknown_level(sigma, seed):
    model, inputs, labels = _client(seed=seed)
    clean = gradient(model, inputs, labels)
    update = replace(defences.noisy(clean, sigma, relative=True, generator=_generator(seed)), count=None)
    result = attack(model, update)
    seen = _honest(result, inputs, labels)
    assert result.rank == 8
    assert seen.label_accuracy == 1
    assert float(seen.relative_error.median()) < 40 * sigma


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, inputs, labels = _client()
    result = attack(model, defences.half_precision(gradient(model, inputs, labels), dtype))
    seen = _honest(result, inputs, labels)
    assert float(seen.relative_error.max()) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_half_precision_that_was_widened_again(dtype, wide):
    model, inputs, labels = _client()
    sent = defences.half_precision(gradient(model, inputs, labels), dtype)
    widened = {name: g.to(wide) / sent.loss_scale for name, g in sent.gradients.items()}
    seen = _honest(attack(model, replace(sent, gradients=widened, loss_scale=1.0)), inputs, labels)
    assert float(seen.relative_error.max()) < 20 * torch.finfo(dtype).eps


def test_random_rounding_to_8_bits():
    model, inputs, labels = _client()
    update = defences.quantised(gradient(model, inputs, labels), generator=_generator())
    assert _honest(attack(model, update), inputs, labels).label_accuracy == 1


@pytest.mark.parametrize("noise_multiplier", [1e-4, 1e-3])
def test_dp_sgd_with_weak_noise(noise_multiplier):
    model, inputs, labels = _client()
    norms = [
        sum(g.norm() ** 2 for g in gradient(model, inputs[k : k + 1], labels[k : k + 1]).gradients.values()) ** 0.5
        for k in range(8)
    ]
    clip = float(torch.stack(norms).median())  # half of the samples are scaled down, each by its own factor
    update = privacy.private(
        model, inputs, labels, clip=clip, noise_multiplier=noise_multiplier, generator=_generator()
    )
    result = attack(model, update)
    seen = metrics.evaluate(result, inputs, labels)
    assert seen.label_accuracy == 1
    assert not result.certified.any()
    assert float(seen.relative_error.max()) < 100 * noise_multiplier


def test_dp_sgd_on_real_images_gives_half_of_them_recognisable(real_data):
    """Noise of which not all samples stand out far enough: those that come back carry their expected error."""
    inputs, labels = data.load("cifar10", count=32, root=real_data)
    model = models.fcnn(inputs.shape[1:], 600, 3, 10)
    norms = [
        sum(g.norm() ** 2 for g in gradient(model, x[None], y[None]).gradients.values()) ** 0.5
        for x, y in zip(inputs, labels, strict=True)
    ]
    clip = float(torch.stack(norms).median())
    update = privacy.private(model, inputs, labels, clip=clip, noise_multiplier=1e-3, generator=_generator())
    result = attack(model, update)
    seen = metrics.evaluate(result, inputs, labels)
    assert not result.certified.any()
    assert (seen.psnr > 20).double().mean() >= 0.5, result.reason
    found = seen.match >= 0
    off = 20 * torch.log10(seen.relative_error[found] / result.expected_error[seen.match[found]])
    assert (off.abs() < 3).double().mean() >= 0.9, off


def test_least_squares_with_the_true_activations_is_the_bound():
    model, inputs, labels = _client(seed=3)
    update = defences.noisy(gradient(model, inputs, labels), 0.02, relative=True, generator=_generator())
    problem = open_network(model, update)
    x = inputs.clone().requires_grad_()
    z = model.fc1(x)
    loss = torch.nn.functional.cross_entropy(model.fc3(model.fc2(z.relu()).relu()), labels)
    (G,) = torch.autograd.grad(loss, z)
    bound = torch.linalg.lstsq(G.T, problem.weight_gradients[0]).solution
    bound = float((bound - inputs).norm() / inputs.norm())
    seen = metrics.evaluate(attack(model, update), inputs, labels)
    assert float(seen.relative_error.pow(2).mean().sqrt()) < 1.1 * bound


def test_permuted_samples_and_neurons_change_nothing():
    model, inputs, labels = _client()
    update = defences.noisy(gradient(model, inputs, labels), 1e-3, relative=True, generator=_generator())
    first = metrics.evaluate(attack(model, update), inputs, labels)
    second = metrics.evaluate(attack(*permuted_neurons(model, update)), inputs, labels)
    torch.testing.assert_close(first.relative_error, second.relative_error, rtol=1e-3, atol=0)


@given(exponent=st.floats(-16, -1), seed=st.integers(0, 1000), disclosed=st.booleans())
@settings(max_examples=12, deadline=None)
def test_no_noise_makes_a_false_certificate(exponent, seed, disclosed):
    model, inputs, labels = _client(b=4, m=60, n=40, seed=seed)
    sigma = 10**exponent
    update = defences.noisy(gradient(model, inputs, labels), sigma, relative=True, generator=_generator(seed))
    if disclosed:
        scale = float(update.gradients["fc1.weight"].pow(2).mean().sqrt())
        update = replace(update, noise=sigma * scale)
    result = attack(model, update, max_proposals=500)
    seen = metrics.evaluate(result, inputs, labels)
    assert seen.precision == 1
    if result.expected_error is not None:
        assert not result.certified.any()


@given(seed=st.integers(0, 1000), kind=st.sampled_from(("float16", "bfloat16", "int8", "int3")))
@settings(max_examples=6, deadline=None)
def test_compressed_updates_are_never_certified(seed, kind):
    model, inputs, labels = _client(b=4, m=60, n=40, seed=seed)
    update = gradient(model, inputs, labels)
    if kind.startswith("int"):
        update = defences.quantised(update, int(kind[3:]), generator=_generator(seed))
    else:
        update = defences.half_precision(update, getattr(torch, kind))
    assert not attack(model, update).certified.any()


@pytest.mark.parametrize("sigma", [None, 0.3])
def test_rank_and_level_of_a_known_matrix(sigma):
    generator = _generator()
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    J = 3 * draw(80, 5) @ draw(5, 200) + 0.3 * draw(80, 200)
    J[10], J[:, 3] = 0, 0  # a dead neuron and a blank pixel carry no noise
    found = scaled(J, sigma).standing()
    assert found.low.rank == 5
    assert found.sigma == pytest.approx(0.3, rel=0.03)
    assert torch.linalg.matrix_norm(J - found.low.L @ found.low.R, 2) < 0.3 * (80**0.5 + 200**0.5) * 1.1
    assert scaled(J, sigma, most=3).rank == 3
    assert scaled(J.T.contiguous(), sigma).rank == 5


def test_what_cannot_be_refined_says_why():
    model, inputs, labels = _client(depth=2)
    update = defences.half_precision(gradient(model, inputs, labels))
    assert "two hidden layers" in attack(model, update).reason
    model, inputs, labels = _client(b=30, m=60, n=120)
    update = defences.half_precision(gradient(model, inputs, labels))
    result = attack(model, update)
    assert not len(result.inputs)
    assert "needs layers wider than" in result.reason
    with pytest.raises(ValueError, match="float16: exact recovery needs float32"):
        attack(model, update, method="sampling")


def test_pure_noise_gives_nothing():
    model, inputs, labels = _client()
    update = gradient(model, inputs, labels)
    noise = {
        n: torch.randn(g.shape, generator=_generator(k), dtype=g.dtype)
        for k, (n, g) in enumerate(update.gradients.items())
    }
    result = attack(model, replace(update, gradients=noise, noise=1.0))
    assert not len(result.inputs)


def test_a_zero_gradient_is_an_error():
    model, inputs, labels = _client()
    update = defences.half_precision(gradient(model, inputs, labels))
    zero = {n: torch.zeros_like(g) for n, g in update.gradients.items()}
    with pytest.raises(ValueError, match="rank 0"):
        attack(model, replace(update, gradients=zero))
