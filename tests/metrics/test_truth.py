"""True directions, the proposals that meet them, and a layer's gradient, against loops and expectations."""

import itertools
import math

import pytest
import torch
from problems import make

from spear import study
from spear.metrics.truth import first_met, layer_truth, met_by, shape_of, true_directions
from spear.published import greedy, kernels, theory


@pytest.mark.parametrize("seed", range(3))
def test_true_directions_are_the_columns_of_Q(seed):
    problem = make(seed=seed)
    q = true_directions(problem.observed, problem.inputs)
    G, X = greedy.disaggregate(problem.observed, q)
    torch.testing.assert_close(X.mT, problem.inputs, rtol=0, atol=1e-11)
    assert torch.equal(G.abs() > 1e-9, (problem.inputs @ problem.model.fc1.weight.mT + problem.model.fc1.bias > 0).mT)


@pytest.mark.parametrize("b", [1, 3, 4, 5])
def test_a_direction_is_met_where_it_is_the_kernel(b):
    problem = make(b, 40, 20)
    rows = kernels.sample_rows(60, 40, b - 1, generator=torch.Generator().manual_seed(1))
    hit = met_by(problem.observed.L, problem.q, rows)
    for chosen, met in zip(rows, hit, strict=True):
        q = kernels.kernels_svd(problem.observed.L[chosen][None])[0]
        assert met.tolist() == [abs(float(q @ direction)) > 1 - 1e-7 for direction in problem.q]
    assert hit.any()


@pytest.mark.parametrize(("b", "chunk"), [(2, 20), (3, 20), (3, 7), (4, 50)])
def test_first_met_on_average_takes_as_long_as_coupon_collecting(b, chunk):
    problem = make(b, 16, 20)
    L, truth = problem.observed.L, problem.q
    rates = met_by(L, truth, torch.tensor(list(itertools.combinations(range(16), b - 1)))).double().mean(0)
    generator, runs = torch.Generator().manual_seed(0), 600
    first = torch.stack([first_met(L, truth, limit=3000, generator=generator, chunk=chunk) for _ in range(runs)])
    # a wait spreads by no more than its mean: five standard errors
    assert float(first.amax(1).mean()) == pytest.approx(theory.expected_proposals(rates), rel=5 / math.sqrt(runs))
    assert first.mean(0).tolist() == pytest.approx((1 / rates).tolist(), rel=5 / math.sqrt(runs))


def test_first_met_ends_at_the_limit():
    problem = make(4, 40, 20)
    options = {"generator": torch.Generator().manual_seed(1), "chunk": 7}
    first = first_met(problem.observed.L, problem.q, limit=25, **options)
    assert bool((first[first.isfinite()] <= 25).all())
    assert not first.isfinite().all()
    alone = make(1, 40, 20)
    assert first_met(alone.observed.L, alone.q, limit=3).tolist() == [1.0]
    with pytest.raises(ValueError, match="63 directions"):
        first_met(torch.eye(80, 63, dtype=torch.float64), torch.eye(63, dtype=torch.float64), limit=1)


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
