"""Copies, and counts that are wrong or not told: never certified, whatever normalises or drops."""

from dataclasses import replace

import pytest
from normalised_problems import sent
from torch import nn

import spear
from spear.reconstruction import Refusal

NETWORKS = {
    "batch": lambda m: [nn.BatchNorm1d(m), nn.ReLU()],
    "layer": lambda m: [nn.LayerNorm(m), nn.ReLU()],
    "dropout": lambda m: [nn.ReLU(), nn.Dropout(0.3)],
    "behind": lambda m: [nn.ReLU(), nn.BatchNorm1d(m)],
    "curved": lambda m: [nn.BatchNorm1d(m), nn.GELU()],
}


@pytest.mark.parametrize(("count", "copied"), [(None, True), (None, False), (7, True), (8, True), (9, False)])
@pytest.mark.parametrize("network", NETWORKS)
def test_copies_and_counts(network, count, copied):
    case = sent((30, 100, 5), 8, NETWORKS[network], seed=1)
    x, y = case.inputs.clone(), case.labels.clone()
    if copied:
        x[1], y[1] = x[0], y[0]
    shown = 7 if copied else 8
    update = replace(spear.federated.gradient(case.model, x, y), count=count)
    mixes = any(isinstance(part, nn.BatchNorm1d) for part in case.model)
    if mixes and count not in (None, shown):
        with pytest.raises(Refusal, match=f"{count} samples are disclosed, the gradient shows {shown}"):
            spear.attack(case.model, update, method="network")
        return
    result = spear.attack(case.model, update, method="network", max_proposals=60)
    assert not result.certified.any()
    assert not result.differences.any()


@pytest.mark.parametrize("seed", range(2))
def test_samples_that_the_first_layer_cannot_tell_apart(seed):
    """Behind it what dropout took tells them apart: as many directions there, fewer below."""
    case = sent((30, 100, 100, 5), 6, NETWORKS["dropout"], seed=seed)
    x, y = case.inputs.clone(), case.labels.clone()
    x[1], y[1] = x[0], (y[0] + 1) % 5
    result = spear.attack(case.model, spear.federated.gradient(case.model, x, y), method="network", max_proposals=200)
    assert not result.certified.any()
    assert "some enter it alike" in result.reason
