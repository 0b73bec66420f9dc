"""A certified sample is never wrong: hundreds of random small problems, honest and hostile."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import batch, judged, make, noisy

from spear import models
from spear.federated import SharedUpdate, gradient
from spear.published.certificate import certify, explain, recover_labels
from spear.published.greedy import disaggregate
from spear.published.view import open_layer


def judge(model, update, x, y):
    return judged(model, update, x, y, method="sampling", max_proposals=10_000)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(10, 60),
    st.integers(4, 30),
    st.integers(2, 4),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 10**6),
)
def test_honest_problems(b, m, n, depth, reduction, dtype, seed):
    x, y = batch(b, n, 5, seed=seed, dtype=dtype)
    model = models.fcnn((n,), m, depth, 5, seed=seed, dtype=dtype)
    judge(model, gradient(model, x, y, reduction=reduction), x, y)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(20, 60), st.floats(-16, -1), st.integers(0, 10**6))
def test_noise(b, m, exponent, seed):
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), m, 3, 5, seed=seed)
    judge(model, noisy(gradient(model, x, y), 10**exponent, seed), x, y)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.sampled_from(["all", "fc1", "fc2", "fc3"]), st.floats(-10, 0), st.integers(0, 10**6))
def test_wrong_weights(b, where, exponent, seed):
    """The server's weights differ from the client's: never a certificate unless the batch is right all the same."""
    x, y = batch(b, 20, 5, seed=seed)
    client, server = (models.fcnn((20,), 50, 3, 5, seed=seed) for _ in range(2))
    other = models.fcnn((20,), 50, 3, 5, seed=seed + 1)
    with torch.no_grad():
        for (name, p), q in zip(server.named_parameters(), other.parameters(), strict=True):
            if where == "all" or name.startswith(where):
                p += 10**exponent * q
    judge(server, gradient(client, x, y), x, y)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.sampled_from(["fc1.weight", "fc1.bias", "fc2.weight", "fc3.bias"]), st.integers(0, 10**6))
def test_another_batchs_gradient(b, name, seed):
    """One tensor of the update is of another batch."""
    x, y = batch(b, 20, 5, seed=seed)
    model = models.fcnn((20,), 50, 3, 5, seed=seed)
    mixed = dict(gradient(model, x, y).gradients)
    mixed[name] = gradient(model, *batch(b, 20, 5, seed=seed + 1)).gradients[name]
    result = judge(model, SharedUpdate(mixed, count=b), x, y)
    assert result is None or not result.certified.any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 7),
    st.sampled_from(["copy", "relabel", "sum", "zero", "affine"]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_rank_deficient_batches(b, kind, disclosed, seed):
    """Repeated images, with equal or other labels, a sum or an affine combination of others, a black image."""
    x, y = batch(b, 20, 5, seed=seed)
    x[-1] = {
        "copy": x[0],
        "relabel": x[0],
        "sum": x[:-1].sum(0),
        "zero": 0 * x[0],
        "affine": (2 * x[0] - x[1]) if b > 2 else x[0],
    }[kind]
    if kind != "relabel":
        y[-1] = y[0]
    model = models.fcnn((20,), 50, 3, 5, seed=seed)
    update = gradient(model, x, y)
    judge(model, update if disclosed else replace(update, count=None), x, y)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.floats(0, 3), st.sampled_from([torch.float64, torch.float32]), st.integers(0, 10**6))
def test_saturated_networks(b, exponent, dtype, seed):
    """Large weights: confident samples leave almost no trace, and columns of G differ by many orders of magnitude."""
    x, y = batch(b, 20, 5, seed=seed, dtype=dtype)
    model = models.fcnn((20,), 50, 3, 5, seed=seed, dtype=dtype)
    with torch.no_grad():
        model.fc3.weight *= 10**exponent
        model.fc2.weight *= 10 ** (exponent / 2)
    judge(model, gradient(model, x, y), x, y)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.floats(-9, 0), st.integers(0, 10**6))
def test_nearly_equal_images(b, exponent, seed):
    """An input that another one nearly repeats is poorly determined."""
    x, y = batch(b, 20, 5, seed=seed)
    x[-1] = x[0] + 10**exponent * x[-1]
    model = models.fcnn((20,), 50, 3, 5, seed=seed)
    judge(model, gradient(model, x, y), x, y)


@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_direction_among_right_ones_is_noticed(seed):
    problem = make(5, 60, 30, seed=seed)
    q = problem.q.clone()
    q[2] = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q[2] /= q[2].norm()
    _, X = disaggregate(problem.observed, q)
    certificate, _ = certify(problem.target, q, X.mT, problem.labels)
    assert not certificate.holds
    assert "matching coefficient" in certificate.why_not()
    _, X = disaggregate(problem.observed, problem.q)
    order = evaluate_order(X.mT, problem.inputs)
    right, off = certify(problem.target, problem.q, X.mT, problem.labels[order])
    assert right.holds
    assert float(off.max()) < 1e-9
    assert right.why_not() == ""
    wrong = problem.labels[order].clone()
    wrong[0] = (wrong[0] + 1) % 10
    certificate, off = certify(problem.target, problem.q, X.mT, wrong)
    assert not certificate.holds
    assert "a sample's own gradient is off by" in certificate.why_not()
    assert float(off[0]) > 0.1


def evaluate_order(found, truth):
    return torch.cdist(found, truth).argmin(1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("classes", [2, 10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_labels_agree_with_the_textbook_search(reduction, classes, seed):
    """One product J G serves all classes: the same labels as back-propagating every one of them."""
    x, y = batch(8, 30, classes, seed=seed)
    model = models.fcnn((30,), 60, 3, classes, seed=seed)
    update = gradient(model, x, y, reduction=reduction)
    target = open_layer(model, update)
    z = model[1](x).detach()
    G, _ = explain(target.layer, x, z, y, target.scale)
    slow = []
    for i in range(8):
        distance = [
            float((explain(target.layer, x[i : i + 1], z[i : i + 1], torch.tensor([c]), target.scale)[0] - G[i]).norm())
            for c in range(classes)
        ]
        slow.append(min(range(classes), key=distance.__getitem__))
    assert recover_labels(target.layer, z, G, target.scale).tolist() == slow == y.tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_explain_is_the_clients_gradient(reduction):
    problem = make(reduction=reduction)
    z = problem.model[1](problem.inputs).detach()
    G, gradients = explain(problem.target.layer, problem.inputs, z, problem.labels, problem.target.scale)
    assert gradients.keys() == problem.update.gradients.keys()
    for name, value in problem.update.gradients.items():
        torch.testing.assert_close(gradients[name][:], value)
    torch.testing.assert_close(G.mT @ problem.inputs, problem.update.gradients["fc1.weight"])
