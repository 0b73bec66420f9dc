"""Weights that a model computes: their gradient is that of the same model with plain weights, and leaks as that."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems import batch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import spear
from spear.federated import SharedUpdate, gradient
from spear.federated.reparametrised import plain

N, WIDTH, CLASSES, COUNT = 20, 80, 5, 4


def old_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(layer)


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight norm of both": lambda layer: [parametrizations.weight_norm(layer, kind) for kind in ("weight", "bias")],
    "weight norm, the older way": old_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", amount=0.3),
}


def client(way: str, seed: int, every: bool = False) -> tuple[nn.Module, nn.Module, Tensor, Tensor, SharedUpdate]:
    """A model, the same with plain weights, its batch and update."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(N, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    model.double()
    own = copy.deepcopy(model)
    for k in (0, 2, 4) if every else (0,):
        WAYS[way](model[k])
    x, y = batch(COUNT, N, CLASSES, seed=seed)
    model(x)  # the older ways compute a weight as it is used
    with torch.no_grad():
        for mine, other in zip(own[::2], model[::2], strict=True):
            mine.weight.copy_(other.weight)
    return model, own, x, y, gradient(model, x, y)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_plain_weights(way, every, seed):
    model, own, x, y, update = client(way, seed, every)
    before = {name: p.clone() for name, p in model.named_parameters()}
    made, read, words = plain(model, update)
    assert words
    expected = gradient(own, x, y).gradients
    assert set(read.gradients) == set(expected) == {name for name, _ in made.named_parameters()}
    for name, g in read.gradients.items():
        torch.testing.assert_close(made.get_parameter(name), own.get_parameter(name))
        known = ~g.isnan()
        assert bool(known.all()) or way == "pruned"
        torch.testing.assert_close(g[known], expected[name][known], rtol=1e-10, atol=1e-14)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("way", WAYS)
def test_the_batch_comes_back(way, seed):
    model, _, x, y, update = client(way, seed)
    result = spear.attack(model, update, time_limit=60)
    report = spear.metrics.evaluate(result, x, y)
    assert report.recall == report.label_accuracy == 1, result.reason
    assert bool(result.certified.all())
    assert "weights that the model holds" in result.reason


def test_a_length_of_zero_leaves_a_row_unknown():
    model, *_, update = client("weight norm", 0)
    with torch.no_grad():
        model[0].parametrizations.weight.original0[3] = 0
    read = plain(model, gradient(model, *batch(COUNT, N, CLASSES)))[1].gradients["0.weight"]
    assert bool(read[3].isnan().all())
    assert not bool(read[torch.arange(WIDTH) != 3].isnan().any())
    left = {name: g for name, g in update.gradients.items() if "original0" not in name}
    assert "0.weight" not in plain(model, replace(update, gradients=left))[1].gradients


def test_a_plain_model_stays_as_it_is():
    _, own, x, y, _ = client("pruned", 0)
    update = gradient(own, x, y)
    made, same, words = plain(own, update)
    assert made is own
    assert same is update
    assert words == ""
