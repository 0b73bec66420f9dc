"""The certificate of one layer alone: what it certifies is true, whatever the rest of the model is."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from problems import batch, judged, make, noisy
from torch import nn

from spear import models
from spear.federated import SharedUpdate, gradient
from spear.inversion import attack
from spear.metrics import evaluate
from spear.published import certificate, filtering, greedy
from spear.published.certificate import certify_layer
from spear.published.greedy import disaggregate
from spear.published.one_layer import reconstruct
from spear.published.view import open_layer
from spear.reconstruction import Stats

methods = st.sampled_from(["layer", "dictionary", "guided"])
seeds = st.integers(0, 10**6)


def alone(update, layer="fc1"):
    """What a server with a private head sees: one layer's gradient."""
    return replace(update, gradients={k: g for k, g in update.gradients.items() if k.startswith(layer)})


def body(model, layers=3):
    """The model up to the first layer's ReLU."""
    return model[:layers]


def judge(method, model, update, x, y, **options):
    result = judged(model, update, x, y, method=method, max_proposals=32 if method != "guided" else 2000, **options)
    assert result is None or result.labels is None or not len(result.inputs) or result.certified.any() or update.noise
    return result


@pytest.mark.parametrize("method", ["layer", "dictionary", "sampling", "guided", "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_a_private_head(method, seed):
    """The server has the layer and its gradient; its model ends there, or goes on with weights of its own."""
    problem = make(7, 120, 60, seed=seed)
    other = models.fcnn((60,), 120, 3, 10, seed=seed + 1)
    other.fc1.load_state_dict(problem.model.fc1.state_dict())
    for model in (body(problem.model), other):
        result = attack(model, alone(problem.update), method=method)
        report = evaluate(result, problem.inputs)
        assert report.recall == 1, result.reason
        assert not result.certified.any()
        assert result.labels is None
        assert torch.isinf(result.residuals).all()
        assert "each image up to its length" in result.reason
        assert "the update holds nothing of what follows fc1" in result.reason


@pytest.mark.parametrize("seed", range(3))
def test_where_the_rest_is_known_labels_come_too(seed):
    problem = make(7, 120, 60, seed=seed)
    result = attack(problem.model, alone(problem.update), method="layer")
    assert result.complete
    assert evaluate(result, problem.inputs, problem.labels).label_accuracy == 1


def test_where_the_rest_is_sent_it_must_agree():
    """The stronger certificate decides: a gradient of a later layer that does not fit is no detail."""
    problem = make(7, 120, 60)
    gradients = dict(problem.update.gradients)
    gradients["fc3.bias"] = gradients["fc3.bias"].flip(0)
    result = attack(problem.model, replace(problem.update, gradients=gradients), method="layer")
    assert len(result.inputs) == 7
    assert not result.certified.any()
    assert "reproduces the gradients to" in result.reason


def test_without_the_bias_gradient_there_is_no_scale():
    problem = make()
    update = replace(problem.update, gradients={"fc1.weight": problem.update.gradients["fc1.weight"]})
    with pytest.raises(ValueError, match="the update has no gradient for fc1.bias"):
        attack(problem.model, update, method="layer")


@pytest.mark.parametrize("seed", range(3))
def test_the_reasons(seed):
    """Every condition of the certificate, by the smallest change that breaks it."""
    problem = make(6, 90, 40, seed=seed)
    target, q = problem.target, problem.q
    X = disaggregate(target.observed, q)[1].mT
    assert certify_layer(target, q, X).holds  # by what fc2 reads
    target = unread(target)
    open_ = certify_layer(target, q, X)
    assert "each image up to its length: no sign of Z would change" in open_.why_not()
    assert float(open_.error_bound.min()) > 1e-3
    pinned, q, X = pinned_lengths(problem)
    target = unread(pinned)
    assert certify_layer(target, q, X).holds
    unknown = certify_layer(replace(target, disclosed=None), q, X)
    assert "the number of samples is not disclosed" in unknown.why_not()
    assert "6 samples were found, 9 disclosed" in certify_layer(replace(target, disclosed=9), q, X).why_not()
    turned = q.clone()
    turned[2] = greedy.disaggregate(target.observed, q)[0][0, :6] @ q
    assert "matching coefficient" in certify_layer(target, turned / turned.norm(dim=1, keepdim=True), X).why_not()
    blurred = replace(target, observed=replace(target.observed, tolerance=0.01))
    assert not certify_layer(blurred, q, X).holds
    assert not certify_layer(target, q, 1.001 * X).holds
    sure = certify_layer(target, q, X)
    assert "an input is determined to 1e-02 only" in replace(sure, error_bound=sure.error_bound + 0.01).why_not()


def unread(view):
    """The same view of a layer whose readers' gradients are not looked at."""
    return replace(view, layer=replace(view.layer, readers=()))


def pinned_lengths(problem):
    """The same batch at a layer of which two neurons a sample are so near zero, one on each side, that signs bound it.

    The layer's view, the true directions and the inputs.
    """
    model, x = problem.model, problem.inputs
    with torch.no_grad():
        for i, near in enumerate((x @ model.fc1.weight.mT).repeat_interleave(2, 0)):
            model.fc1.bias[i] = -near[i] * (1 + (-1) ** i * 1e-8)
    target = open_layer(model, gradient(model, x, problem.labels))
    Q = target.observed.R @ torch.linalg.pinv(x)
    return target, (Q / Q.norm(dim=0)).mT.contiguous(), x


@pytest.mark.parametrize("seed", range(3))
def test_spare_zeros_leave_out_dead_and_twin_neurons(seed):
    problem = make(5, 60, 40, 2, seed=seed)
    zeros = filtering.zero_rows(problem.observed.L, problem.q, tolerance=problem.observed.tolerance)
    expected = int((zeros & ~zeros.all(0)).sum(1).min()) - 4
    assert certificate.spare_zeros(problem.observed, problem.q) == expected
    model = models.fcnn((40,), 180, 2, 10)
    with torch.no_grad():
        for start in (0, 60):  # every neuron twice, once at half its weights
            model.fc1.weight[start : start + 60] = problem.model.fc1.weight / (1 + start / 60)
            model.fc1.bias[start : start + 60] = problem.model.fc1.bias / (1 + start / 60)
            model.fc2.weight[:, start : start + 60] = problem.model.fc2.weight
        model.fc1.bias[120:] = -100
    target = open_layer(model, gradient(model, problem.inputs, problem.labels))
    Q = target.observed.R @ torch.linalg.pinv(problem.inputs)
    assert certificate.spare_zeros(target.observed, (Q / Q.norm(dim=0)).mT.contiguous()) == expected


@settings(max_examples=50, deadline=None)
@given(
    methods,
    st.integers(1, 10),
    st.integers(10, 60),
    st.integers(4, 30),
    st.integers(2, 4),
    st.sampled_from([2, 3, 10]),
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
    seeds,
)
def test_honest_problems(method, b, m, n, depth, classes, dtype, disclosed, seed):
    x, y = batch(b, n, classes, seed=seed, dtype=dtype)
    model = models.fcnn((n,), m, depth, classes, seed=seed, dtype=dtype)
    update = alone(gradient(model, x, y))
    judge(method, body(model), update if disclosed else replace(update, count=None), x, y)


@settings(max_examples=30, deadline=None)
@given(methods, st.integers(1, 6), st.integers(20, 80), st.floats(-16, -1), seeds)
def test_noise(method, b, m, exponent, seed):
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), m, 3, 5, seed=seed)
    judge(method, body(model), alone(noisy(gradient(model, x, y), 10**exponent, seed)), x, y)


@settings(max_examples=30, deadline=None)
@given(
    methods, st.integers(1, 6), st.sampled_from(["fc1.weight", "fc1.bias"]), st.floats(-14, 0), st.floats(0, 1), seeds
)
def test_single_entries_that_were_changed(method, b, name, exponent, share, seed):
    """A few entries of the gradient, shifted by a little or by much, or set to zero."""
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), 60, 3, 5, seed=seed)
    update = alone(gradient(model, x, y))
    g = update.gradients[name].clone()
    generator = torch.Generator().manual_seed(seed)
    hit = torch.rand(g.shape, generator=generator) < 0.1 * share
    g[hit] = 0 if exponent > -1 else g[hit] + 10**exponent * g.abs().max()
    judge(method, body(model), replace(update, gradients={**update.gradients, name: g}), x, y)


@settings(max_examples=25, deadline=None)
@given(methods, st.integers(1, 6), st.floats(-10, 0), seeds)
def test_wrong_weights(method, b, exponent, seed):
    x, y = batch(b, 20, 5, seed=seed)
    client, server = (models.fcnn((20,), 60, 3, 5, seed=seed) for _ in range(2))
    other = models.fcnn((20,), 60, 3, 5, seed=seed + 1)
    with torch.no_grad():
        for p, q in zip(server.parameters(), other.parameters(), strict=True):
            p += 10**exponent * q
    judge(method, body(server), alone(gradient(client, x, y)), x, y)


@settings(max_examples=25, deadline=None)
@given(methods, st.integers(1, 6), st.sampled_from(["fc1.weight", "fc1.bias"]), seeds)
def test_another_batchs_tensor(method, b, name, seed):
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), 60, 3, 5, seed=seed)
    mixed = dict(alone(gradient(model, x, y)).gradients)
    mixed[name] = gradient(model, *batch(b, 20, 5, seed=seed + 1)).gradients[name]
    result = judge(method, body(model), SharedUpdate(mixed, count=b), x, y)
    assert result is None or not result.certified.any()


@settings(max_examples=30, deadline=None)
@given(
    methods,
    st.integers(2, 7),
    st.sampled_from(["copy", "relabel", "sum", "zero", "mean"]),
    st.sampled_from([2, 5]),
    st.integers(2, 3),
    st.booleans(),
    seeds,
)
def test_rank_deficient_batches(method, b, kind, classes, depth, disclosed, seed):
    x, y = batch(b, 20, classes, seed=seed)
    others = x[:-1]
    x[-1] = {"copy": x[0], "relabel": x[0], "sum": others.sum(0), "zero": 0 * x[0], "mean": others.mean(0)}[kind]
    if kind != "relabel":
        y[-1] = y[0]
    model = models.fcnn((20,), 60, depth, classes, seed=seed)
    update = alone(gradient(model, x, y))
    judge(method, body(model), update if disclosed else replace(update, count=None), x, y)


@settings(max_examples=30, deadline=None)
@given(methods, st.integers(2, 7), st.floats(-12, -1), st.integers(2, 3), st.booleans(), seeds)
def test_samples_that_merge(method, b, exponent, depth, disclosed, seed):
    """Two classes, one hidden layer: images that share an activation pattern have parallel gradients, and merge."""
    x, y = batch(b, 20, 2, seed=seed)
    x[-1] = x[0] + 10**exponent * x[-1]
    model = models.fcnn((20,), 50, depth, 2, seed=seed)
    update = alone(gradient(model, x, y))
    judge(method, body(model), update if disclosed else replace(update, count=None), x, y)


@settings(max_examples=30, deadline=None)
@given(methods, st.integers(1, 6), st.floats(0, 0.95), st.floats(0, 3), st.sampled_from([2, 5]), st.booleans(), seeds)
def test_dead_neurons_and_saturated_networks(method, b, dead, exponent, classes, disclosed, seed):
    x, y = batch(b, 20, classes, seed=seed)
    model = models.fcnn((20,), 80, 2, classes, seed=seed)
    with torch.no_grad():
        model.fc1.bias[: round(dead * 80)] = -100
        model.fc2.weight *= 10**exponent
    update = alone(gradient(model, x, y))
    judge(method, body(model), update if disclosed else replace(update, count=None), x, y)


@settings(max_examples=30, deadline=None)
@given(
    methods, st.integers(1, 5), st.sampled_from(["twins", "no bias", "integers", "always on"]), st.integers(2, 3), seeds
)
def test_structured_layers(method, b, kind, depth, seed):
    """Twin neurons, biases of zero, weights of -1, 0, 1 on binary images, neurons that every sample activates."""
    x, y = batch(b, 20, 2, seed=seed)
    model = models.fcnn((20,), 60, depth, 2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if kind == "twins":
            model.fc1.weight[30:], model.fc1.bias[30:] = model.fc1.weight[:30].clone(), model.fc1.bias[:30].clone()
            model.fc2.weight[:, 30:] = model.fc2.weight[:, :30].clone()
        elif kind == "no bias":
            model.fc1.bias.zero_()
        elif kind == "integers":
            x = (x > 0).double()
            model.fc1.weight.copy_(torch.randint(-1, 2, (60, 20), generator=generator))
        else:
            model.fc1.bias[:50] = 100
    judge(method, body(model), alone(gradient(model, x, y)), x, y)


@settings(max_examples=30, deadline=None)
@given(methods, st.integers(1, 5), st.integers(1, 8), seeds)
def test_a_wrong_batch_size(method, b, claimed, seed):
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), 60, 3, 5, seed=seed)
    update = alone(replace(gradient(model, x, y), count=None))
    result = judge(method, body(model), update, x, y, batch_size=claimed)
    assert result is None or claimed == b or not result.certified.any()


@settings(max_examples=30, deadline=None)
@example(2, 6, 2, 3, False, 22342)
@given(st.integers(2, 4), st.integers(6, 14), st.integers(2, 3), st.sampled_from([2, 3, 5]), st.booleans(), seeds)
def test_no_other_factorisation_has_the_pattern(b, m, depth, classes, correlated, seed):
    """Every set of b directions that are kernels of b - 1 rows each, in layers so small that all can be tried."""
    x, y = batch(b, 6, classes, seed=seed)
    x = x[0] + 0.5 * x if correlated else x
    model = models.fcnn((6,), m, depth, classes, seed=seed)
    update = gradient(model, x, y)
    assume(bool(update.gradients["fc1.weight"].any()))  # a layer of which no sample activates a unit has no columns
    target = open_layer(model, update)
    observed = target.observed
    if target.low.rank < b or target.low.gap < 1e6:
        return
    true = nn.functional.normalize(observed.R @ torch.linalg.pinv(x), dim=0)
    rows = torch.tensor(list(itertools.combinations(range(m), b - 1)))
    _, s, V = torch.linalg.svd(observed.L[rows])
    q = V[:, -1][s[:, -1] > 1e-9]
    q = q[filtering.deduplicate(q)]
    q = q[filtering.determined(observed.L, q, tolerance=observed.tolerance)][:16]
    for chosen in itertools.combinations(range(len(q)), b):
        own = q[list(chosen)]
        if abs(torch.linalg.det(own)) < 1e-9 or greedy.matching_coefficient(observed, own) < 1:
            continue
        assert ((own @ true).abs().amax(1) > 1 - 1e-7).all()


def test_columns_whose_weights_cancel_are_no_inputs():
    """Dependent samples: a direction that the bias gradient does not see has no length, and nothing is returned."""
    problem = make()
    view = replace(problem.target, observed=replace(problem.observed, d=torch.zeros_like(problem.observed.d)))
    found = greedy.Candidates(problem.q, torch.arange(len(problem.q)), 1.0, 0, 0, "")
    result = reconstruct(view, found, Stats(0.0))
    assert not len(result.inputs)
    assert not result.complete
    assert "weights cancel" in result.reason
