"""Dropout in training mode: its masks are recovered with the batch, and nothing that is wrong is certified."""

from dataclasses import replace

import pytest
import torch
from normalised_problems import differences_back, nothing_certified_if_changed, sent
from torch import nn

import spear
from spear.metrics import evaluate
from spear.normalisation import replay
from spear.normalisation.descent import summed
from spear.normalisation.opening import open_normalised
from spear.normalisation.sample_search import SampleSearch
from spear.reconstruction import Refusal


class ThreeSlopes(nn.Module):
    def forward(self, z):
        return 0.1 * z + 0.4 * z.clamp_min(-0.1) + 0.5 * z.clamp_min(0.2)


NORMS = {"none": lambda m: nn.Identity(), "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


@pytest.mark.parametrize(("drop", "seed"), [(0.1, 0), (0.5, 1)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", [(60, 160, 5), (60, 160, 150, 10), (60, 160, 200)])
def test_the_whole_batch(norm, drop, sizes, seed):
    case = sent(sizes, 8, NORMS[norm], seed=seed, drop=drop)
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
    differences_back(result, case)
    assert result.complete, result.reason
    assert evaluate(result, case.inputs, case.labels).recall == 1
    assert f"(p = {drop:g})" in result.reason


@pytest.mark.parametrize("seed", [0, 1])
def test_auto_and_dropout_before_the_activation(seed):
    case = sent((60, 160, 10), 8, lambda m: nn.Dropout(0.3), seed=seed)
    result = spear.attack(case.model, case.update, time_limit=300)
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
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
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
    nothing_certified_if_changed(case, name, size)


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
    result = spear.attack(case.model, case.update, method="network", time_limit=300, seed=seed)
    differences_back(result, case)
    assert result.complete, result.reason
    assert evaluate(result, case.inputs, case.labels).recall == 1


@pytest.mark.parametrize(("drop", "seed"), [(0.1, 0), (0.5, 1)])
@pytest.mark.parametrize("sizes", [(60, 160, 150, 5), (60, 160, 100)])
def test_behind_gelu_in_two_layers_and_with_many_classes(sizes, drop, seed):
    case = sent(sizes, 8, lambda m: [nn.GELU(), nn.Dropout(drop)], seed=seed)
    result = spear.attack(case.model, case.update, time_limit=300)
    differences_back(result, case)
    assert result.complete, result.reason


@pytest.mark.parametrize(("activation", "seed"), [(nn.GELU(), 0), (nn.GELU(), 1), (nn.ReLU6(), 0)])
def test_behind_batch_normalisation_and_an_activation(activation, seed):
    case = sent((60, 160, 10), 10, lambda m: [nn.BatchNorm1d(m), activation, nn.Dropout(0.3)], seed=seed)
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
    differences_back(result, case)


TWO_SLOPES = {
    "leaky": lambda m: nn.LeakyReLU(0.2),
    "nearly relu": lambda m: nn.LeakyReLU(0.01),
    "prelu": lambda m: nn.PReLU(),
    "prelu of each unit": nn.PReLU,
    "relu6": lambda m: nn.ReLU6(),
    "hardtanh": lambda m: nn.Hardtanh(),
}


@pytest.mark.parametrize(("drop", "seed"), [(0.2, 0), (0.5, 1)])
@pytest.mark.parametrize("name", TWO_SLOPES)
def test_behind_two_slopes(name, drop, seed):
    case = sent((60, 120, 10), 8, lambda m: [TWO_SLOPES[name](m), nn.Dropout(drop)], seed=seed)
    result = spear.attack(case.model, case.update, method="network", time_limit=300, seed=seed)
    differences_back(result, case)
    assert result.complete, result.reason
    assert evaluate(result, case.inputs, case.labels).recall == 1


@pytest.mark.parametrize(("first", "norm"), [(nn.Hardtanh(), "none"), (nn.GELU(), "layer")])
@pytest.mark.parametrize("second", ["leaky", "relu6"])
def test_two_slopes_in_two_layers_and_behind_normalisation(second, first, norm):
    made = iter([first, TWO_SLOPES[second](100)])
    case = sent((60, 120, 100, 10), 8, lambda m: [NORMS[norm](m), next(made), nn.Dropout(0.3)], seed=1)
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
    differences_back(result, case)


@pytest.mark.parametrize(("norm", "seed"), [("none", 0), ("layer", 1)])
@pytest.mark.parametrize("name", ["leaky", "prelu", "hardtanh"])
def test_the_last_sample_of_two_slopes_is_told_by_the_others(name, norm, seed):
    case = sent((60, 120, 5), 6, lambda m: [NORMS[norm](m), TWO_SLOPES[name](m), nn.Dropout(0.5)], seed=seed)
    view = open_normalised(case.model, case.update)
    run = SampleSearch(view, view.network.factors(0), torch.Generator().manual_seed(seed))
    while run.left:
        run.round()
    whole = run.found
    for missing in range(6):
        run.found, run._draw = whole[torch.arange(6) != missing], None  # a search would fail
        with pytest.raises(TypeError):
            run.round()
        assert float((run.found.t @ whole.t[missing]).abs().max()) > 1 - 1e-9
        assert torch.equal(run.found.mask[-1], whole.mask[missing])


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (6, 1), (9, 2), (14, 3)])
def test_which_saturated_activations_were_kept(count, seed):
    """By the sum of their columns, which are more than its entries."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(6, count, generator=generator, dtype=torch.float64)
    kept = torch.rand(count, generator=generator) < 0.5
    assert torch.equal(summed(columns, columns @ kept.double()), kept)


def test_more_saturated_activations_than_are_tried():
    with pytest.raises(Refusal, match="saturated"):
        summed(torch.randn(3, 30, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("name", "size"), [("0.weight", 1e-3), ("0.bias", 1e-5), ("3.weight", 1e-5)])
@pytest.mark.parametrize("activation", ["leaky", "hardtanh"])
def test_a_changed_update_behind_two_slopes_is_not_certified(activation, name, size):
    case = sent((30, 100, 5), 8, lambda m: [TWO_SLOPES[activation](m), nn.Dropout(0.3)], seed=6)
    nothing_certified_if_changed(case, name, size, 100)


@pytest.mark.parametrize("name", ["0.weight", "3.weight"])
def test_a_changed_update_behind_gelu_is_not_certified(name):
    case = sent((30, 100, 5), 8, lambda m: [nn.GELU(), nn.Dropout(0.3)], seed=6)
    g = dict(case.update.gradients)
    g[name] = g[name] + 1e-4 * g[name].abs().max() * torch.randn(g[name].shape, dtype=torch.float64)
    result = spear.attack(case.model, replace(case.update, gradients=g), method="network", max_proposals=200)
    assert not result.certified.any()


@pytest.mark.parametrize(
    "between",
    [
        lambda m: [nn.Dropout(0.3), nn.GELU()],
        lambda m: [ThreeSlopes(), nn.Dropout(0.3)],
        lambda m: [nn.LayerNorm(m), nn.GELU(), nn.Dropout(0.3)],
    ],
    ids=["before the activation", "three slopes", "behind LayerNorm"],
)
def test_what_is_not_searched_is_said(between):
    case = sent((30, 100, 5), 8, between)
    with pytest.raises(Refusal, match="[Dd]ropout"):
        spear.attack(case.model, case.update, method="network")
