"""Every method on a device other than the host's: no operand strays, the host seldom waits, the result is the same."""

from collections import Counter

import pytest
import torch
from accelerator import DEVICE, MixedDevices, OnDevice, accelerator
from torch import Tensor, nn

import spear
from spear import data
from spear.published import filtering

CASES = [("network", 12, 100, 3), ("network", 40, 80, 3), ("network", 12, 100, 2), ("layer", 10, 120, 3)]
CASES += [("sampling", 5, 80, 3), ("guided", 5, 80, 3), ("dictionary", 5, 120, 3)]


def _client(batch: int, width: int, depth: int) -> tuple[nn.Module, spear.SharedUpdate]:
    inputs, labels = data.load("photos", count=batch, seed=0)
    model = spear.models.fcnn(inputs.shape[1:], width, depth, len(data.classes("photos")), seed=0)
    return model, spear.federated.gradient(model, inputs, labels)


@pytest.mark.parametrize(("method", "batch", "width", "depth"), CASES)
def test_every_method_keeps_to_the_device_and_finds_the_same(method: str, batch: int, width: int, depth: int) -> None:
    model, update = _client(batch, width, depth)
    host = spear.attack(model, update, method=method, seed=0)
    with accelerator() as (device, waits):
        there = spear.attack(model, update, method=method, seed=0, device=device)
    assert len(host.inputs) == batch
    assert isinstance(there.inputs, OnDevice)
    assert there.inputs.device == DEVICE
    assert torch.equal(there.inputs.host, host.inputs)
    assert torch.equal(there.certified.host, host.certified)
    assert (there.labels is None) == (host.labels is None)
    assert sum(waits.values()) > 0


@pytest.mark.parametrize(("method", "batch", "width", "depth"), [case for case in CASES if case[0] == "network"])
def test_a_search_waits_at_most_once_a_look(method: str, batch: int, width: int, depth: int) -> None:
    """Between two looks at the starts, `phase_retrieval.EVERY` steps apart, neither `relax` nor what it calls waits."""
    model, update = _client(batch, width, depth)
    with accelerator() as (device, waits):
        spear.attack(model, update, method=method, seed=0, device=device)
    within = Counter()
    for line, count in waits.items():
        within[line.split()[1]] += count
    looks = within["advance"]
    assert looks > 0
    assert not {"relax", "forward", "project", "misfit"} & within.keys()
    assert len([line for line in waits if line.endswith(" advance")]) == 1


@pytest.mark.parametrize("seed", range(3))
def test_tests_of_directions_wait_no_more_often_for_many(seed: int) -> None:
    L, q = (torch.randn(n, 5, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float64) for n in (60, 40))
    counts = []
    for number in (1, 40):
        with accelerator() as (device, waits):
            filtering.determined(L.to(device), q[:number].to(device), tolerance=0.3)
        counts.append(sum(waits.values()))
    assert 0 < counts[1] == counts[0]


FAULTS = {
    "an operand of the host": lambda x: x + torch.ones(len(x), dtype=x.dtype),
    "a product with the host": lambda x: x @ torch.ones(len(x), dtype=x.dtype),
    "a list of two devices": lambda x: torch.cat([x, torch.ones(1, dtype=x.dtype)]),
    "written into": lambda x: torch.zeros(len(x), dtype=x.dtype).add_(x),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str) -> None:
    with accelerator() as (device, _), pytest.raises(MixedDevices):
        FAULTS[name](torch.arange(3.0, dtype=torch.float64).to(device))


def test_numpy_is_out_of_reach() -> None:
    with accelerator() as (device, _), pytest.raises((RuntimeError, TypeError), match="numpy"):
        torch.ones(3).to(device).numpy()


WAITS = {
    "item": (lambda x: x.sum().item(), 1),
    "float": (lambda x: float(x.sum()), 1),
    "bool": (lambda x: bool((x > 0).all()), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "mask": (lambda x: x[x > 1], 1),
    "assignment by mask": (lambda x: x.__setitem__(x > 1, 0.0), 1),
    "copy": (lambda x: x.cpu(), 1),
    "list": (lambda x: x.tolist(), 1),
    "unique": (lambda x: x.unique(), 1),
    "index": (lambda x: x[torch.tensor([0, 2])], 0),
    "arithmetic": (lambda x: (2 * x + 1).sort().values.cumsum(0), 0),
    "a copy to the device": (lambda x: torch.ones(3).to(x), 0),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_the_host_waits_for_is_counted(name: str) -> None:
    action, expected = WAITS[name]
    with accelerator() as (device, waits):
        x = torch.arange(3.0).to(device)
        before = sum(waits.values())
        action(x)
    assert sum(waits.values()) - before == expected


@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_host(seed: int) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def several(a: Tensor) -> list[Tensor]:
        q, r = torch.linalg.qr(a)
        return [
            q @ r,
            torch.linalg.svd(a, full_matrices=False)[1],
            a.new_tensor([1.0, 2.0]),
            a.new_zeros(2),
            a[:, 1].clone(),
        ]

    with accelerator() as (device, _):
        there = several(x.to(device))
    for ours, theirs in zip(several(x), there, strict=True):
        assert isinstance(theirs, OnDevice)
        assert torch.equal(theirs.host, ours)
