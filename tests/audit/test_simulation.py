"""The largest batch that comes back whole, by simulation."""

from types import SimpleNamespace

import pytest
from audited import CLASSES, SHAPE, WIDTH
from torch import nn

from spear import federated, inversion
from spear.audit import assessment, simulation
from spear.audit.sample import choose


def test_the_reach_is_a_batch_that_came_back_whole(model: nn.Module, simulated: assessment.Audit) -> None:
    assert [reach.method for reach in simulated.reaches] == [m for m in inversion.METHODS if m != "auto"]
    sample = choose(None, SHAPE, CLASSES, most=WIDTH)
    for reach in simulated.reaches:
        assert 0 <= reach.largest < reach.most == WIDTH - 1
        assert reach.largest < reach.failed <= reach.most
        assert reach.reason
        if reach.largest:
            update = federated.gradient(model, *sample.take(reach.largest))
            assert inversion.attack(model, update, method=reach.method, time_limit=10).complete
    assert max(reach.largest for reach in simulated.reaches) >= 4  # what the outcome says of four


def test_reach_without_a_failure(model: nn.Module) -> None:
    sample = choose("digits", SHAPE, CLASSES, most=6)
    reach = simulation.reach(model, sample, "sampling", most=3)
    assert (reach.largest, reach.failed, reach.reason, reach.most) == (3, None, "", 3)


def test_a_method_that_cannot_begin_reaches_nothing_and_says_why() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4), nn.GELU()).double()
    sample = choose("digits", SHAPE, 4, most=6)
    reach = simulation.reach(model, sample, "network", most=6)
    assert (reach.largest, reach.failed) == (0, 1)
    assert "needs one chain of linear layers with elementwise activations between them" in reach.reason


@pytest.mark.parametrize(("most", "whole"), [(1, 0), (1, 1), (7, 7), (50, 0), (50, 1), (50, 9), (50, 37), (50, 50)])
def test_the_largest_batch_is_found_to_one_part_in_eight(
    model: nn.Module, most: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def attack(_self: simulation.Options, _model: nn.Module, update: federated.SharedUpdate, *_: object) -> object:
        tried.append(update.count)
        return SimpleNamespace(complete=update.count <= whole, reason="too many", inputs=())

    monkeypatch.setattr(simulation.Options, "attack", attack)
    reach = simulation.reach(model, choose("digits", SHAPE, CLASSES, most=most), "sampling", most=most)
    assert reach.largest <= whole
    assert len(set(tried)) == len(tried) <= 10
    if whole == most:
        assert (reach.largest, reach.failed, reach.reason) == (most, None, "")
    else:
        assert whole < reach.failed <= reach.largest + max(1, reach.largest // simulation.FINENESS)
        assert reach.reason == "too many"
