"""Samples of unequal weight: clipping and unequal clients give everything back, certified, and never anything else."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from network_problems import DTYPE, Case, case, errors, logits
from problems import batch
from torch import Generator, Tensor

from spear import attack, metrics, models
from spear.federated import clients, gradient, privacy
from spear.network import check, whole_batch
from spear.network.labels import bias_system, decode_weighted, reweighed
from spear.network.problem import NetworkView, Targets, forward, passes
from spear.network.recovery import Judged, Reached
from spear.reconstruction import Budget, Terms


def weighted(sizes: tuple[int, ...], inputs: Tensor, weights: Tensor, *, seed: int = 0, **options: object) -> Case:
    """A batch whose samples' losses are weighted, its gradient by autograd."""
    made = case(sizes, inputs=inputs, seed=seed, **options)
    live = [(w.clone().requires_grad_(), c.clone().requires_grad_()) for w, c in zip(*_parameters(made), strict=True)]
    loss = (weights * F.cross_entropy(logits(live, inputs), made.labels, reduction="none")).sum()
    flat = torch.autograd.grad(loss, [t for layer in live for t in layer])
    size = len(inputs) if options.get("known", True) else None
    problem = NetworkView(*_parameters(made), tuple(flat[::2]), tuple(flat[1::2]), size)
    return Case(problem, inputs, made.labels)


def _parameters(made: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return made.problem.weights, made.problem.biases


def _drawn(b: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    x = torch.randn(b, n, generator=generator, dtype=DTYPE)
    return x, (0.02 + 0.98 * torch.rand(b, generator=generator, dtype=DTYPE)) / b


def _right(found: Judged, made: Case, weights: Tensor) -> None:
    """What is certified is in the batch, with its label and with its weight."""
    sure = found.certified
    for x, counts, weight in zip(found.inputs[sure], found.counts[sure], found.weights[sure], strict=True):
        off = (made.inputs - x).norm(dim=1) / x.norm()
        nearest = int(off.argmin())
        assert off[nearest] < 1e-6
        assert int(counts.argmax()) == int(made.labels[nearest])
        assert float(weight) == pytest.approx(float(weights[nearest]), rel=1e-6)


@pytest.mark.parametrize("sizes", [(60, 120, 10), (60, 120, 120, 10), (60, 120, 120, 120, 120, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_unequal_weights_are_recovered_with_the_samples(sizes, seed):
    x, weights = _drawn(20, 60, seed)
    made = weighted(sizes, x, weights, seed=seed)
    found = whole_batch.distinct_samples(made.problem, Terms())
    assert found.complete, found.reason
    assert found.certified.all()
    assert errors(found.inputs, x).max() < 1e-9
    _right(found, made, weights)


@pytest.mark.parametrize("method", ["auto", "network"])
@pytest.mark.parametrize("disclosed", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_clipping_hides_nothing(method, disclosed, seed):
    inputs, labels = batch(8, 120, seed=seed)
    model = models.fcnn((120,), 150, 3, 10, seed=seed)
    sent = privacy.private(model, inputs, labels, clip=_median_norm(model, inputs, labels), noise_multiplier=0.0)
    update = sent if disclosed else type(sent)(sent.gradients, count=8)
    result = attack(model, update, method=method)
    seen = metrics.evaluate(result, inputs, labels)
    assert result.complete, result.reason
    assert (seen.recall, seen.precision, seen.label_accuracy) == (1, 1, 1)
    assert float(result.weights.max()) <= (1 + 1e-9) / 8
    assert float(result.weights.min()) < 0.999 / 8


def _median_norm(model, inputs, labels) -> float:
    each = [gradient(model, x[None], y[None]).gradients.values() for x, y in zip(inputs, labels, strict=True)]
    return float(torch.stack([sum(g.norm() ** 2 for g in one) ** 0.5 for one in each]).median())


@pytest.mark.parametrize("counts", [(4, 4, 1), (1, 2, 9)])
def test_an_average_over_unequal_clients_gives_each_sample_its_clients_weight(counts):
    inputs, labels = batch(sum(counts), 60)
    model = models.fcnn((60,), 120, 3, 10)
    parts = zip(inputs.split(counts), labels.split(counts), strict=True)
    update = clients.aggregated([gradient(model, x, y) for x, y in parts], by="clients")
    result = attack(model, update)
    seen = metrics.evaluate(result, inputs, labels)
    assert result.complete, result.reason
    assert (seen.recall, seen.precision, seen.label_accuracy) == (1, 1, 1)
    own = torch.cat([torch.full((k,), 1 / (len(counts) * k), dtype=DTYPE) for k in counts])
    torch.testing.assert_close(result.weights[seen.match], own, rtol=1e-9, atol=0)


def test_equal_weights_are_not_reported():
    inputs, labels = batch(6, 60)
    model = models.fcnn((60,), 120, 3, 10)
    assert attack(model, gradient(model, inputs, labels)).weights is None


@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(1, 3),
    outputs=st.sampled_from((2, 3, 3, 4, 10)),
    n=st.integers(1, 30),
    b=st.integers(1, 8),
    scale=st.sampled_from((0.03, 1.0, 30.0)),
    spread=st.sampled_from((0.0, 1.0, 3.0)),
    known=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_no_weights_make_a_false_certificate(seed, depth, outputs, n, b, scale, spread, known):
    """Narrow layers, saturated networks, near-copies, few classes: a sample is certified rightly or not at all."""
    generator = Generator().manual_seed(seed)
    sizes = (n, *torch.randint(6, 40, (depth,), generator=generator).tolist(), outputs)
    x = scale * torch.randn(b, n, generator=generator, dtype=DTYPE)
    if b > 1 and seed % 3 == 0:  # two images that nearly agree
        x[1] = x[0] + 10 ** (-1.0 - seed % 8) * x[1]
    weights = 10 ** (-spread * torch.rand(b, generator=generator, dtype=DTYPE)) / b
    made = weighted(sizes, x, weights, seed=seed, known=known)
    if not made.problem.weight_gradients[0].any():
        return
    with mock.patch.object(whole_batch, "IDLE", 1):
        found = whole_batch.distinct_samples(made.problem, Terms(Budget(0.3)))
    if found.weights is not None:
        _right(found, made, weights)
    assert (errors(made.inputs, found.inputs) <= found.error_bound)[found.certified].all()


@pytest.mark.parametrize("factor", [0.5, 2.0, 1.001])
def test_a_scaled_input_with_the_inverse_weight_is_no_explanation(factor):
    """It leaves the first layer's weight gradient as it is: the biases tell."""
    x, weights = _drawn(5, 30)
    made = weighted((30, 60, 60, 10), x, weights)
    right = Targets(F.one_hot(made.labels, 10).to(x) * weights[:, None], 1.0, 0.0, whole=False)
    assert reweighed(made.problem, x, right).error == 0
    other = x.clone()
    other[2] *= factor
    counts = right.counts.clone()
    counts[2] /= factor
    wrong = Targets(counts, 1.0, 0.0, whole=False)
    assert reweighed(made.problem, other, wrong).error == float("inf")
    assert len(check.judge(made.problem, other, wrong, _reached(5)).inputs) == 0
    assert check.judge(made.problem, x, right, _reached(5)).certified.all()


def _reached(rank: int) -> Reached:
    return Reached(rank, 0.0, rank, 0, 0)


def test_weights_are_the_least_squares_of_the_bias_gradients():
    x, weights = _drawn(6, 30)
    made = weighted((30, 40, 50, 10), x, weights)
    targets = Targets(F.one_hot(made.labels, 10).to(x), 1.0, 0.0)
    deltas = passes(made.problem, x, targets).deltas
    gram = sum(d @ d.T for d in deltas)
    right = sum(d @ g for d, g in zip(deltas, made.problem.bias_gradients, strict=True))
    torch.testing.assert_close(torch.linalg.solve(gram, right), weights)
    D, g = bias_system(made.problem, deltas)
    torch.testing.assert_close(weights @ D, g)


@pytest.mark.parametrize("case_", ["right", "two classes", "no bias", "size unknown", "one is missing", "mixed"])
def test_what_weights_are_believed(case_):
    outputs = 2 if case_ == "two classes" else 5
    made = case((30, 40, 50, outputs), 6, bias=case_ != "no bias", known=case_ != "size unknown")
    p = forward(made.problem, made.inputs)[1].softmax(1)
    weights = torch.linspace(0.1, 1, 6, dtype=DTYPE)[:, None] / 6
    own = weights * (p - F.one_hot(made.labels, outputs))
    if case_ == "mixed":  # a label that is half one class, half another
        own[3] += 0.01 * (p[3] - F.one_hot((made.labels[3] + 1) % 5, 5))
    s = slice(0, 5 if case_ == "one is missing" else 6)
    targets = decode_weighted(made.problem, own[s], p[s], 1 / 6)
    assert (targets.error < 1e-9) == (case_ == "right")
    if case_ == "right":
        torch.testing.assert_close(targets.copies / 6, weights[:, 0])
        assert torch.equal(targets.counts.argmax(1), made.labels)
