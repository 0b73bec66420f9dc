"""True directions, the proposals that meet them, and a layer's gradient, against loops and expectations."""

import itertools
import math

import pytest
import torch
from problems import make

from spear import study
from spear.metrics.truth import MET, first_met, layer_truth, shape_of, true_directions
from spear.published import greedy, kernels, theory


@pytest.mark.parametrize("seed", range(3))
def test_true_directions_are_the_columns_of_Q(seed):
    problem = make(seed=seed)
    q = true_directions(problem.observed, problem.inputs)
    G, X = greedy.disaggregate(problem.observed, q)
    torch.testing.assert_close(X.mT, problem.inputs, rtol=0, atol=1e-11)
    assert torch.equal(G.abs() > 1e-9, (problem.inputs @ problem.model.fc1.weight.mT + problem.model.fc1.bias > 0).mT)


@pytest.mark.parametrize(("b", "limit", "chunk"), [(1, 3, 2), (3, 40, 7), (4, 25, 1000), (5, 30, 5)])
def test_first_met_is_the_loop_over_proposals(b, limit, chunk):
    problem = make(b, 40, 20)
    L, truth = problem.observed.L, problem.q
    found = first_met(L, truth, limit=limit, generator=torch.Generator().manual_seed(1), chunk=chunk)
    generator, expected, count = torch.Generator().manual_seed(1), [math.inf] * b, 0
    for size in itertools.chain([chunk] * (limit // chunk), [limit % chunk]):
        for q in kernels.kernels_svd(L[kernels.sample_rows(size, 40, b - 1, generator=generator)]):
            count += 1
            for i in range(b):
                if abs(float(q @ truth[i])) > 1 - 1e-7:
                    expected[i] = min(expected[i], count)
    assert found.tolist() == expected


def test_first_met_on_average_takes_as_long_as_coupon_collecting():
    problem = make(3, 30, 20)
    L, truth = problem.observed.L, problem.q
    pairs = torch.tensor(list(itertools.combinations(range(30), 2)))
    rates = ((kernels.kernels_svd(L[pairs]) @ truth.mT).abs() > MET).double().mean(0)
    generator, runs = torch.Generator().manual_seed(0), 600
    last = [float(first_met(L, truth, limit=1000, generator=generator, chunk=20).max()) for _ in range(runs)]
    # a wait spreads by no more than its mean: five standard errors
    assert sum(last) / runs == pytest.approx(theory.expected_proposals(rates), rel=5 / math.sqrt(runs))


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize("seed", range(3))
def test_the_truth_of_a_layer_makes_its_gradient(layer, seed):
    model, inputs, labels, update = study.client("digits", 3, width=40, depth=3, seed=seed)
    X, G = layer_truth(model, layer, inputs, labels)
    sent = update.gradients
    torch.testing.assert_close(G @ X.mT, sent[f"{layer}.weight"])
    torch.testing.assert_close(G.sum(1), sent[f"{layer}.bias"])
    s = torch.linalg.svdvals(sent[f"{layer}.weight"])
    shape = shape_of(G, X)
    assert shape.condition == pytest.approx(float(s[0] / s[2]), rel=1e-6)
    zero = G == 0
    assert shape.zero_share == pytest.approx(float(zero.double().mean()))
    agree = [len(set(row)) == 1 for row in zero.tolist()]
    assert shape.agreeing == pytest.approx(sum(agree) / len(agree))
    assert shape.spread == pytest.approx(float(G.norm(dim=0).max() / G.norm(dim=0).min()))


def test_a_layer_that_is_none():
    model, inputs, labels, _ = study.client("digits", 3, width=40, depth=3, seed=0)
    with pytest.raises(ValueError, match="no linear layer named 'relu1'"):
        layer_truth(model, "relu1", inputs, labels)
