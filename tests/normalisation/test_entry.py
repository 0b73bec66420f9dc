"""BatchNorm on the data: whole batches by the buffers, in the samples' own units; buffers that lie certify nothing."""

from dataclasses import replace

import pytest
import torch
from normalised_problems import difference_errors, sent
from torch import nn

import spear
from spear.metrics import evaluate

BETWEEN = {
    "none": lambda m: nn.Identity(),
    "layer": nn.LayerNorm,
    "dropout": lambda m: nn.Dropout(0.2),
}


def client(between, seed=0, shape=(60,)):
    case = sent((60, 160, 10), 10, BETWEEN[between], seed=seed)
    channels = shape[0]
    first = nn.BatchNorm2d(channels) if len(shape) == 3 else nn.BatchNorm1d(channels)
    model = nn.Sequential(first.double(), nn.Flatten(), *case.model).train()
    with torch.no_grad():
        first.weight += 0.3 * torch.randn(channels, generator=torch.Generator().manual_seed(seed))
    x = 3 * case.inputs.reshape(-1, *shape) - 1
    return model, x, case.labels, spear.federated.gradient(model, x, case.labels)


@pytest.mark.parametrize("shape", [(60,), (3, 4, 5)])
@pytest.mark.parametrize("between", BETWEEN)
def test_the_whole_batch(between, shape):
    model, x, y, update = client(between, shape=shape)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    result = spear.attack(model, update, time_limit=300)
    evaluation = evaluate(result, x, y)
    assert result.complete, result.reason
    assert evaluation.recall == evaluation.precision == evaluation.label_accuracy == 1
    assert "those that its running statistics tell" in result.reason
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def over_all(update, variance):
    """The update where the running variance is taken over all entries, not over one less."""
    kept = {name: v for name, v in update.buffers.items() if not name.endswith("running_var")}
    (name,) = set(update.buffers) - set(kept)
    return replace(update, buffers=kept | {name: (0.9 + 0.1 * variance).to(update.buffers[name])})


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", [(60,), (3, 4, 5)])
def test_a_variance_over_all_entries(shape, seed):
    """As Flax and Keras take it: epsilon shows which in double precision."""
    model, x, y, update = client("none", seed, shape)
    variance = x.var([0, *range(2, x.ndim)], unbiased=False)
    result = spear.attack(model, over_all(update, variance), time_limit=300)
    report = evaluate(result, x, y)
    assert result.complete, result.reason
    assert bool((report.relative_error < result.error_bound.max()).all())


@pytest.mark.parametrize("biased", [False, True])
def test_entries_that_are_the_same_in_all_samples(biased):
    """As the black margins of pictures."""
    model, x, y, _ = client("none")
    x[:, ::3] = torch.linspace(-1, 1, 20, dtype=x.dtype)
    update = spear.federated.gradient(model, x, y)
    result = spear.attack(model, over_all(update, x.var(0, unbiased=False)) if biased else update, time_limit=300)
    assert result.complete, result.reason
    assert bool((evaluate(result, x, y).relative_error < result.error_bound.max()).all())


@pytest.mark.parametrize("biased", [False, True])
def test_single_precision_does_not_show_which(biased):
    model, x, y, _ = client("none")
    model, x = model.float(), x.float()
    update = spear.federated.gradient(model, x, y)
    update = over_all(update, x.var(0, unbiased=False)) if biased else update
    result = spear.attack(model, update, time_limit=300)
    assert len(result.inputs) == len(x)
    assert not result.certified.any()
    assert "epsilon does not show which" in result.reason
    assert float(evaluate(result, x, y).relative_error.max()) < float(result.error_bound.max())


@pytest.mark.parametrize("factor", [0.99, 1.01, 3.0])
@pytest.mark.parametrize("shape", [(60,), (3, 4, 5)])
def test_a_variance_that_is_not_the_batchs(shape, factor):
    model, _, _, update = client("none", shape=shape)
    buffers = {name: v * factor if name.endswith("var") else v for name, v in update.buffers.items()}
    result = spear.attack(model, replace(update, buffers=buffers), time_limit=300)
    assert not result.certified.any()
    assert not result.differences.any()
    assert not result.complete
    assert "do not have the variance" in result.reason


@pytest.mark.parametrize("told", [{"buffers": None}, {"count": 10, "buffers": None}])
@pytest.mark.parametrize("shape", [(60,), (3, 4, 5)])
def test_deviations_by_epsilon(told, shape):
    model, x, y, update = client("none", shape=shape)
    result = spear.attack(model, replace(update, **told), method="network", time_limit=300)
    errors, nearest = difference_errors(result, x)
    own = x.flatten(1) if len(shape) == 1 else x - x.mean((0, 2, 3), keepdim=True)
    assert bool((errors < 1e-6).all())
    assert torch.equal(result.labels, y[nearest])
    assert not result.certified.any()
    assert "no gradient depends on the mean of the data" in result.reason
    assert bool(result.differences.all())
    assert bool((errors <= result.difference_bound).all())
    assert len(shape) == 1 or torch.allclose(result.inputs, own[nearest], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_dropout_of_the_data(seed):
    """What it left comes back; no sample is certain."""
    case = sent((60, 160, 10), 8, lambda m: [nn.GELU()], seed=seed)
    model = nn.Sequential(nn.Dropout(0.2), *case.model).train()
    update = spear.federated.gradient(model, case.inputs, case.labels)
    result = spear.attack(model, update, time_limit=300)
    assert "(p = 0.2) took entries of the samples" in result.reason
    assert not result.certified.any()
    order = torch.cdist(result.inputs, case.inputs).argmin(1)
    left = result.inputs.abs() > 1e-9
    assert order.unique().numel() == 8
    assert torch.equal(result.labels, case.labels[order])
    assert 0.7 < float(left.double().mean()) < 0.9
    assert torch.allclose(result.inputs[left], case.inputs[order][left], atol=1e-9)
