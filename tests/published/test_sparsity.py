"""Laws of the zero pattern, of firing rates, and of the filter's threshold."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from spear.models import fcnn
from spear.published.sparsity import (
    activation_mask,
    firing_rates,
    threshold,
    threshold_from_counts,
    threshold_from_rates,
    zero_counts,
    zero_pattern,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_threshold(pmf, false_rejection):
    """The definition, word for word: the largest t <= m with P(N < t) <= false_rejection."""
    return max(t for t in range(len(pmf)) if sum(pmf[:t]) <= Fraction(false_rejection))


@pytest.mark.parametrize(("m", "t"), [(50, 5), (100, 21), (200, 58), (400, 140), (1000, 405), (2000, 866)])
def test_threshold_of_the_published_rate(m, t):
    assert threshold(m) == t


@given(st.integers(1, 40), st.sampled_from([0.0, 1e-9, 1e-3, 0.25, 1.0]), st.sampled_from([0.0, 0.125, 0.5, 0.75, 1.0]))
@example(1, 0.25, 0.75)  # a tie
def test_threshold_is_its_definition(m, false_rejection, zero_rate):
    q = Fraction(zero_rate)
    pmf = [math.comb(m, k) * q**k * (1 - q) ** (m - k) for k in range(m + 1)]
    assert threshold(m, false_rejection=false_rejection, zero_rate=zero_rate) == slow_threshold(pmf, false_rejection)


@pytest.mark.parametrize("m", [50, 400, 2000])
def test_equal_rates_give_the_binomial_threshold(m):
    for zero_rate in (0.25, 0.5):
        rates = torch.full((m,), 1 - zero_rate, dtype=torch.float64)
        assert threshold_from_rates(rates) == threshold(m, zero_rate=zero_rate)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("false_rejection", [1e-9, 1e-4, 0.1])
def test_poisson_binomial_threshold_agrees_with_the_sum_over_all_masks(seed, false_rejection):
    m = 10
    rates = uniform(m, seed=seed)
    rates[0], rates[1] = seed % 2, 1.0  # neurons that never change
    fire, pmf = [Fraction(p) for p in rates.tolist()], [Fraction(0)] * (m + 1)
    for mask in itertools.product((0, 1), repeat=m):
        pmf[m - sum(mask)] += math.prod(p if on else 1 - p for p, on in zip(fire, mask, strict=True))
    assert threshold_from_rates(rates, false_rejection=false_rejection) == slow_threshold(pmf, false_rejection)


def test_neurons_that_differ_make_the_threshold_higher():
    # Rates 0 and 1 leave no chance: at the same mean, the number of zeros varies less.
    mixed = torch.cat([torch.zeros(100), torch.ones(100), torch.full((200,), 0.5)]).double()
    assert threshold(400) < threshold_from_rates(mixed) < 200


def test_counts_of_independent_neurons_give_nearly_the_binomial_threshold():
    counts = (uniform(400, 5000, seed=1) < 0.5).sum(0)
    assert abs(threshold_from_counts(counts, 400) - threshold(400)) <= 8


def test_counts_that_vary_less_than_independent_ones_give_the_binomial_threshold_of_their_mean():
    counts = torch.tensor([99, 100, 101])
    assert threshold_from_counts(counts, 200) == threshold(200)
    assert threshold_from_counts(torch.full((5,), 200), 200) == 200


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_dependent_neurons_keep_the_false_rejection_rate(seed):
    # Each sample has a zero rate of its own, from a beta distribution: the independent threshold fails, this one holds.
    g = torch.Generator().manual_seed(seed)
    gammas = torch._standard_gamma(torch.full((2, 20000), 10.0, dtype=torch.float64), generator=g)
    counts = (torch.rand(400, 20000, generator=g) < gammas[0] / gammas.sum(0)).sum(0)
    t = threshold_from_counts(counts[:2000], 400, false_rejection=1e-2)
    assert (counts < threshold(400, false_rejection=1e-2)).double().mean() > 0.1
    assert (counts < t).double().mean() == pytest.approx(1e-2, rel=0.4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: threshold(0), "width of at least 1, not 0"),
        (lambda: threshold(10, zero_rate=1.5), r"zero rate lies in \[0, 1\], not 1.5"),
        (lambda: threshold(10, false_rejection=-0.1), r"false-rejection rate lies in \[0, 1\], not -0.1"),
        (lambda: threshold_from_rates(torch.tensor([0.5, 1.5])), r"numbers in \[0, 1\]"),
        (lambda: threshold_from_rates(torch.zeros(0)), "at least one"),
        (lambda: threshold_from_counts(torch.tensor([5]), 10), "at least two counts between 0 and the width 10"),
        (lambda: threshold_from_counts(torch.tensor([5, 11]), 10), "between 0 and the width 10"),
        (lambda: zero_pattern(torch.ones(3, 2), tolerance=1.0), r"lies in \[0, 1\), not 1.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.floats(-6, 6))
def test_zero_pattern_ignores_the_scale_of_a_column(seed, m, b, power):
    G = normal(m, b, seed=seed) * (uniform(m, b, seed=seed + 1) < 0.5)
    scales = 10.0**power * torch.arange(1, b + 1, dtype=torch.float64)
    assert torch.equal(zero_pattern(G * scales, tolerance=1e-9), zero_pattern(G, tolerance=1e-9))
    assert torch.equal(zero_pattern(G, tolerance=0.0), G == 0)


def test_zero_pattern_batched_equals_the_loop():
    G = normal(3, 2, 20, 5) * (uniform(3, 2, 20, 5) < 0.5)
    pattern, counts = zero_pattern(G, tolerance=1e-6), zero_counts(G, tolerance=1e-6)
    for i, j in itertools.product(range(3), range(2)):
        assert torch.equal(pattern[i, j], zero_pattern(G[i, j], tolerance=1e-6))
        assert torch.equal(counts[i, j], (G[i, j] == 0).sum(0))


def test_entries_under_the_tolerance_are_zeros():
    G = torch.tensor([[1.0, 0.0], [1e-7, 0.0], [1e-5, 0.0]])
    assert zero_pattern(G, tolerance=1e-6).tolist() == [[False, True], [True, True], [False, True]]


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_vanishes_exactly_where_the_mask_does(layer, seed):
    model, X = fcnn((6,), 30, 3, 4, seed=seed), normal(5, 6, seed=seed)
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _module, _inputs, Z: seen.append(Z))
    loss = nn.functional.cross_entropy(model(X), torch.arange(5) % 4)
    handle.remove()
    G = torch.autograd.grad(loss, seen[0])[0].T
    assert torch.equal(zero_pattern(G, tolerance=0.0), ~activation_mask(model, layer, X))


def test_firing_rates_are_the_means_of_the_mask():
    model, X = fcnn((1, 3, 2), 12, 2, 3), normal(7, 1, 3, 2)
    D = (model.fc1.weight @ X.flatten(1).T + model.fc1.bias[:, None] > 0).double()
    rates = firing_rates(model, "fc1", X)
    torch.testing.assert_close(rates.per_neuron, D.mean(1))
    torch.testing.assert_close(rates.per_sample, D.mean(0))
    assert not model.fc1._forward_hooks


@pytest.mark.parametrize("layer", ["fc1", "fc4"])
def test_at_initialisation_the_zeros_of_one_sample_are_binomial_over_networks(layer):
    # Whatever the sample: here one, far from random, for 400 networks of width 60.
    X = torch.linspace(0, 3, 16, dtype=torch.float64)[None] ** 2
    masks = [activation_mask(fcnn((16,), 60, 5, 2, seed=s), layer, X) for s in range(400)]
    zeros = torch.stack([(~D).sum() for D in masks]).double()
    assert zeros.mean() == pytest.approx(30, abs=4 * math.sqrt(15 / 400))
    assert zeros.var() == pytest.approx(15, rel=4 * math.sqrt(2 / 400))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.twice(self.twice(self.used(x)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("fc9", "no linear layer named 'fc9'; the model has used, unused, twice"),
        ("unused", "the model uses 'unused' 0 times"),
        ("twice", "the model uses 'twice' 2 times"),
    ],
)
def test_a_layer_without_a_mask_is_named(layer, message):
    with pytest.raises(ValueError, match=message):
        activation_mask(Unused(), layer, torch.ones(2, 4))
