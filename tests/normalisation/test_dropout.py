"""Dropout in training mode: its masks are recovered with the batch, and nothing that is wrong is certified."""

from dataclasses import replace

import pytest
import torch
from normalised_problems import differences_back, sent
from torch import nn

import spear
from spear.metrics import evaluate
from spear.normalisation import replay
from spear.normalisation.opening import open_normalised
from spear.normalisation.sample_search import SampleSearch
from spear.reconstruction import Refusal

NORMS = {"none": lambda m: nn.Identity(), "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


@pytest.mark.parametrize(("drop", "seed"), [(0.1, 0), (0.5, 1)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", [(60, 160, 5), (60, 160, 150, 10), (60, 160, 200)])
def test_the_whole_batch(norm, drop, sizes, seed):
    case = sent(sizes, 8, NORMS[norm], seed=seed, drop=drop)
    result = spear.attack(case.model, case.update, method="network", time_limit=60)
    differences_back(result, case)
    assert result.complete, result.reason
    assert evaluate(result, case.inputs, case.labels).recall == 1
    assert f"(p = {drop:g})" in result.reason


@pytest.mark.parametrize("seed", [0, 1])
def test_auto_and_dropout_before_the_activation(seed):
    case = sent((60, 160, 10), 8, lambda m: nn.Dropout(0.3), seed=seed)
    result = spear.attack(case.model, case.update, time_limit=60)
    differences_back(result, case)
    assert result.complete


def test_the_masks_are_those_that_were_drawn():
    case = sent((60, 160, 10), 8, NORMS["none"], drop=0.4)
    view, drawn = open_normalised(case.model, case.update), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        handle = case.model[3].register_forward_hook(
            lambda _, given, result: drawn.append((given[0] > 0) & (result == 0))
        )
        spear.federated.gradient(case.model, case.inputs, case.labels)
        handle.remove()
    result = spear.attack(case.model, case.update, method="network", time_limit=60)
    order = torch.cdist(result.inputs, case.inputs).argmin(1)
    z = view.network.apply(0, result.inputs)
    took = float(drawn[0][order].sum()) / float((z > 0).sum())
    assert f"dropout took {took:.1%} of the positive units of layer 1" in result.reason
    kept = ((~drawn[0][order]),)
    targets = replay.Targets(nn.functional.one_hot(result.labels, 10).double(), 1 / 8, 0.0)
    assert replay.misfit(view, replay.run(view, result.inputs, targets, kept)) < 1e-11


@pytest.mark.parametrize(("name", "size"), [("0.weight", 1e-2), ("0.bias", 1e-5), ("4.weight", 1e-5)])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_changed_update_is_not_certified(norm, name, size):
    case = sent((30, 100, 5), 8, NORMS[norm], seed=6, drop=0.3)
    g = dict(case.update.gradients)
    noise = torch.randn(g[name].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g[name] = g[name] + size * g[name].abs().max() * noise
    try:
        result = spear.attack(case.model, replace(case.update, gradients=g), method="network", max_proposals=60)
    except Refusal:
        return
    assert not result.certified.any()


def test_a_rate_that_is_not_the_clients():
    case = sent((60, 160, 10), 8, NORMS["none"], drop=0.5)
    other = nn.Sequential(*case.model[:3], nn.Dropout(0.2), case.model[4]).train()
    result = spear.attack(other, case.update, method="network", max_proposals=60)
    assert not result.certified.any()
    never = nn.Sequential(*case.model[:3], nn.Identity(), case.model[4]).train()
    result = spear.attack(never, case.update, method="network", max_proposals=60)
    assert not result.certified.any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_the_last_sample_is_told_by_the_others(norm, seed):
    """Of the last sample z is known, and with it units on which its gradient vanishes: no search is needed."""
    case = sent((60, 160, 5), 8, NORMS[norm], seed=seed, drop=0.5)
    view = open_normalised(case.model, case.update)
    low = view.network.factors(0)
    run = SampleSearch(view, low, torch.Generator().manual_seed(seed))
    while run.left:
        run.round()
    whole = run.found
    for missing in range(8):
        again = SampleSearch(view, low, torch.Generator().manual_seed(seed))
        again.found = whole[torch.arange(8) != missing]
        again._draw = None  # a search would fail
        with pytest.raises(TypeError):
            again.round()
        back = again.found.t @ whole.t[missing]
        assert float(back.abs().max()) > 1 - 1e-9


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Tanh, nn.SELU, nn.Softplus, nn.Hardswish])
def test_behind_any_activation(activation, seed):
    case = sent((60, 160, 10), 12, lambda m: [activation(), nn.Dropout(0.3)], seed=seed)
    result = spear.attack(case.model, case.update, method="network", time_limit=60, seed=seed)
    differences_back(result, case)
    assert result.complete, result.reason
    assert evaluate(result, case.inputs, case.labels).recall == 1


@pytest.mark.parametrize(("drop", "seed"), [(0.1, 0), (0.5, 1)])
@pytest.mark.parametrize("sizes", [(60, 160, 150, 5), (60, 160, 100)])
def test_behind_gelu_in_two_layers_and_with_many_classes(sizes, drop, seed):
    case = sent(sizes, 8, lambda m: [nn.GELU(), nn.Dropout(drop)], seed=seed)
    result = spear.attack(case.model, case.update, time_limit=60)
    differences_back(result, case)
    assert result.complete, result.reason


@pytest.mark.parametrize("seed", [0, 1])
def test_behind_batch_normalisation_and_gelu(seed):
    case = sent((60, 160, 10), 10, lambda m: [nn.BatchNorm1d(m), nn.GELU(), nn.Dropout(0.3)], seed=seed)
    result = spear.attack(case.model, case.update, method="network", time_limit=60)
    differences_back(result, case)


@pytest.mark.parametrize("name", ["0.weight", "3.weight"])
def test_a_changed_update_behind_gelu_is_not_certified(name):
    case = sent((30, 100, 5), 8, lambda m: [nn.GELU(), nn.Dropout(0.3)], seed=6)
    g = dict(case.update.gradients)
    g[name] = g[name] + 1e-4 * g[name].abs().max() * torch.randn(g[name].shape, dtype=torch.float64)
    result = spear.attack(case.model, replace(case.update, gradients=g), method="network", max_proposals=200)
    assert not result.certified.any()


@pytest.mark.parametrize(
    "between",
    [lambda m: [nn.Dropout(0.3), nn.GELU()], lambda m: [nn.LeakyReLU(), nn.Dropout(0.3)]],
    ids=["before the activation", "two slopes"],
)
def test_what_is_not_searched_is_said(between):
    case = sent((30, 100, 5), 8, between)
    with pytest.raises(Refusal, match="[Dd]ropout"):
        spear.attack(case.model, case.update, method="network")
