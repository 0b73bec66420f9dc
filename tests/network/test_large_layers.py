"""Layers that are held as they came, and read by blocks, give what whole matrices in float64 give."""

import pytest
import torch
from problems import batch

import spear
from spear import models
from spear.federated import gradient
from spear.network import problem as network
from spear.network.check import check
from spear.network.error_bounds import input_bounds
from spear.network.problem import Targets, open_network, passes
from spear.network.rest import rest_of

DTYPES = [torch.float32, torch.float64]


def opened(monkeypatch, dtype, depth, bias, seed=0):
    """A small network, every layer of which counts as large, and its batch."""
    monkeypatch.setattr(network, "LARGE", 0)
    x, y = batch(6, 50, seed=seed, dtype=dtype)
    model = models.fcnn((50,), 60, depth, 10, seed=seed, dtype=dtype)
    if not bias:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias = None
    return open_network(model, gradient(model, x, y)), x.double(), Targets(torch.eye(10).double()[y], 1 / 6, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_read_by_blocks_is_what_is_read_whole(monkeypatch, dtype, depth, bias):
    held, x, targets = opened(monkeypatch, dtype, depth, bias)
    whole = held.widened
    assert {w.dtype for w in held.weights[:-1] + held.weight_gradients[:-1]} == {dtype}
    assert {w.dtype for w in whole.weights + whole.weight_gradients} == {torch.float64}
    run, same = passes(held, x, targets), passes(whole, x, targets)
    for one, other in zip(run.inputs + run.deltas, same.inputs + same.deltas, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    for k in range(held.last + 2):
        rows = torch.randn(3, held.gradient(k).shape[1], dtype=torch.float64)
        torch.testing.assert_close(held.lift(k, rows), whole.affine(k) @ rows.T)
        torch.testing.assert_close(held.back(k, run.deltas[k]), run.deltas[k] @ whole.weights[k])
        assert torch.equal(held.gradient(k).whole(), whole.augmented(k))
    torch.testing.assert_close(check(held, x, targets)[1], check(whole, x, targets)[1])
    torch.testing.assert_close(input_bounds(held, run, targets), input_bounds(whole, same, targets), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1])
def test_the_rest_of_a_wrong_batch(monkeypatch, dtype, k):
    held, x, targets = opened(monkeypatch, dtype, 3, True)
    run = passes(held, x.roll(1, 0), targets)
    total = held.augmented(k)
    left = total - run.deltas[k].T @ held.extend(k, run.inputs[k])
    basis = torch.linalg.qr(run.deltas[k].T)[0]
    rest = rest_of(held, k, run, basis)
    sizes = torch.tensor([rest.size, rest.whole, rest.last, rest.whole_last], dtype=torch.float64)
    torch.testing.assert_close(sizes, torch.stack([v.norm() for v in (left, total, left[:, -1], total[:, -1])]))
    torch.testing.assert_close(rest.inside, basis.T @ left)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(2))
def test_the_attack_finds_the_same(monkeypatch, dtype, seed):
    x, y = batch(6, 50, seed=seed, dtype=dtype)
    model = models.fcnn((50,), 60, 3, 10, seed=seed, dtype=dtype)
    before = spear.attack(model, gradient(model, x, y), method="network")
    monkeypatch.setattr(network, "LARGE", 0)
    after = spear.attack(model, gradient(model, x, y), method="network")
    assert before.complete
    assert after.complete, after.reason
    order = torch.cdist(before.inputs, after.inputs).argmin(1)
    torch.testing.assert_close(after.inputs[order], before.inputs, rtol=1e-5, atol=1e-6)
