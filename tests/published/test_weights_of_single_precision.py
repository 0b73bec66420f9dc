"""One layer from a change of weights in single precision: their rounding is noise, and the zero test knows its size."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import batch, judged
from torch import nn

from spear import models
from spear.federated import SharedUpdate, gradient
from spear.inversion import attack
from spear.metrics import evaluate
from spear.published.greedy import matching_coefficient
from spear.published.view import open_layer

seeds = st.integers(0, 10**6)


def change(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rate: float, *, only: str = "") -> SharedUpdate:
    """One step in the model's own precision, of the layers whose names begin with `only`."""
    sent = gradient(model, x, y)
    weights = {n: p.detach() for n, p in model.named_parameters() if n.startswith(only)}
    moved = {n: p - (p - rate * sent.gradients[n]) for n, p in weights.items()}
    return SharedUpdate(moved, count=sent.count, learning_rate=rate)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["layer", "dictionary", "sampling"])
@pytest.mark.parametrize("without", ["fc3", "fc2"])
def test_a_batch_behind_a_private_head(method: str, without: str, seed: int) -> None:
    x, y = batch(8, 300, seed=seed, dtype=torch.float32)
    model = models.fcnn((300,), 200, 3, 10, seed=seed, dtype=torch.float32)
    sent = change(model, x, y, 0.1)
    sent = replace(sent, gradients={n: g for n, g in sent.gradients.items() if n.startswith("fc1") or n < without})
    result = attack(model, sent, method=method, time_limit=30)
    report = evaluate(result, x, y)
    assert len(result.inputs) == 8, result.reason
    assert float(report.relative_error.max()) < 1e-3
    assert report.precision == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_zeros_are_those_of_the_batch(seed: int) -> None:
    """Small entries are none; and what has no sign, for rounding, contradicts nothing."""
    x, y = batch(8, 300, seed=seed, dtype=torch.float32)
    model = models.fcnn((300,), 400, 3, 10, seed=seed, dtype=torch.float32)
    observed = open_layer(model, change(model, x, y, 0.1)).observed
    Q = observed.R @ torch.linalg.pinv(x.double())
    q = (Q / Q.norm(dim=0)).mT.contiguous()
    assert matching_coefficient(observed, q) == 1
    assert observed.tolerance < observed.blur


def test_in_double_precision_every_entry_counts() -> None:
    x, y = batch(5, 40)
    model = models.fcnn((40,), 90, 3, 10)
    assert open_layer(model, gradient(model, x, y)).observed.blur == 0
    assert open_layer(model, change(model, x, y, 0.1)).observed.blur == 0


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["layer", "dictionary"]),
    st.integers(1, 8),
    st.integers(20, 90),
    st.sampled_from([2, 5]),
    st.floats(-4, 0),
    st.floats(-8, 0),
    st.sampled_from(["", "fc1"]),
    seeds,
)
def test_what_is_certified_is_true(
    method: str, b: int, m: int, classes: int, rate: float, apart: float, only: str, seed: int
) -> None:
    """Two samples that are more or less alike, layers of any width, steps of any size."""
    x, y = batch(b, 40, classes, seed=seed, dtype=torch.float32)
    x[-1] = x[0] + 10**apart * x[-1] if b > 1 else x[0]
    model = models.fcnn((40,), m, 3, classes, seed=seed, dtype=torch.float32)
    judged(model, change(model, x, y, 10**rate, only=only), x, y, method=method, max_proposals=32)
