"""Accuracy behind a defence: the training by hand, chance behind noise, the same for the same seed."""

import pytest
import torch

from spear import data, federated, study
from spear.federated import defences
from spear.study.utility import accuracy


def _plain(model, x, y, _generator):
    return federated.gradient(model, x, y)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_training_by_hand(seed):
    inputs, labels = data.load("digits", count=200, seed=seed)
    model = study.clients.network("digits", width=30, depth=2, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(4):
        picked = torch.randint(140, (16,), generator=torch.Generator().manual_seed(seed + step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[picked]), labels[picked]).backward()
        optimizer.step()
    right = (model(inputs[140:]).argmax(1) == labels[140:]).double().mean()
    options = {"samples": 200, "batch": 16, "width": 30, "depth": 2, "learning_rate": 0.2}
    assert accuracy(_plain, "digits", steps=4, seed=seed, **options) == pytest.approx(float(right))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_defence_that_sends_nothing_teaches_nothing(seed):
    def silent(model, x, y, _generator):
        return federated.SharedUpdate({name: 0 * p.detach() for name, p in model.named_parameters()})

    untrained = accuracy(_plain, "digits", steps=0, seed=seed)
    assert accuracy(silent, "digits", steps=3, seed=seed) == untrained
    assert accuracy(_plain, "digits", steps=40, seed=seed) > untrained + 0.2


def test_the_same_seed_gives_the_same_chance():
    def rounded(model, x, y, generator):
        return defences.quantised(federated.gradient(model, x, y), 4, generator=generator)

    first, again, other = (accuracy(rounded, "digits", steps=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
