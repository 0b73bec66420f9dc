"""No label explains the outputs' gradient: it is taken as measured, and what no loss enters certifies the inputs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import batch
from torch import Tensor, nn

import spear
from spear.federated import SharedUpdate, gradient

N, WIDTH = 30, 90
LOSSES: dict[str, tuple[str, int, Callable[[Tensor, Tensor], Tensor]]] = {  # as told, outputs, of outputs and numbers
    "regression": ("squared_error", 1, F.mse_loss),
    "several numbers": ("squared_error", 4, F.mse_loss),
    "Huber": ("squared_error", 3, F.smooth_l1_loss),
    "several labels": ("binary_cross_entropy", 5, lambda z, t: F.binary_cross_entropy_with_logits(z, (t > 0).double())),
    "soft labels": ("cross_entropy", 5, lambda z, t: F.cross_entropy(z, t.softmax(1))),
    "margin": ("cross_entropy", 5, lambda z, t: F.multi_margin_loss(z, t.argmax(1))),
    "policy gradient": ("cross_entropy", 4, lambda z, t: (z.log_softmax(1)[:, 0] * t[:, 0]).mean()),
}


def network(activation: type[nn.Module], outputs: int, seed: int, depth: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Linear(N, WIDTH), activation()]
    for _ in range(depth - 2):
        parts += [nn.Linear(WIDTH, WIDTH), activation()]
    return nn.Sequential(*parts, nn.Linear(WIDTH, outputs)).double()


def problem(
    name: str, activation: type[nn.Module], count: int, seed: int
) -> tuple[nn.Module, Tensor, Tensor, SharedUpdate]:
    told, outputs, loss = LOSSES[name]
    model, (x, _) = network(activation, outputs, seed), batch(count, N, seed=seed)
    wanted = torch.randn(count, outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss(model(x), wanted), parameters)
    return model, x, wanted, SharedUpdate(dict(zip(names, gradients, strict=True)), count=count, loss=told)


@pytest.mark.parametrize(("count", "seed"), [(3, 0), (12, 1)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("name", LOSSES)
def test_the_inputs_are_certain_whatever_the_loss(name, activation, count, seed):
    model, x, wanted, update = problem(name, activation, count, seed)
    result = spear.attack(model, update, method="network", time_limit=60)
    report = spear.metrics.evaluate(result, x)
    assert report.recall == 1, result.reason
    assert result.complete
    assert bool(result.certified.all())
    assert bool((report.relative_error <= result.error_bound[report.match]).all())
    assert result.labels is None
    assert "no labels: none explains the gradients" in result.reason
    if "number" in name or name == "regression":
        torch.testing.assert_close(result.targets[report.match], wanted, rtol=0, atol=1e-9)
    assert (result.targets is None) == (update.loss != "squared_error")
    assert ("targets are the numbers" in result.reason) == (update.loss == "squared_error")


@pytest.mark.parametrize("seed", range(2))
def test_a_regression_of_half_the_width(seed):
    model, x, wanted, update = problem("regression", nn.ReLU, 40, seed)
    result = spear.attack(model, update, time_limit=60)
    report = spear.metrics.evaluate(result, x)
    assert report.recall == 1, result.reason
    assert bool(result.certified.all())
    torch.testing.assert_close(result.targets[report.match], wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_behind_curves_nothing_is_certain_without_labels(activation):
    model, x, _, update = problem("regression", activation, 5, 0)
    result = spear.attack(model, update, method="network", time_limit=60)
    assert spear.metrics.evaluate(result, x).recall == 1, result.reason
    assert not result.certified.any()
    assert not result.complete
    assert result.labels is None


@pytest.mark.parametrize("name", ["regression", "soft labels"])
def test_without_a_count_nothing_is_certain(name):
    model, x, _, update = problem(name, nn.ReLU, 5, 0)
    result = spear.attack(model, replace(update, count=None), method="network", time_limit=60)
    assert spear.metrics.evaluate(result, x).recall == 1
    assert not result.certified.any()


@pytest.mark.parametrize("seed", range(3))
def test_two_samples_of_one_region_are_not_their_mean(seed):
    """With one output, samples of one linear region leave one direction: their sum in any proportion."""
    model, x, wanted, _ = problem("regression", nn.ReLU, 4, seed)
    x[3] = x[0] + 1e-5 * torch.randn(N, dtype=torch.float64)
    result = spear.attack(model, gradient(model, x, wanted, loss="squared_error"), method="network", time_limit=30)
    assert not result.complete
    report = spear.metrics.evaluate(result, x)
    assert report.precision == 1


@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_client_with_numbers_is_autograd(loss, reduction):
    model, x, wanted, _ = problem("several numbers", nn.ReLU, 6, 1)
    wanted = wanted.sigmoid()
    compare = F.mse_loss if loss == "squared_error" else F.binary_cross_entropy_with_logits
    expected = torch.autograd.grad(compare(model(x), wanted, reduction=reduction), list(model.parameters()))
    update = gradient(model, x, wanted, loss=loss, reduction=reduction)
    for g, other in zip(update.gradients.values(), expected, strict=True):
        torch.testing.assert_close(g, other)


@pytest.mark.parametrize(
    ("loss", "shape"), [("cross_entropy", (6, 4)), ("squared_error", (6,)), ("squared_error", (6, 3))]
)
def test_numbers_that_cannot_be_compared(loss, shape):
    model, x, _, _ = problem("several numbers", nn.ReLU, 6, 1)
    with pytest.raises(ValueError, match="does not compare these"):
        gradient(model, x, torch.zeros(shape, dtype=torch.float64), loss=loss)


def test_behind_a_normalisation_there_are_no_labels_either():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3)).double()
    x, _ = batch(4, N)
    update = gradient(model, x, torch.randn(4, 3, dtype=torch.float64), loss="squared_error")
    result = spear.attack(model, update, method="network", time_limit=30)
    assert not result.certified.any()
    assert not len(result.inputs) or result.labels is None


def with_zero_biases(model: nn.Module) -> nn.Module:
    for part in model:
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
    return model


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("method", ["network", "layer", "sampling"])
@pytest.mark.parametrize("name", ["regression", "several numbers", "soft labels"])
def test_behind_zero_biases_nothing_but_a_factor_tells_lengths(name: str, method: str, factor: float) -> None:
    """x / c and c dLoss/dlogits leave the same in every weight's gradient, and c times as much in the biases'."""
    told, outputs, loss = LOSSES[name]
    model, (x, _) = with_zero_biases(network(nn.ReLU, outputs, 0)), batch(4, N, seed=0)
    wanted = torch.randn(4, outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = zip(names, torch.autograd.grad(loss(model(x), wanted), parameters), strict=True)
    sent = {name: g * factor if name.endswith("bias") else g for name, g in gradients}
    result = spear.attack(model, SharedUpdate(sent, count=4, loss=told), method=method)
    assert len(result.inputs) == 4
    assert not bool(result.certified.any())
    assert not result.complete
    assert "length" in result.reason
    report = spear.metrics.evaluate(replace(result, inputs=result.inputs * factor), x)
    assert float(report.relative_error.max()) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_one_layer_of_biases_tells_lengths(seed: int) -> None:
    """A factor on the biases' gradients then shows: nothing is certified that is not right."""
    model, x, _, update = problem("several numbers", nn.ReLU, 4, seed)
    nn.init.zeros_(model[2].bias)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = dict(zip(names, torch.autograd.grad(F.mse_loss(model(x), wanted), parameters), strict=True))
    honest = spear.attack(model, replace(update, gradients=gradients), method="network")
    assert honest.complete
    assert spear.metrics.evaluate(honest, x).recall == 1
    doubled = {name: 2 * g if name.endswith("bias") else g for name, g in gradients.items()}
    result = spear.attack(model, replace(update, gradients=doubled))
    error = torch.cdist(result.inputs, x).amin(1) / x.norm(dim=1).amin()
    assert not bool((result.certified & (error > 1e-6)).any())
