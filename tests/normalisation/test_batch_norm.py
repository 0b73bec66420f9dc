"""BatchNorm in training mode: whole batches up to their mean, or with it, and nothing that is wrong."""

import copy
from dataclasses import replace

import pytest
import torch
from normalised_problems import difference_errors, differences_back, nothing_certified_if_changed, sent
from torch import nn

import spear
from spear.federated.clients import aggregated
from spear.federated.update import difference
from spear.metrics import evaluate
from spear.reconstruction import Refusal

DEEP = (60, 120, 120, 10)
LOST = (200, 120, 10)
MANY = (60, 120, 150)  # more classes than units


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("sizes", "b", "spread"), [((60, 120, 10), 12, 0.2), (DEEP, 10, 0.2), (LOST, 20, 0.0), (MANY, 12, 0.2)]
)
@pytest.mark.parametrize("source", ["buffers", "epsilon"])
def test_the_whole_batch(sizes, b, spread, source, seed):
    case = sent(sizes, b, seed=seed, spread=spread)
    update = case.update if source == "buffers" else replace(case.update, buffers=None)
    result = spear.attack(case.model, update, method="network", time_limit=300)
    differences_back(result, case)
    known = sizes[0] <= sizes[1] and source == "buffers"
    assert bool(result.certified.all()) == result.complete == known
    if known:
        assert evaluate(result, case.inputs, case.labels).recall == 1
    else:
        assert not result.certified.any()
        assert "no gradient depends on the mean" in result.reason


@pytest.mark.parametrize(
    "norm",
    [
        lambda m: nn.BatchNorm1d(m, momentum=None),
        lambda m: nn.BatchNorm1d(m, momentum=0.3, eps=1e-3),
        lambda m: nn.BatchNorm1d(m, track_running_stats=False),
    ],
)
def test_other_ways_to_keep_statistics(norm):
    case = sent(norm=norm, seed=3)
    differences_back(spear.attack(case.model, case.update, method="network", time_limit=300), case)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses(loss, reduction):
    case = sent(seed=1, loss=loss, reduction=reduction)
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
    differences_back(result, case)
    assert result.complete


def over_all(update, b):
    """The update where running variances are taken over b, not over b - 1."""
    told = {name: 0.9 + (v - 0.9) * (1 - 1 / b) if name.endswith("var") else v for name, v in update.buffers.items()}
    return replace(update, buffers=told)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("activation", "dtype"), [(nn.ReLU, torch.float64), (nn.GELU, torch.float64), (nn.ReLU, torch.float32)]
)
def test_a_variance_over_all_samples(activation, dtype, seed):
    """As Flax takes it, and torch does not: epsilon shows which, where samples are about as large as the weights."""
    case = sent((20, 96, 5), 6, lambda m: [nn.BatchNorm1d(m), activation()], seed=seed)
    model, x = case.model.to(dtype), case.inputs.to(dtype)
    update = spear.federated.gradient(model, x, case.labels)
    for told in (update, over_all(update, 6)):
        result = spear.attack(model, told, method="network", time_limit=300)
        assert result.complete, result.reason
        assert bool((evaluate(result, x).relative_error <= result.error_bound.max()).all())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("biased", [False, True])
def test_samples_so_large_that_epsilon_does_not_show_which(activation, biased):
    case = sent((20, 96, 5), 8, lambda m: [nn.BatchNorm1d(m), activation()])
    model, x = case.model.float(), 20 * case.inputs.float()
    update = spear.federated.gradient(model, x, case.labels)
    result = spear.attack(model, over_all(update, 8) if biased else update, method="network", time_limit=300)
    assert len(result.inputs) == 8
    assert not result.certified.any()
    assert not result.differences.any()
    assert "epsilon does not show which" in result.reason
    assert bool((evaluate(result, x).relative_error <= 1.1 * result.error_bound.max()).all())


def test_a_running_mean_of_no_batch():
    case = sent((20, 96, 5), 6)
    told = {name: v.roll(1) if name.endswith("mean") else v for name, v in case.update.buffers.items()}
    result = spear.attack(case.model, replace(case.update, buffers=told), method="network", time_limit=300)
    assert not result.certified.any()
    assert result.differences.all()
    assert "the running mean is no batch's" in result.reason


def test_auto_and_an_undisclosed_size():
    case = sent(seed=2)
    assert spear.attack(case.model, case.update, time_limit=300).complete
    result = spear.attack(case.model, replace(case.update, count=None), time_limit=300)
    errors, _ = difference_errors(result, case.inputs)
    assert bool((errors < 1e-6).all())
    assert not result.certified.any()
    assert not result.differences.any()
    assert "not disclosed" in result.reason


def test_the_order_of_samples_and_units_does_not_matter():
    case = sent((30, 80, 5), 8, seed=4, spread=0.2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    again = spear.federated.gradient(case.model, case.inputs[order], case.labels[order])
    results = [spear.attack(case.model, u, method="network", time_limit=300) for u in (case.update, again)]
    apart = torch.cdist(*(r.inputs for r in results), compute_mode="donot_use_mm_for_euclid_dist")
    assert bool((apart.amin(1) < 1e-9).all())


@pytest.mark.parametrize("other", [1.5, 0.2])
def test_buffers_of_another_batch_are_not_believed(other):
    case = sent(seed=5)
    wrong = {name: value * other for name, value in case.update.buffers.items() if value.is_floating_point()}
    result = spear.attack(case.model, replace(case.update, buffers=wrong), method="network", time_limit=300)
    errors, _ = difference_errors(result, case.inputs)
    assert bool((errors < 1e-6).all())
    evaluation = evaluate(result, case.inputs, case.labels)
    assert not result.certified.any() or evaluation.precision == 1


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.bias", "3.weight"])
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_changed_update_is_not_certified(name, size):
    case = sent((30, 80, 5), 8, seed=6)
    nothing_certified_if_changed(case, name, size)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 1 / 3, 3.0])
@pytest.mark.parametrize("b", [2, 5])
@pytest.mark.parametrize("source", ["buffers", "epsilon"])
def test_a_scale_whose_gradient_has_a_factor_of_its_own(source, b, factor):
    """Epsilon's share of it is then that of no batch: of some units, or of all, no deviation is told."""
    case = sent((16, 32, 3), b, seed=3)
    g = case.update.gradients
    update = replace(case.update, gradients=g | {"1.weight": factor * g["1.weight"]})
    update = update if source == "buffers" else replace(update, buffers=None)
    result = spear.attack(case.model, update, method="network", time_limit=10)
    assert not result.certified.any()
    assert result.reason


def test_statistics_that_are_none():
    case = sent((30, 80, 5), 8)
    buffers = dict(case.update.buffers)
    with pytest.raises(ValueError, match="1.running_mean has shape"):
        spear.attack(case.model, replace(case.update, buffers=buffers | {"1.running_mean": torch.zeros(3)}))
    with pytest.raises(ValueError, match="1.running_var of the update holds NaN"):
        spear.attack(
            case.model, replace(case.update, buffers=buffers | {"1.running_var": torch.full((80,), torch.nan)})
        )
    negative = replace(case.update, buffers=buffers | {"1.running_var": -torch.ones(80)})  # no variance: epsilon then
    differences_back(spear.attack(case.model, negative, method="network", time_limit=300), case)


def test_what_is_needed():
    case = sent((30, 80, 5), 8, spread=0.2)
    g = dict(case.update.gradients)
    del g["1.bias"]
    with pytest.raises(Refusal, match="batch normalisation behind 0: without the gradients of its scale and shift"):
        spear.attack(case.model, replace(case.update, gradients=g), method="network")
    crowded = sent((60, 40, 10), 20)
    with pytest.raises(Refusal, match="a batch of 20 behind a normalisation needs width 56; a layer has 40"):
        spear.attack(crowded.model, crowded.update, method="network")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("source", ["buffers", "epsilon"])
def test_single_precision(source, seed):
    """By epsilon, what the samples leave over tells σ, but for one factor: whole, to less than a certificate needs."""
    case = sent((60, 160, 10), 8, seed=seed)
    model = case.model.float()
    update = spear.federated.gradient(model, case.inputs.float(), case.labels)
    if source == "buffers":
        differences_back(spear.attack(model, update, method="network", time_limit=300), case, 1e-3)
        return
    result = spear.attack(model, replace(update, buffers=None), method="network", time_limit=300)
    errors, nearest = difference_errors(result, case.inputs)
    assert nearest.unique().numel() == len(case.inputs), result.reason
    assert bool((errors < 1e-3).all())
    assert torch.equal(result.labels, case.labels[nearest])
    assert not result.differences.any() or bool((errors <= result.difference_bound).all())
    assert "the mean" in result.reason


def test_a_budget():
    case = sent((200, 120, 10), 20)
    result = spear.attack(case.model, case.update, method="network", max_proposals=1)
    assert not result.complete
    assert not result.certified.any()
    assert not result.differences.any()


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_a_state_that_a_client_sends_back(wrapped):
    """The whole state before and after a step of SGD, statistics included, as a server of FedAvg has them."""
    case = sent((60, 120, 10), 12, seed=1)
    before = {wrapped + name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    local = copy.deepcopy(case.model)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    nn.functional.cross_entropy(local(case.inputs), case.labels).backward()
    optimizer.step()
    after = {wrapped + name: tensor for name, tensor in local.state_dict().items()}
    update = difference(case.model, before, after, learning_rate=0.1, count=12)
    result = spear.attack(case.model, update, time_limit=300)
    differences_back(result, case)
    assert result.complete, result.reason


def test_aggregation_is_not_certified():
    case = sent((40, 120, 6), 8, seed=1)
    parts = [spear.federated.gradient(case.model, case.inputs[k::2], case.labels[k::2]) for k in (0, 1)]
    with pytest.raises(Refusal, match="8 samples are disclosed, the gradient shows 7"):
        spear.attack(case.model, aggregated(parts), method="network")
    undisclosed = replace(aggregated(parts), count=None)
    result = spear.attack(case.model, undisclosed, method="network", max_proposals=60)
    assert not result.certified.any()
    assert not result.differences.any()
