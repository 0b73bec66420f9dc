"""An update that is a multiple of its gradient, as clipping its norm leaves it: the samples tell the factor."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import spear
from spear.federated import SharedUpdate, gradient
from spear.network.starts import shown_factor
from spear.normalisation.opening import open_normalised

WIDTH, N, COUNT, CLASSES = 64, 20, 4, 5
BETWEEN: dict[str, Callable[[], list[nn.Module]]] = {
    "LayerNorm, ReLU": lambda: [nn.LayerNorm(WIDTH), nn.ReLU()],
    "RMSNorm, GELU": lambda: [nn.RMSNorm(WIDTH), nn.GELU()],
    "BatchNorm, ReLU": lambda: [nn.BatchNorm1d(WIDTH), nn.ReLU()],
    "ReLU, BatchNorm": lambda: [nn.ReLU(), nn.BatchNorm1d(WIDTH)],
    "ReLU, dropout": lambda: [nn.ReLU(), nn.Dropout(0.3)],
    "GELU, dropout": lambda: [nn.GELU(), nn.Dropout(0.3)],
}


def client(name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor, SharedUpdate]:
    torch.manual_seed(seed)
    first, second = nn.Linear(N, WIDTH), nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(first, *BETWEEN[name](), second, *BETWEEN[name](), nn.Linear(WIDTH, CLASSES)).double()
    x, y = torch.randn(COUNT, N, dtype=torch.float64), torch.randperm(CLASSES)[:COUNT]
    return model, x, y, gradient(model, x, y)


def times(update: SharedUpdate, factor: float) -> SharedUpdate:
    return replace(update, gradients={name: factor * g for name, g in update.gradients.items()})


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("factor", [20.7, 1e-4])
@pytest.mark.parametrize("name", BETWEEN)
def test_the_batch_comes_back(name: str, factor: float, seed: int) -> None:
    model, x, y, plain = client(name, seed)
    result = spear.attack(model, times(plain, factor), method="network", time_limit=300)
    report = spear.metrics.evaluate(result, x, y)
    assert report.recall == report.label_accuracy == 1, result.reason
    assert result.complete
    assert bool(result.certified.all())
    assert f"the update is {factor:.6g} times their mean" in result.reason


@pytest.mark.parametrize("name", BETWEEN)
def test_a_gradient_as_it_is_is_no_multiple(name: str) -> None:
    model, _, _, plain = client(name, 3)
    result = spear.attack(model, plain, method="network", time_limit=300)
    assert result.complete
    assert "times their" not in result.reason


@pytest.mark.parametrize("name", BETWEEN)
def test_a_view_over_a_factor_is_that_of_the_update_over_it(name: str) -> None:
    model, _, _, plain = client(name, 4)
    one, other = (open_normalised(model, update) for update in (plain, times(plain, 8.0)))
    made = other.over(8.0)
    for g, wanted in zip(gradients(made), gradients(one), strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-13, atol=0)
    factors = [shown_factor(view.network, COUNT) for view in (one, other)]
    assert factors[1] == pytest.approx(8 * factors[0])
    assert 0.5 < factors[0] < 2  # one label is in no sample


def gradients(view: object) -> list[Tensor]:
    norms = [norm for norm in (*view.norms, *view.afters) if norm is not None]
    every = [*view.network.weight_gradients, *view.network.bias_gradients]
    every += [g for norm in norms for g in (norm.scale_gradient, norm.shift_gradient)]
    return [g for g in every if g is not None]
