"""The sign of a noisy update, and a factor common to it: found from the samples, said, and undone."""

import pytest
import torch
from problems import batch
from torch import Generator

import spear
from spear import models
from spear.federated import SharedUpdate, gradient
from spear.federated.update import each
from spear.metrics import evaluate


def client(seed: int, dtype: torch.dtype = torch.float32):
    x, y = batch(8, 40, 6, seed=seed, dtype=dtype)
    model = models.fcnn((40,), 150, 3, 6, seed=seed, dtype=dtype)
    return model, x, y, gradient(model, x, y)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("factor", [1e-3, 20.0, -1e-3])
def test_half_precision_of_a_multiple(factor: float, seed: int) -> None:
    model, x, y, plain = client(seed)
    result = spear.attack(model, each(plain, lambda g: (factor * g).bfloat16()), time_limit=300)
    report = evaluate(result, x, y)
    assert len(result.inputs) == 8, result.reason
    assert report.label_accuracy == 1
    assert bool((report.relative_error < 5 * result.expected_error[report.match]).all())
    said = float(result.reason.partition("the update is ")[2].partition(" times their mean")[0])
    assert said == pytest.approx(factor, rel=2e-2)
    assert not result.certified.any()


@pytest.mark.parametrize("seed", range(3))
def test_the_opposite_sign(seed: int) -> None:
    model, x, y, plain = client(seed)
    result = spear.attack(model, each(plain, lambda g: (-g).bfloat16()), time_limit=300)
    assert evaluate(result, x, y).label_accuracy == 1, result.reason
    assert "the opposite sign of their mean" in result.reason


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_said_of_a_mean(seed: int) -> None:
    model, _, _, plain = client(seed)
    generator = Generator().manual_seed(seed)
    sent = each(plain, lambda g: g + 1e-5 * torch.randn(g.shape, generator=generator))
    result = spear.attack(model, sent, time_limit=300)
    assert len(result.inputs) == 8, result.reason
    assert "times their mean" not in result.reason


def test_weights_of_single_precision_after_a_tiny_step() -> None:
    """Clipping of the whole gradient: a change of weights that is nearly lost in their rounding."""
    model, x, y, plain = client(0)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    change = {n: p - (p - 1e-4 * plain.gradients[n]) for n, p in weights.items()}
    result = spear.attack(model, SharedUpdate(change, learning_rate=0.1, count=8), time_limit=300)
    report = evaluate(result, x, y)
    assert len(result.inputs) == 8, result.reason
    assert report.label_accuracy == 1
    assert float(report.relative_error.median()) < 0.1
    said = float(result.reason.partition("the update is ")[2].partition(" times their mean")[0])
    assert said == pytest.approx(1e-3, rel=2e-2)
