"""A factor on every tensor: what Euler's theorem says of homogeneous networks tells it, and the batch comes back."""

import copy
from dataclasses import replace

import pytest
import torch
from problems import batch
from torch import Tensor, nn

import spear
from spear.certificate import SAFETY
from spear.federated import SharedUpdate, gradient
from spear.federated.per_tensor import undone

WIDTH, CLASSES, COUNT, N = 64, 5, 6, 20


class Squared(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.relu() ** 2


ACTIVATIONS = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "prelu": nn.PReLU, "squared": Squared}


def client(
    activation: str, seed: int, *, depth: int = 3, bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor, Tensor, SharedUpdate]:
    torch.manual_seed(seed)
    parts, n = [], N
    for _ in range(depth - 1):
        parts += [nn.Linear(n, WIDTH, bias=bias), ACTIVATIONS[activation]()]
        n = WIDTH
    model = nn.Sequential(*parts, nn.Linear(n, CLASSES)).to(dtype)
    for part in model:
        part.requires_grad_(isinstance(part, nn.Linear))
    x, y = batch(COUNT, N, CLASSES, seed=seed)
    return model, x.to(dtype), y, gradient(model, x.to(dtype), y)


def scaled(update: SharedUpdate, factors: dict[str, float]) -> SharedUpdate:
    return replace(update, gradients={name: factors[name] * g for name, g in update.gradients.items()})


def drawn(update: SharedUpdate, seed: int) -> dict[str, float]:
    logs = torch.randn(len(update.gradients), generator=torch.Generator().manual_seed(seed)).tolist()
    return {name: 10**log for name, log in zip(update.gradients, logs, strict=True)}


def clipped(update: SharedUpdate) -> SharedUpdate:
    """Each tensor clipped at its own norm, as Keras' `clipnorm` does."""
    norms = {name: float(g.norm()) for name, g in update.gradients.items()}
    return scaled(update, {name: min(1.0, 0.01 / norm) for name, norm in norms.items()})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_factors_are_undone(activation, bias, depth, seed):
    model, _, _, plain = client(activation, seed, depth=depth, bias=bias)
    found, words, _ = undone(model, scaled(plain, drawn(plain, seed)))
    ratios = [g / plain.gradients[name] for name, g in found.gradients.items()]
    ratios = torch.cat([ratio[plain.gradients[name] != 0] for ratio, name in zip(ratios, found.gradients, strict=True)])
    torch.testing.assert_close(ratios, ratios[0].expand_as(ratios), rtol=1e-9, atol=0)
    last = f"{2 * depth - 2}.bias"
    assert set(plain.gradients) - set(found.gradients) == {last}
    assert last in words


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_how_far_off_a_factor_is(dtype, size, seed):
    """The smaller biases are beside the weights, the less their factor is told."""
    model, x, y, _ = client("relu", seed, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p *= size if name.endswith("bias") else 1
    plain = spear.federated.gradient(model, 100 * x, y)
    result = undone(model, scaled(plain, drawn(plain, seed)))
    if result is None:  # too rough
        assert dtype == torch.float32
        return
    found, _, error = result
    ratios = torch.stack(
        [found.gradients[k].double().norm() / plain.gradients[k].double().norm() for k in found.gradients]
    )
    assert float((ratios / ratios[0] - 1).abs().max()) < SAFETY * error


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "leaky"])
@pytest.mark.parametrize("method", ["network", "auto"])
def test_the_batch_comes_back(method, activation, dtype, seed):
    model, x, y, plain = client(activation, seed, dtype=dtype)
    for sent in (clipped(plain), scaled(plain, drawn(plain, seed))):
        result = spear.attack(model, sent, method=method, time_limit=60)
        report = spear.metrics.evaluate(result, x, y)
        assert report.recall == report.label_accuracy == 1, result.reason
        assert bool(result.certified.all())
        assert "a factor of its own" in result.reason


@pytest.mark.parametrize("factor", [1.0, 0.1, -3.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_factor_of_all_is_none_of_each(activation, factor):
    model, _, _, plain = client(activation, 0)
    assert undone(model, scaled(plain, dict.fromkeys(plain.gradients, factor))) is None


@pytest.mark.parametrize("noise", [1e-6, 1e-2])
def test_noise_has_no_factors(noise):
    model, _, _, plain = client("relu", 0)
    other = scaled(plain, drawn(plain, 0)).gradients
    noisy = {name: g + noise * g.abs().max() * torch.randn_like(g) for name, g in other.items()}
    assert undone(model, replace(plain, gradients=noisy)) is None


def test_nothing_is_told_of_other_networks():
    model, _, _, plain = client("relu", 0)
    sent = scaled(plain, drawn(plain, 0))
    curved = nn.Sequential(*(nn.GELU() if isinstance(part, nn.ReLU) else part for part in model))
    assert undone(curved, sent) is None
    assert undone(model, replace(sent, gradients={k: g for k, g in sent.gradients.items() if k != "0.bias"})) is None
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        fresh[2].bias.zero_()
    assert undone(fresh, sent) is None


def test_weight_decay_is_no_factor():
    model, x, y, plain = client("relu", 1)
    decayed = {name: g + 0.01 * model.get_parameter(name).detach() for name, g in plain.gradients.items()}
    assert undone(model, replace(plain, gradients=decayed)) is None
    result = spear.attack(model, replace(plain, gradients=decayed), time_limit=60)
    assert spear.metrics.evaluate(result, x, y).recall == 1
    assert "weight decay" in result.reason
