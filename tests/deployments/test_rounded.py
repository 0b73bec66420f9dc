"""Rounded and quantised updates with nothing told: how many samples, which, and how well each is known."""

import re
from dataclasses import replace

import pytest
import torch
from problems import batch
from test_levels import _coded, _uniform

from spear import SharedUpdate, attack, metrics, models
from spear.federated import clients, defences, gradient


def _client(b: int = 6, m: int = 120, n: int = 100, seed: int = 0):
    inputs, labels = batch(b, n, seed=seed)
    return models.fcnn((n,), m, 3, 10, seed=seed), inputs, labels


def _sent(model, inputs, labels, change, rate: float | None = None) -> SharedUpdate:
    """A gradient, or a change of weights by one step, changed, nothing told beside its rate."""
    scale = 1.0 if rate is None else rate
    tensors = {name: change(scale * g) for name, g in gradient(model, inputs, labels).gradients.items()}
    return SharedUpdate(tensors, learning_rate=rate)


def _honest(result, inputs, labels) -> metrics.Evaluation:
    """Every sample once, with its label, nothing certified, the expected errors within a factor two of the true."""
    seen = metrics.evaluate(result, inputs, labels)
    assert not result.certified.any()
    assert not result.complete
    assert len(result.inputs) == len(inputs), result.reason
    assert seen.label_accuracy == 1
    ratio = seen.relative_error / result.expected_error[seen.match]
    assert ((ratio > 0.5) & (ratio < 2)).double().mean() >= 0.8, ratio
    return seen


def _blocks(g: torch.Tensor) -> torch.Tensor:
    """Sixteen codes times the largest of each 50 entries."""
    return _coded(g, 50) if g.numel() % 50 == 0 else g


ROUNDINGS = {
    "float16": (lambda g: (g * 2**8).half().to(g) / 2**8, 0.02),
    "bfloat16": (lambda g: g.bfloat16().to(g), 0.1),
    "41 values": (_uniform, 0.3),
    "41 values a row": (lambda g: _uniform(g, -1), 0.2),
    "codes in blocks": (_blocks, 0.4),
}


@pytest.mark.parametrize("kind", ROUNDINGS)
@pytest.mark.parametrize("rate", [None, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_every_sample_of_a_rounded_update_comes_back(kind, rate, seed):
    model, inputs, labels = _client(seed=seed)
    change, worst = ROUNDINGS[kind]
    result = attack(model, _sent(model, inputs, labels, change, rate))
    seen = _honest(result, inputs, labels)
    assert result.rank == len(inputs)
    assert float(seen.relative_error.median()) < worst


@pytest.mark.parametrize("factor", [1e-3, 7.0])
@pytest.mark.parametrize("kind", ["bfloat16", "noise"])
def test_an_unknown_common_factor_is_read_off(factor, kind):
    model, inputs, labels = _client()
    clean = gradient(model, inputs, labels)
    sent = {name: factor * g for name, g in clean.gradients.items()}
    update = replace(clean, gradients=sent)
    if kind == "noise":
        update = defences.noisy(update, 1e-3, relative=True, generator=torch.Generator().manual_seed(0))
    else:
        update = replace(update, gradients={name: g.bfloat16().double() for name, g in sent.items()})
    result = attack(model, update)
    _honest(result, inputs, labels)
    seen = float(re.search("the update is (.*) times their mean", result.reason).group(1))
    assert seen == pytest.approx(factor, rel=0.01)


@pytest.mark.parametrize("rate", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_disclosed_noise_is_in_the_unit_of_what_was_sent(rate, scale):
    """The same noise on the same step, whatever the unit: one result, and its level is the gradient's."""
    model, inputs, labels = _client()
    step = clients.local_training(model, inputs, labels, learning_rate=rate)
    step = replace(step, gradients={name: scale * g for name, g in step.gradients.items()}, loss_scale=scale)
    update = defences.noisy(step, 1e-5 * rate * scale, generator=torch.Generator().manual_seed(0))
    result = attack(model, update, method="network")
    _honest(result, inputs, labels)
    assert "noise of 1.0e-05 per entry" in result.reason
    assert "does not show it" not in result.reason


@pytest.mark.parametrize("seed", range(3))
def test_what_stands_by_itself_is_returned_though_others_are_missing(seed):
    """Noise in which not all samples are found: those that are have the right labels and honest errors."""
    model, inputs, labels = _client(b=24, m=160, n=120, seed=seed)
    update = defences.noisy(
        gradient(model, inputs, labels), 0.15, relative=True, generator=torch.Generator().manual_seed(seed)
    )
    result = attack(model, update)
    seen = metrics.evaluate(result, inputs, labels)
    assert len(result.inputs) > 0, result.reason
    assert not result.certified.any()
    found = seen.match >= 0
    ratio = seen.relative_error[found] / result.expected_error[seen.match[found]]
    assert (ratio < 2.5).double().mean() > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_two_images_of_few_grey_levels_are_exact_not_rounded(seed):
    """Their gradient holds few values in each row, as rounded ones do."""
    inputs, labels = batch(2, 100, seed=seed)
    inputs = (inputs > 0).to(inputs)
    model = models.fcnn((100,), 120, 3, 10, seed=seed)
    result = attack(model, gradient(model, inputs, labels))
    assert result.complete
