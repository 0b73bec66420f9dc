import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from network_problems import Case, assert_labels, case, errors, logits

from spear.network import whole_batch
from spear.network.problem import NetworkView
from spear.network.recovery import Judged
from spear.network.spaces import possible_errors
from spear.reconstruction import Budget, Terms


def solve(made: Case, **terms) -> Judged:
    return whole_batch.distinct_samples(made.problem, Terms(Budget(seconds=20.0), **terms))


def assert_whole(made: Case, found: Judged, limit: float = 1e-6) -> None:
    """Every sample is there, and certified where their number is disclosed and that of the images."""
    assert errors(found.inputs, made.inputs).max() < limit, found.reason
    assert_certified(made, found)
    assert_labels(made, found, limit)


def outputs(made: Case) -> torch.Tensor:
    return logits(list(zip(made.problem.weights, made.problem.biases, strict=True)), made.inputs)


def assert_certified(made: Case, found: Judged) -> None:
    certain = made.problem.batch_size == len(found.inputs)
    assert (found.certified == certain).all(), found.reason
    assert found.complete == certain
    assert (errors(made.inputs, found.inputs) <= found.error_bound).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [(60, 120, 10), (60, 120, 120, 10), (30, 110, 90, 130, 10)])
def test_whole_batch_with_labels_at_every_depth(sizes, seed):
    made = case(sizes, 20, seed=seed)
    assert_whole(made, solve(made))


@pytest.mark.parametrize("init", ["kaiming", "glorot", "xavier"])
@pytest.mark.parametrize("sizes", [(60, 120, 10), (60, 120, 120, 10)])
def test_other_initialisations_are_found_out(init, sizes):
    made = case(sizes, 20, init=init)
    assert_whole(made, solve(made))


@pytest.mark.parametrize("sizes", [(60, 120, 10), (60, 120, 120, 10)])
def test_without_biases_the_scale_comes_from_the_softmax(sizes):
    made = case(sizes, 20, bias=False)
    assert_whole(made, solve(made))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_and_unknown_batch_size(reduction, known):
    made = case(reduction=reduction, known=known)
    assert_whole(made, solve(made))


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_few_and_many_classes(classes):
    made = case((60, 160, 160, classes), 20)
    assert_whole(made, solve(made))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("sizes", "batch"), [((60, 100, 100, 200), 50), ((90, 160, 160, 100), 70), ((60, 300, 300, 60), 40)]
)
def test_batches_of_many_classes(sizes, batch, seed):
    """More unknowns than units for the exact step, as many, and fewer."""
    made = case(sizes, batch, seed=seed)
    assert_whole(made, solve(made))


def test_where_the_class_does_not_tell_h_the_search_lets_it_move():
    """A head of large weights: each sample's softmax is its own."""
    made = case((60, 300, 300, 40), 20, head=40)
    p = outputs(made).softmax(1)
    assert float((p - p.mean(0)).norm(dim=1).median()) > 0.3
    assert_whole(made, solve(made))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(60, 40, 10), (60, 200, 7), (60, 80, 80, 50)])
def test_the_smallest_batches(sizes, batch, seed):
    """So few that d has no direction to spare: no active unit at all would fit as well."""
    made = case(sizes, batch, seed=seed)
    assert_whole(made, solve(made))


@pytest.mark.parametrize(("classes", "narrow"), [(10, False), (60, True)])
def test_the_possible_errors_hold_every_sample_s_own(classes, narrow):
    made = case((30, 80, 80, classes), 20)
    space = possible_errors(made.problem, 20)
    p = outputs(made).softmax(1)
    d = p - torch.nn.functional.one_hot(made.labels, classes)
    assert space.shape[1] == (20 if narrow else classes - 1)
    assert torch.allclose(d @ space @ space.T, d, atol=1e-9)
    assert torch.allclose(space.T @ space, torch.eye(space.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("classes", [3, 10])
def test_label_smoothing_is_found_out(classes, known):
    made = case((60, 120, 120, classes), smoothing=0.1, known=known)
    found = solve(made)
    assert_certified(made, found)
    assert errors(found.inputs, made.inputs).max() < 1e-9
    assert torch.allclose(found.counts.amin(1), torch.full((20,), 0.1 / classes, dtype=torch.float64))
    whole = found.entries(made.problem, 0.0, "network")
    near = (made.inputs[:, None] - whole.inputs).norm(dim=2).argmin(0)
    assert torch.equal(whole.labels, made.labels[near])


def test_equal_labels():
    made = case(labels=torch.full((20,), 3))
    assert_whole(made, solve(made))


@pytest.mark.parametrize("known", [True, False])
def test_repeated_images_come_back_once_with_all_their_labels(known):
    x = torch.randn(20, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(20) % 10
    x[1], x[3], x[4], y[1] = x[0], x[2], x[2], y[0]
    made = case(inputs=x, labels=y, known=known)
    found = solve(made)
    assert found.reached.rank == 17
    assert errors(found.inputs, made.inputs).max() < 1e-9
    assert not found.certified.any()
    assert sorted(found.counts.sum(1).tolist())[-2:] == ([2, 3] if known else [1, 3])


def test_pixels_without_normalisation():
    made = case(inputs=torch.rand(20, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert_whole(made, solve(made))


@pytest.mark.parametrize("seed", range(3))
def test_single_precision_gradients(seed):
    made = case((60, 200, 200, 10), dtype=torch.float32, seed=seed)
    assert_whole(made, solve(made), limit=1e-3)


def test_dead_neurons_are_no_obstacle():
    made = case((60, 160, 160, 10))
    bias = made.problem.biases[1].clone()
    bias[:30] = -100
    dead = regradient(made, {1: bias})
    assert_whole(dead, solve(dead))


def regradient(made: Case, biases: dict[int, torch.Tensor]) -> Case:
    """The same batch on a chain with some biases replaced."""
    p = made.problem
    live = [
        (w.clone().requires_grad_(), biases.get(k, c).clone().requires_grad_())
        for k, (w, c) in enumerate(zip(p.weights, p.biases, strict=True))
    ]
    h = made.inputs
    for k, (w, c) in enumerate(live):
        h = F.linear(h, w, c)
        h = h.relu() if k < len(live) - 1 else h
    flat = torch.autograd.grad(F.cross_entropy(h, made.labels), [t for layer in live for t in layer])
    new = NetworkView(p.weights, tuple(c.detach() for _, c in live), flat[::2], flat[1::2], p.batch_size)
    return Case(new, made.inputs, made.labels)


def test_permuting_neurons_and_samples_changes_nothing_but_order():
    made = case()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    units = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    p = made.problem
    weights = (p.weights[0], p.weights[1][units], p.weights[2][:, units])
    gradients = (p.weight_gradients[0], p.weight_gradients[1][units], p.weight_gradients[2][:, units])
    moved = NetworkView(
        weights,
        (p.biases[0], p.biases[1][units], p.biases[2]),
        gradients,
        (p.bias_gradients[0], p.bias_gradients[1][units], p.bias_gradients[2]),
        p.batch_size,
    )
    assert_whole(made, solve(Case(moved, made.inputs, made.labels)))
    assert_whole(made, solve(case(inputs=made.inputs[order], labels=made.labels[order])))


def test_same_seed_same_result():
    made = case()
    first, second = (solve(made, seed=7) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)


def test_progress_and_stats():
    seen = []
    found = solve(case(), progress=seen.append)
    assert [x.found for x in seen] == sorted(x.found for x in seen)
    assert (found.reached.rank, found.reached.found, found.reached.rounds) == (20, 20, len(seen))
    assert {x.method for x in seen} == {"network"}
    assert seen[-1].seconds > 0


def test_past_the_limit_is_a_refusal_with_its_numbers():
    found = solve(case((60, 30, 30, 10), 40))
    assert not found.complete
    assert len(found.inputs) == 0
    assert "no gap in the singular values" in found.reason
    found = solve(case((60, 120, 25, 120, 10), 20))
    assert found.reason == "a batch of rank 20 needs every hidden layer at least 28 wide; layer 2 has 25"


def test_an_exhausted_budget_is_an_incomplete_result():
    found = whole_batch.distinct_samples(case((60, 120, 10), 50).problem, Terms(Budget(proposals=1)))
    assert not found.complete
    assert len(found.inputs) == 0
    assert "gradient directions in 1 round of 75 starts" in found.reason


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(60, 200, 200, 10), (60, 200, 200, 200, 10)])
def test_samples_are_found_one_by_one_while_others_are_missing(sizes, seed):
    made = case(sizes, 50, seed=seed)
    found = whole_batch.distinct_samples(made.problem, Terms(Budget(proposals=1)))
    assert not found.complete
    assert 0 < len(found.inputs) < 50
    assert not found.certified.any()
    assert (errors(made.inputs, found.inputs) < 1e-8).all()
    assert_labels(made, found)
    assert f"found one by one: {len(found.inputs)} sample" in found.reason


@pytest.mark.parametrize("seed", range(3))
def test_crowded_batches_empty_sample_by_sample(seed):
    made = case((250, 200, 200, 10), 84, seed=seed)
    assert_whole(made, solve(made))


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(8, 50), min_size=1, max_size=3),
    inputs=st.integers(2, 30),
    classes=st.integers(2, 6),
    batch=st.integers(1, 12),
    seed=st.integers(0, 2**20),
    alike=st.sampled_from(["", "equal labels", "same image", "same sample", "near image", "common mean"]),
    spoiled=st.sampled_from(["", "", "weights", "gradient", "one entry"]),
    known=st.booleans(),
    starts=st.sampled_from([1, 10**6]),
    loss=st.sampled_from(["cross_entropy", "cross_entropy", "binary_cross_entropy", "squared_error"]),
    scale=st.sampled_from([1.0, 1.0, 30.0]),
)
@example([21, 37, 48], 16, 4, 3, 8472, "common mean", "", False, 1, "cross_entropy", 1.0)
def test_no_false_certificate_on_tiny_problems(
    sizes, inputs, classes, batch, seed, alike, spoiled, known, starts, loss, scale
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (batch,), generator=generator)
    if alike in ("same image", "same sample", "near image"):
        away = 1e-3 if alike == "near image" else 0.0
        x[-1] = x[0] + away * torch.randn(inputs, generator=generator, dtype=torch.float64)
    if alike == "same sample":
        y[-1] = y[0]
    if alike == "equal labels":
        y[:] = y[0]
    if alike == "common mean":
        x += 3
    made = case((inputs, *sizes, classes), seed=seed, inputs=scale * x, labels=y, known=known, loss=loss)
    problem = spoil(made.problem, spoiled, generator)
    with mock.patch.object(whole_batch, "IDLE", 2):
        found = whole_batch.distinct_samples(problem, Terms(Budget(proposals=starts)))
    sure = found.inputs[found.certified]
    if spoiled == "weights":
        assert len(sure) == 0
    assert (errors(made.inputs, sure) < 1e-6).all()
    for sample, counts in zip(sure, found.counts[found.certified], strict=True):
        same = (made.inputs - sample).norm(dim=1) < 1e-6 * sample.norm()
        true = F.one_hot(y[same], classes).sum(0).to(counts)
        # The mean over a batch and over the same batch twice are one gradient: only the ratios are disclosed.
        assert torch.allclose(true / true.sum(), counts / counts.sum())


def spoil(problem: NetworkView, how: str, generator: torch.Generator) -> NetworkView:
    """Weights that the client did not have, or a gradient it did not send."""
    weights, gradients = list(problem.weights), list(problem.weight_gradients)
    noise = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    k = int(torch.randint(len(weights), (1,), generator=generator))
    if how == "weights":
        weights = [w + 1e-4 * n for w, n in zip(weights, noise, strict=True)]
    elif how == "gradient":
        gradients[k] = gradients[k] + 1e-5 * gradients[k].norm() * noise[k] / math.sqrt(noise[k].numel())
    elif how == "one entry":
        gradients[k] = gradients[k].clone()
        gradients[k][0, 0] += 1e-3 * gradients[k].norm()
    p = problem
    return NetworkView(
        tuple(weights),
        p.biases,
        tuple(gradients),
        p.bias_gradients,
        p.batch_size,
        p.reduction,
        p.precision,
        loss=p.loss,
    )
