"""Updates of which only some entries were sent: everything back, certified, or nothing and why."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import batch, permuted_neurons
from torch import nn

from spear import attack, data, metrics, models
from spear.deployments.pruning import is_pruned, recover
from spear.federated import SharedUpdate, defences, gradient, privacy
from spear.network.problem import open_network
from spear.reconstruction import Budget, Terms


def _client(b: int = 5, m: int = 120, n: int = 100, depth: int = 3, seed: int = 0, **options: object):
    inputs, labels = batch(b, n, seed=seed, **options)
    return models.fcnn((n,), m, depth, 10, seed=seed, **options), inputs, labels


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _whole(model, update: SharedUpdate, inputs, labels, **options: object) -> None:
    """All samples and labels come back, certified where as many were disclosed, and no two are copies."""
    result = attack(model, update, **options)
    seen = metrics.evaluate(result, inputs, labels)
    certain = update.count == len(inputs.unique(dim=0))
    assert (seen.recall, seen.precision, seen.label_accuracy) == (1, 1, 1), result.reason
    assert result.complete == certain
    assert (result.certified == certain).all()
    assert (seen.relative_error <= result.error_bound[seen.match]).all()
    assert ("every entry that arrived" in result.reason) == certain


@pytest.mark.parametrize("method", ["auto", "network"])
@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize("count", [5, None])
def test_a_random_third(method, depth, count):
    model, inputs, labels = _client(depth=depth)
    update = defences.pruned_random(gradient(model, inputs, labels), 0.33, generator=_generator())
    _whole(model, replace(update, count=count), inputs, labels, method=method)


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_third(seed):
    model, inputs, labels = _client(seed=seed)
    _whole(model, defences.pruned_top_k(gradient(model, inputs, labels), 0.33), inputs, labels)


@pytest.mark.parametrize("disclosed", [True, False])
def test_inputs_that_hardly_any_neuron_sent_are_read_in_the_layer_above(disclosed):
    inputs, labels = batch(5, 100)
    inputs[:, :3] *= 0.01
    model = models.fcnn((100,), 150, 3, 10)
    sent = defences.pruned_top_k(gradient(model, inputs, labels), 0.35)
    arrived = (sent.gradients["fc1.weight"] != 0).sum(0)
    assert int(arrived[:3].max()) < 5
    _whole(model, sent if disclosed else replace(sent, pruning=None), inputs, labels)


def test_single_precision_sums_and_copies():
    model, inputs, labels = _client(dtype=torch.float32)
    update = defences.pruned_random(gradient(model, inputs, labels), 0.4, generator=_generator())
    _whole(model, update, inputs, labels)
    model, inputs, labels = _client()
    inputs[3], labels[3] = inputs[1], labels[1]
    update = defences.pruned_random(gradient(model, inputs, labels, reduction="sum"), 0.4, generator=_generator())
    _whole(model, update, inputs, labels)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("quiet", [False, True])
def test_a_second_layer_without_a_bias(last, quiet):
    torch.manual_seed(0)
    layers = nn.Linear(100, 150), nn.ReLU(), nn.Linear(150, 150, bias=False), nn.ReLU(), nn.Linear(150, 10, bias=last)
    model, (inputs, labels) = nn.Sequential(*layers).double(), batch(5, 100)
    if quiet:
        inputs[:, :3] *= 0.01
    update = gradient(model, inputs, labels)
    _whole(model, defences.pruned_top_k(update, 0.35), inputs, labels)
    _whole(model, defences.pruned_random(update, 0.35, generator=_generator()), inputs, labels)


def test_permuted_neurons_change_nothing():
    model, inputs, labels = _client()
    update = defences.pruned_random(gradient(model, inputs, labels), 0.4, generator=_generator())
    _whole(*permuted_neurons(model, update), inputs, labels)


@given(
    seed=st.integers(0, 10**6),
    b=st.integers(1, 8),
    keep=st.floats(0.05, 0.9),
    mode=st.sampled_from(("random", "top-k")),
    known=st.booleans(),
    twins=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_nothing_false_is_certified(seed, b, keep, mode, known, twins):
    """Few entries and many, near-copies among the images: what is certified is in the batch."""
    model, inputs, labels = _client(b=b, m=50, n=30, seed=seed)
    if twins and b > 1:
        inputs[1] = inputs[0] + 10 ** (-1.0 - seed % 8) * inputs[1]
    update = gradient(model, inputs, labels)
    update = (
        defences.pruned_top_k(update, keep)
        if mode == "top-k"
        else defences.pruned_random(update, keep, generator=_generator(seed))
    )
    if all(g.any() for name, g in update.gradients.items() if name in ("fc1.weight", "fc2.weight")):
        result = attack(model, update if known else replace(update, count=None), max_proposals=100)
        seen = metrics.evaluate(result, inputs, labels)
        assert seen.precision == 1
        assert not result.complete or seen.recall == 1 or not known


@pytest.mark.parametrize("change", ["noise", "clipping", "one entry"])
def test_what_the_entries_do_not_bear_out_is_not_certified(change):
    model, inputs, labels = _client()
    update = gradient(model, inputs, labels)
    if change == "noise":
        update = defences.noisy(update, 1e-6, relative=True, generator=_generator())
    if change == "clipping":
        update = privacy.private(model, inputs, labels, clip=0.5, noise_multiplier=0.0)
    sent = defences.pruned_random(update, 0.4, generator=_generator())
    if change == "one entry":
        sent.gradients["fc3.weight"].view(-1)[sent.gradients["fc3.weight"].view(-1).nonzero()[0]] *= 1.001
    result = attack(model, sent)
    assert not result.certified.any()
    assert not result.complete
    assert result.reason


def test_too_few_entries_say_how_many_there_were():
    model, inputs, labels = _client(b=12)
    sent = defences.pruned_random(gradient(model, inputs, labels), 0.1, generator=_generator())
    result = attack(model, sent)
    assert not len(result.inputs)
    arrived = sum(int((sent.gradients[f"fc2.{kind}"] != 0).sum()) for kind in ("weight", "bias"))
    assert f"{arrived} entries of layer 2's gradient arrived" in result.reason
    assert "they bear a rank of" in result.reason


def test_one_hidden_layer_is_a_refusal():
    model, inputs, labels = _client(depth=2)
    sent = defences.pruned_random(gradient(model, inputs, labels), 0.4, generator=_generator())
    assert "need two hidden layers" in attack(model, sent).reason


@pytest.mark.parametrize("mode", ["random", "top-k"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_quarter_of_a_real_batch(name, mode, real_data):
    inputs, labels = data.load(name, count=10, root=real_data)
    model = models.fcnn(inputs.shape[1:], 200, 3, 10)
    update = gradient(model, inputs, labels)
    sent = (
        defences.pruned_top_k(update, 0.25)
        if mode == "top-k"
        else defences.pruned_random(update, 0.25, generator=_generator())
    )
    _whole(model, sent, inputs, labels)


def test_an_empty_budget_says_so():
    model, inputs, labels = _client()
    sent = defences.pruned_random(gradient(model, inputs, labels), 0.4, generator=_generator())
    found = recover(open_network(model, sent), Terms(Budget(proposals=0)))
    assert not found.complete
    assert found.reason == "found 0 of 5 samples in 0 starts"
    none = recover(open_network(model, sent), Terms(Budget(seconds=0.0)))
    assert "gave no completion that the others confirm" in none.reason


@pytest.mark.parametrize("seed", range(3))
def test_columns_that_few_samples_fill_are_not_taken_for_pruned(seed):
    """One-hot columns of a table: the first gradient is zero where no sample of that category activates a unit."""
    generator = _generator(seed)
    inputs = torch.nn.functional.one_hot(torch.randint(8, (16, 6), generator=generator)).flatten(1).double()
    model = models.fcnn((48,), 80, 3, 2, seed=seed, dtype=torch.float64)
    update = gradient(model, inputs, torch.randint(2, (16,), generator=generator))
    first = update.gradients["fc1.weight"]
    assert float((first[:, first.any(0)] != 0).double().mean()) < 0.9
    assert not is_pruned(open_network(model, update))
    assert is_pruned(open_network(model, defences.pruned_random(update, 0.3, generator=generator)))
    assert is_pruned(open_network(model, defences.pruned_top_k(update, 0.3)))
