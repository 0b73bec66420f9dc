"""One layer's columns by descent: `spear.descent.layer`, and through the front door."""

import math

import pytest
import torch
from problems import batch, make
from torch import nn

from spear import data, models
from spear.descent import columns, layer
from spear.descent.coupling import Prior, uncoupled
from spear.descent.sharpening import sharpen
from spear.federated import SharedUpdate, gradient
from spear.inversion import attack
from spear.metrics import evaluate, truth
from spear.published.greedy import disaggregate
from spear.published.view import open_layer
from spear.reconstruction import Terms
from spear.study import ablations


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_column_is_a_fixed_point():
    problem = make(8, 150, 60)
    V = torch.linalg.inv(problem.q).mT
    sign = torch.sign(V.mT @ problem.observed.d)
    nothing = Prior(problem.observed)(problem.q[:0])
    found, z = layer.reflect(problem.observed, nothing, problem.q, V * sign[:, None], layer.schedule(50))
    assert len(found) == len(z) == 8
    torch.testing.assert_close(z.square().mean(1), torch.ones(8))
    found = sharpen(problem.observed.L.float(), found, z)[0]
    assert ((found.double() @ problem.q.mT).abs().amax(1) > 0.98).float().mean() > 0.7


@pytest.mark.parametrize("steps", [40, 100])
@pytest.mark.parametrize("seed", range(3))
def test_all_starts_at_once_are_each_start_alone(seed, steps):
    problem = make(10, 120, 60, seed=seed)
    starts, coupling = problem.observed.L[:6], Prior(problem.observed)(problem.q[:2])
    stages = layer.schedule(steps)
    together = layer.reflect(problem.observed, coupling, starts, starts, stages)[0]
    alone = torch.cat([layer.reflect(problem.observed, coupling, q, q, stages)[0] for q in starts.split(1)])
    assert len(together) == 6
    assert ((together @ alone.mT).amax(1) > 0.99).all()


def test_stages_count_their_steps_and_drop_starts():
    problem = make(8, 60, 40)
    assert layer.operations(problem.observed, 16, 70) == 2 * (2 * 60 * 16 + 16**2) * 16 * 70
    apart = layer.schedule(70, coupled=False)
    assert all((stage.coupling, stage.ridge) == (0, 0) for stage in apart)
    starts = problem.observed.L[:8]
    left, _ = layer.reflect(problem.observed, uncoupled(problem.q[:0]), starts, starts, apart)
    assert len(left) == math.ceil(math.prod(stage.kept for stage in apart) * 8) < 8


@pytest.mark.parametrize("seed", range(3))
def test_known_columns_are_not_found_again(seed):
    """The parting weight: q keeps away from known columns, though their v are known by their signs only."""
    problem = make(40, 300, 120, seed=seed)
    known = problem.q[:20]
    coupling = Prior(problem.observed)(known)
    v = columns.draw(problem.observed, coupling.free, 32, torch.Generator().manual_seed(seed))
    q, z = layer.reflect(problem.observed, coupling, v @ coupling.moment, v, layer.schedule(60))
    q = sharpen(problem.observed.L.float(), q, z)[0].double()
    assert float(((q @ problem.q[20:].mT).abs().amax(1) > 0.98).double().mean()) > 0.5
    assert not ((q @ known.mT).abs() > 0.98).any()


@pytest.mark.parametrize("spread", [0, 3, 6])
def test_balanced_starts_give_every_sample_a_like_share(spread):
    """v = V a: the coefficients a are alike in units of the inputs, though gradients differ by many orders."""
    x, _ = batch(8, 40)
    model = models.fcnn((40,), 200, 2, 10)
    weight = torch.logspace(0, -spread, 8, dtype=torch.float64)
    G = (model.fc1(x).mT > 0) * normal(200, 8) * weight
    observed = open_layer(model, SharedUpdate({"fc1.weight": G @ x, "fc1.bias": G.sum(1)}, count=8)).observed
    q, v = layer.balanced(observed, torch.eye(8, dtype=torch.float64), 4000, torch.Generator().manual_seed(0))
    share = ((v @ observed.R @ torch.linalg.pinv(x)) * x.norm(dim=1)).square()
    share = (share / share.sum(1, keepdim=True)).mean(0)
    assert float(share.max() / share.min()) < 3
    assert (v @ observed.d >= 0).all()
    torch.testing.assert_close(q.norm(dim=1), torch.ones(4000, dtype=torch.float64))


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_trained_networks(depth, seed):
    """After 300 steps the sizes of the columns differ by orders: all that are above rounding come back."""
    x, y = data.load("digits", count=60, seed=seed)
    model = models.fcnn((1, 8, 8), 300, depth, 10, seed=seed)
    ablations.train(model, torch.optim.SGD(model.parameters(), lr=0.05), x[20:], y[20:], steps=300, seed=seed)
    result = attack(model, gradient(model, x[:20], y[:20]), method="layer")
    report = evaluate(result, x[:20], y[:20])
    assert (report.recall, report.precision) == (1, 1), result.reason


@pytest.mark.parametrize("count", [6, 8])
@pytest.mark.parametrize("start", range(2))
@pytest.mark.parametrize("seed", range(2))
def test_deep_layers_where_samples_agree(seed, start, count):
    """The last hidden layer of six: four neurons of five tell no sample from another."""
    x, y = data.load("digits", count=count, seed=seed)
    model = models.fcnn((1, 8, 8), 400, 6, 10, seed=seed)
    result = attack(model, gradient(model, x, y), method="layer", layer="fc5", seed=start)
    report = evaluate(result, truth.layer_truth(model, "fc5", x, y)[0].mT, y)
    assert (report.recall, report.precision) == (1, 1), result.reason


@pytest.mark.parametrize(("b", "m"), [(1, 20), (2, 20), (3, 40), (12, 150), (40, 300)])
@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_all_columns(b, m, depth, seed):
    problem = make(b, m, 80, depth, seed=seed)
    found = layer.find_columns(problem.observed, Terms(seed=seed))
    assert found.matching == 1, found.spent
    _, X = disaggregate(problem.observed, found.q[found.basis])
    order = torch.cdist(problem.inputs, X.mT).argmin(1)
    torch.testing.assert_close(X.mT[order], problem.inputs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["layer", "dictionary"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_through_the_front_door(method, dtype, reduction):
    problem = make(12, 150, 60, dtype=dtype, reduction=reduction)
    result = attack(problem.model, problem.update, method=method)
    report = evaluate(result, problem.inputs, problem.labels)
    assert result.complete, result.reason
    assert (report.recall, report.precision, report.label_accuracy) == (1, 1, 1)


@pytest.mark.parametrize("method", ["layer", "dictionary", "sampling"])
@pytest.mark.parametrize("name", ["fc1", "fc2", "fc3"])
def test_any_layer_that_a_relu_follows_gives_its_own_inputs(method, name):
    x, y = batch(6, 40)
    model = models.fcnn((40,), 120, 4, 10)
    names = list(dict(model.named_children()))
    features = model[: names.index(name)](x).detach()
    result = attack(model, gradient(model, x, y), method=method, layer=name)
    assert result.complete, result.reason
    assert evaluate(result, features, y).recall == 1


@pytest.mark.parametrize("method", ["layer", "dictionary"])
def test_permuting_neurons_or_scaling_the_loss_changes_nothing(method):
    problem = make(10, 120, 60, 2)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    model = models.fcnn((60,), 120, 2, 10)
    with torch.no_grad():
        model.fc1.weight.copy_(problem.model.fc1.weight[order])
        model.fc1.bias.copy_(problem.model.fc1.bias[order])
        model.fc2.weight.copy_(problem.model.fc2.weight[:, order])
        model.fc2.bias.copy_(problem.model.fc2.bias)
    for reduction in ("mean", "sum"):
        update = gradient(model, problem.inputs, problem.labels, reduction=reduction)
        result = attack(model, update, method=method)
        assert evaluate(result, problem.inputs, problem.labels).recall == 1, result.reason


@pytest.mark.parametrize("method", ["layer", "dictionary"])
def test_without_bias_inputs_come_up_to_scale_and_uncertified(method):
    problem = make(6, 120, 50, bias=False)
    result = attack(problem.model, problem.update, method=method)
    direction = problem.inputs / problem.inputs.norm(dim=1, keepdim=True)
    assert evaluate(result, direction).recall == 1
    assert not result.certified.any()
    assert "fc1 has no bias" in result.reason


@pytest.mark.parametrize("method", ["layer", "dictionary"])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("seed", range(2))
def test_under_noise_the_images_come_back_uncertified(method, size, seed):
    problem = make(6, 300, 100, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    noisy = {
        name: g + size * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator, dtype=g.dtype)
        for name, g in problem.update.gradients.items()
    }
    result = attack(problem.model, SharedUpdate(noisy, count=6), method=method)
    report = evaluate(result, problem.inputs, problem.labels)
    assert not result.certified.any()
    assert not result.complete
    assert "not certified" in result.reason
    assert float(report.relative_error.max()) < 30 * size
    assert report.label_accuracy == 1


@pytest.mark.parametrize("method", ["layer", "dictionary"])
def test_a_tenth_of_noise_leaves_images_to_be_seen(method):
    problem, size = make(16, 400, 800, seed=0), 0.1
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: g + size * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator, dtype=g.dtype)
        for name, g in problem.update.gradients.items()
    }
    result = attack(problem.model, SharedUpdate(noisy, count=16), method=method)
    assert len(result.inputs) == 16
    assert not result.certified.any()
    assert float(evaluate(result, problem.inputs, problem.labels).relative_error.max()) < 3 * size


@pytest.mark.parametrize("method", ["layer", "dictionary"])
def test_noise_alone_gives_nothing(method):
    problem = make(6, 100, 60)
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in problem.update.gradients.items()
    }
    result = attack(problem.model, SharedUpdate(noise), method=method)
    assert len(result.inputs) == 0
    assert "shows no rank" in result.reason


@pytest.mark.parametrize("method", ["layer", "dictionary"])
def test_past_the_limit_is_an_honest_incomplete_result(method):
    problem = make(20, 28, 40)
    result = attack(problem.model, problem.update, method=method)
    assert len(result.inputs) == 0
    assert not result.complete
    assert "found no further column" in result.reason
    assert f"{method}: " in result.reason


def test_the_reason_counts_the_neurons_that_tell_anything():
    """The last hidden layer of a deep and narrow network: most neurons agree on all samples."""
    x, y = data.load("digits", count=8)
    model = models.fcnn((1, 8, 8), 60, 6, 10)
    result = attack(model, gradient(model, x, y), method="layer", layer="fc5", max_proposals=16)
    silent = int((truth.layer_truth(model, "fc5", x, y)[1] == 0).all(1).sum())
    assert not len(result.inputs)
    assert f"of 60 neurons {60 - silent} tell anything, the others see no sample" in result.reason


@pytest.mark.parametrize("method", ["layer", "dictionary"])
def test_budgets_are_kept(method):
    problem = make(45, 60, 80)
    result = attack(problem.model, problem.update, method=method, max_proposals=100)
    assert "the budget of 100 proposals was spent" in result.reason
    assert 100 <= result.stats.proposals < 200
    result = attack(problem.model, problem.update, method=method, time_limit=0)
    assert "the time limit of 0 s was reached" in result.reason
    assert result.stats.proposals == 0


def test_progress_counts_up_to_the_whole_batch():
    problem, seen = make(12, 150, 60), []
    attack(problem.model, problem.update, method="layer", progress=seen.append)
    assert seen[-1].found == seen[-1].rank == 12
    assert [p.proposals for p in seen] == sorted(p.proposals for p in seen)


def test_auto_couples_one_layer_where_the_model_is_no_chain():
    model = nn.Sequential(nn.Linear(80, 200), nn.ReLU(), nn.LayerNorm(200), nn.Linear(200, 10)).double()
    x, y = batch(30, 80)
    result = attack(model, gradient(model, x, y), method="auto")
    assert result.complete, result.reason
    assert evaluate(result, x, y).recall == 1


@pytest.mark.parametrize(("dataset", "b"), [("mnist", 48), ("mnist", 80), ("cifar10", 90)])
def test_real_images(real_data, dataset, b):
    x, y = data.load(dataset, count=b, root=real_data)
    model = models.fcnn(x.shape[1:], 300, 4, 10)
    result = attack(model, gradient(model, x, y), method="layer")
    report = evaluate(result, x, y)
    assert result.complete, result.reason
    assert (report.recall, report.precision, report.label_accuracy) == (1, 1, 1)
