"""Records of many rows: indexed, joined and compared as each row by itself."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spear.network.side_by_side import SideBySide


@dataclass(frozen=True)
class Inner(SideBySide):
    """A record in a record."""

    z: Tensor


@dataclass(frozen=True)
class Outer(SideBySide):
    """Rows of several shapes, one record and one field that may be missing."""

    w: Tensor
    label: Tensor
    inner: Inner
    place: Tensor | None = None


def some(seed: int, count: int = 5) -> Outer:
    generator = torch.Generator().manual_seed(seed)
    w, z = (torch.randn(count, 3, generator=generator) for _ in range(2))
    return Outer(w, torch.arange(count) + 10 * seed, Inner(z))


@pytest.mark.parametrize("seed", range(3))
def test_the_better_rows_are_chosen_one_by_one(seed):
    mine, other = some(seed), some(seed + 1)
    better = torch.rand(5, generator=torch.Generator().manual_seed(seed)) < 0.5
    both = mine.where(better, other)
    for k, is_better in enumerate(better.tolist()):
        row = (other if is_better else mine)[torch.tensor([k])]
        assert torch.equal(both.w[k : k + 1], row.w)
        assert torch.equal(both.label[k : k + 1], row.label)
        assert torch.equal(both.inner.z[k : k + 1], row.inner.z)
    assert both.place is None


def test_parts_joined_are_the_whole():
    whole = some(0)
    parts = [Inner(whole.inner.z[:2]), Inner(whole.inner.z[2:])]
    assert torch.equal(Inner.joined(parts).z, whole.inner.z)
    assert whole.to(torch.float64).inner.z.dtype == torch.float64
