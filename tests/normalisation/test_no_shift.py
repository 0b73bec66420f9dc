"""BatchNorm without γ and η, or without their gradients: what the next layer tells, what is found with the batch."""

from dataclasses import replace

import pytest
import torch
from normalised_problems import Sent, differences_back, nothing_certified_if_changed, sent
from torch import Tensor, nn

import spear
from spear.normalisation.last_layer import searched
from spear.normalisation.opening import open_normalised
from spear.normalisation.recover import known_layers
from spear.reconstruction import Budget, Refusal, Terms

DEEP = (60, 120, 120, 10)
LOST = (200, 120, 10)


def bare(m: int) -> nn.Module:
    return nn.BatchNorm1d(m, affine=False)


def behind(m: int) -> list[nn.Module]:
    return [nn.ReLU(), bare(m)]


def without(case: Sent, *names: str) -> Sent:
    left = {name: g for name, g in case.update.gradients.items() if name not in names}
    return replace(case, update=replace(case.update, gradients=left))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("sizes", "b"), [((60, 120, 10), 12), (DEEP, 10), (LOST, 20), ((60, 120, 10), 4)])
def test_the_whole_batch(sizes, b, seed):
    case = sent(sizes, b, bare, seed=seed)
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
    differences_back(result, case)
    assert bool(result.certified.all()) == result.complete == (sizes[0] <= sizes[1])


@pytest.mark.parametrize(("sizes", "b"), [((60, 120, 10), 12), (DEEP, 10)])
def test_deviations_by_epsilon(sizes, b):
    case = sent(sizes, b, bare)
    result = spear.attack(case.model, replace(case.update, buffers=None), method="network", time_limit=300)
    differences_back(result, case)
    assert not result.certified.any()
    assert "no gradient depends on the mean" in result.reason


def mean_gradient(case: Sent) -> Tensor:
    """By each activation that enters ReLU, per sample."""
    y = case.model[:2](case.inputs).detach().requires_grad_()
    nn.functional.cross_entropy(case.model[2:](y), case.labels).backward()
    return y.grad.sum(0)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_mean_gradient_is_that_of_the_batch(seed):
    case = sent((60, 120, 10), 12, bare, seed=seed)
    view = open_normalised(case.model, case.update)
    told, made = view.top.scale_gradient, mean_gradient(case)
    with_shift = sent((60, 120, 10), 12, seed=seed)
    assert torch.allclose(told, with_shift.update.gradients["1.weight"], rtol=1e-9, atol=1e-12)
    run = searched(view, known_layers(view)[-1], Terms(Budget(60.0)))[1]
    assert run.left == 0
    assert torch.allclose(run.spaces.level, made, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("loss", "reduction"), [("binary_cross_entropy", "mean"), ("squared_error", "sum")])
def test_losses(loss, reduction):
    case = sent((60, 160, 10), 8, bare, seed=1, loss=loss, reduction=reduction)
    differences_back(spear.attack(case.model, case.update, method="network", time_limit=300), case)


@pytest.mark.parametrize(("names", "spread"), [(["1.weight"], 0.2), (["1.bias"], 0.0), (["1.weight", "1.bias"], 0.0)])
def test_gradients_that_are_not_sent(names, spread):
    case = without(sent(seed=1, spread=spread), *names)
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
    differences_back(result, case)
    assert result.complete


@pytest.mark.parametrize("sizes", [(60, 120, 10), DEEP])
def test_behind_the_activation(sizes):
    case = sent(sizes, 8, behind, seed=1)
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
    differences_back(result, case)
    assert result.complete, result.reason


@pytest.mark.parametrize("name", ["0.weight", "3.weight", "3.bias"])
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_changed_update_is_not_certified(name, size):
    case = sent((30, 80, 5), 8, bare, seed=6)
    nothing_certified_if_changed(case, name, size)


def test_a_part_of_the_batch_is_not_returned():
    case = sent((60, 120, 10), 12, bare)
    result = spear.attack(case.model, case.update, method="network", max_proposals=1)
    assert not len(result.inputs)
    assert not result.complete


def test_what_is_not_searched():
    spread = without(sent((30, 80, 5), 8, spread=0.2), "1.weight", "1.bias")
    smooth = sent((30, 80, 5), 8, lambda m: [bare(m), nn.GELU()])
    for case in (spread, smooth):
        with pytest.raises(Refusal, match="is two unknowns a unit: searched where ReLU alone follows and the shift is"):
            spear.attack(case.model, case.update, method="network")
    dropped = sent((30, 80, 5), 8, bare, drop=0.2)
    with pytest.raises(Refusal, match="dropout beside batch normalisation without the gradient of a shift"):
        spear.attack(dropped.model, dropped.update, method="network")
