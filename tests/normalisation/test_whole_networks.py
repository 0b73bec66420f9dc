"""Normalisation on some layers, behind the activation, beside other activations: whole batches, or what was found."""

from dataclasses import replace

import pytest
import torch
from normalised_problems import Sent, difference_errors, differences_back, sent
from torch import nn

import spear
from spear.metrics import evaluate
from spear.reconstruction import Refusal

BATCH, LAYER = nn.BatchNorm1d, nn.LayerNorm
WIDTH = (60, 150, 140, 10)  # of two hidden layers, told apart by their width
NETWORKS = {
    "behind": lambda m: [nn.ReLU(), BATCH(m)],
    "behind-gelu": lambda m: [nn.GELU(), BATCH(m)],
    "batch-gelu": lambda m: [BATCH(m), nn.GELU()],
    "batch-leaky": lambda m: [BATCH(m), nn.LeakyReLU(0.1)],
    "layer-gelu": lambda m: [LAYER(m), nn.GELU()],
    "rms-silu": lambda m: [nn.RMSNorm(m, eps=1e-6), nn.SiLU()],
    "first": lambda m: [BATCH(m), nn.ReLU()] if m == WIDTH[1] else [nn.ReLU()],
    "second": lambda m: [BATCH(m), nn.ReLU()] if m == WIDTH[2] else [nn.ReLU()],
    "mixed": lambda m: [LAYER(m), nn.ReLU()] if m == WIDTH[1] else [BATCH(m), nn.ReLU()],
    "behind-first": lambda m: [nn.ReLU(), BATCH(m)] if m == WIDTH[1] else [BATCH(m), nn.GELU()],
}
LOSES = {"batch-gelu", "batch-leaky", "first"}  # BatchNorm in front of the first activation


def whole(case: Sent, network: str, result: spear.Reconstruction) -> None:
    differences_back(result, case)
    assert network in LOSES or result.complete, result.reason
    if result.complete:
        evaluation = evaluate(result, case.inputs, case.labels)
        assert evaluation.recall == evaluation.precision == 1
        assert bool((evaluation.relative_error.sort().values <= result.error_bound.sort().values).all())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_whole_batch(network, seed):
    case = sent(WIDTH, 10, NETWORKS[network], seed=seed, spread=0.1)
    whole(case, network, spear.attack(case.model, case.update, method="network", time_limit=300))


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize("network", ["behind", "batch-gelu", "layer-gelu"])
def test_losses(network, loss):
    case = sent((60, 150, 10), 8, NETWORKS[network], seed=1, loss=loss)
    whole(case, network, spear.attack(case.model, case.update, time_limit=300))


@pytest.mark.parametrize("network", ["behind", "second", "batch-gelu"])
def test_a_changed_update_is_not_certified(network):
    case = sent((30, *WIDTH[1:3], 5), 6, NETWORKS[network], seed=6)
    for name, own in case.update.gradients.items():
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        spoilt = dict(case.update.gradients) | {name: own + 1e-6 * own.abs().max() * noise}
        try:
            update = replace(case.update, gradients=spoilt)
            result = spear.attack(case.model, update, method="network", max_proposals=20)
        except Refusal:
            continue
        bias_before_a_norm = float(own.abs().max()) < 1e-12 * float(case.update.gradients["0.weight"].abs().max())
        assert bias_before_a_norm or not result.certified.any(), name
        assert bias_before_a_norm or not result.differences.any(), name


@pytest.mark.parametrize("network", ["behind", "batch-gelu", "second"])
def test_statistics_of_another_batch(network):
    case = sent(WIDTH, 8, NETWORKS[network], seed=5)
    wrong = {name: value * 1.1 for name, value in case.update.buffers.items() if value.is_floating_point()}
    try:
        result = spear.attack(case.model, replace(case.update, buffers=wrong), method="network", max_proposals=100)
    except Refusal:
        return
    evaluation = evaluate(result, case.inputs, case.labels)
    assert not result.certified.any() or evaluation.precision == 1
    errors, _ = difference_errors(result, case.inputs)
    assert bool((errors[result.differences] < 1e-6).all())


def test_statistics_that_are_needed():
    case = sent(WIDTH, 8, NETWORKS["behind-gelu"])
    with pytest.raises(Refusal, match="behind the activation of 0: its mean, which the buffers do not tell"):
        spear.attack(case.model, replace(case.update, buffers=None), method="network")


@pytest.mark.parametrize("network", ["batch", "layer", "layer-gelu", "batch-gelu", "behind-gelu", "mixed"])
def test_some_samples_come_back_uncertified(network):
    """A search that is cut short: each sample found is one of the batch, with its label."""
    plain = {"batch": lambda m: [BATCH(m), nn.ReLU()], "layer": lambda m: [LAYER(m), nn.ReLU()]}
    case = sent(WIDTH, 16, (plain | NETWORKS)[network], seed=2)
    x = case.inputs - case.inputs.mean(0) if network in LOSES | {"batch"} else case.inputs
    for starts in (20, 60):
        result = spear.attack(case.model, case.update, method="network", max_proposals=starts)
        if len(result.inputs) == 16:
            break
        assert not result.certified.any()
        assert not result.differences.any()
        apart = torch.cdist(result.inputs, x, compute_mode="donot_use_mm_for_euclid_dist") / x.norm(dim=1)
        error, index = apart.min(1)
        assert bool((error < 1e-5).all()), error
        assert torch.equal(result.labels, case.labels[index])
        assert not len(error) or "none certified while others are missing" in result.reason
