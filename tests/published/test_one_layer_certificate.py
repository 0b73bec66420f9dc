"""Descents on one layer never certify what is wrong: hundreds of small problems, honest and hostile."""

from dataclasses import replace

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import batch, judged, noisy

from spear import models
from spear.federated import SharedUpdate, gradient

methods = st.sampled_from(["layer", "dictionary"])
seeds = st.integers(0, 10**6)


def judge(method, model, update, x, y, **options):
    return judged(model, update, x, y, method=method, max_proposals=32, **options)


@settings(max_examples=60, deadline=None)
@given(
    methods,
    st.integers(1, 10),
    st.integers(10, 60),
    st.integers(4, 30),
    st.integers(2, 4),
    st.sampled_from([torch.float64, torch.float32]),
    seeds,
)
@example("layer", 2, 10, 9, 2, torch.float64, 9)  # known columns leave nothing of some starts
def test_honest_problems(method, b, m, n, depth, dtype, seed):
    x, y = batch(b, n, 5, seed=seed, dtype=dtype)
    model = models.fcnn((n,), m, depth, 5, seed=seed, dtype=dtype)
    judge(method, model, gradient(model, x, y), x, y)


@settings(max_examples=60, deadline=None)
@given(methods, st.integers(1, 6), st.integers(20, 80), st.floats(-16, -1), st.booleans(), seeds)
def test_noise(method, b, m, exponent, disclosed, seed):
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), m, 3, 5, seed=seed)
    update = noisy(gradient(model, x, y), 10**exponent, seed)
    judge(method, model, update if disclosed else replace(update, count=None), x, y)


@settings(max_examples=40, deadline=None)
@given(methods, st.integers(1, 6), st.sampled_from(["all", "fc1", "fc2", "fc3"]), st.floats(-10, 0), seeds)
def test_wrong_weights(method, b, where, exponent, seed):
    x, y = batch(b, 20, 5, seed=seed)
    client, server = (models.fcnn((20,), 60, 3, 5, seed=seed) for _ in range(2))
    other = models.fcnn((20,), 60, 3, 5, seed=seed + 1)
    with torch.no_grad():
        for (name, p), q in zip(server.named_parameters(), other.parameters(), strict=True):
            if where == "all" or name.startswith(where):
                p += 10**exponent * q
    judge(method, server, gradient(client, x, y), x, y)


@settings(max_examples=40, deadline=None)
@given(methods, st.integers(1, 6), st.sampled_from(["fc1.weight", "fc1.bias", "fc2.weight", "fc3.bias"]), seeds)
def test_another_batchs_tensor(method, b, name, seed):
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), 60, 3, 5, seed=seed)
    mixed = dict(gradient(model, x, y).gradients)
    mixed[name] = gradient(model, *batch(b, 20, 5, seed=seed + 1)).gradients[name]
    result = judge(method, model, SharedUpdate(mixed, count=b), x, y)
    assert result is None or not result.certified.any()


@settings(max_examples=40, deadline=None)
@given(methods, st.integers(2, 7), st.sampled_from(["copy", "relabel", "sum", "zero"]), st.booleans(), seeds)
def test_rank_deficient_batches(method, b, kind, disclosed, seed):
    x, y = batch(b, 20, 5, seed=seed)
    x[-1] = {"copy": x[0], "relabel": x[0], "sum": x[:-1].sum(0), "zero": 0 * x[0]}[kind]
    if kind != "relabel":
        y[-1] = y[0]
    model = models.fcnn((20,), 60, 3, 5, seed=seed)
    update = gradient(model, x, y)
    judge(method, model, update if disclosed else replace(update, count=None), x, y)


@settings(max_examples=40, deadline=None)
@given(methods, st.integers(1, 6), st.floats(0, 0.9), st.floats(0, 2), seeds)
def test_dead_neurons_and_saturated_networks(method, b, dead, exponent, seed):
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), 80, 3, 5, seed=seed)
    with torch.no_grad():
        model.fc1.bias[: round(dead * 80)] = -100
        model.fc3.weight *= 10**exponent
    judge(method, model, gradient(model, x, y), x, y)


@settings(max_examples=30, deadline=None)
@given(methods, st.integers(1, 5), st.integers(1, 8), seeds)
def test_a_wrong_batch_size(method, b, claimed, seed):
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), 60, 3, 5, seed=seed)
    judge(method, model, replace(gradient(model, x, y), count=None), x, y, batch_size=claimed)
