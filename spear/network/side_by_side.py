"""Records of many starts or samples at once, which are indexed, joined and compared row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Group = TypeVar("Group")  # of one kind or another


@dataclass(frozen=True)
class SideBySide:
    """Every field has a row for each: a tensor, another such record, or None where there is nothing to hold."""

    def __getitem__(self: Group, index: Int[Tensor, " j"] | Bool[Tensor, " k"]) -> Group:
        return _each(lambda field: field[index], self)

    def to(self: Group, dtype: torch.dtype) -> Group:
        """The same in another precision."""
        return _each(lambda field: field.to(dtype), self)

    def where(self: Group, better: Bool[Tensor, " k"], other: Group) -> Group:
        """These, or the others where those are better."""
        return _each(lambda mine, theirs: _chosen(better, mine, theirs), self, other)

    @classmethod
    def joined(cls: type[Group], parts: Sequence[Group]) -> Group:
        """All rows of the parts."""
        return _each(lambda *rows: torch.cat(rows), *parts)


def _each(change: Callable[..., object], first: Group, *others: Group) -> Group:
    """A record of what becomes of each field."""
    rows = [[getattr(part, f.name) for part in (first, *others)] for f in fields(first)]
    return type(first)(*(None if row[0] is None else change(*row) for row in rows))


def _chosen(better: Tensor, mine: Tensor | SideBySide, theirs: Tensor | SideBySide) -> Tensor | SideBySide:
    if isinstance(mine, SideBySide):
        return mine.where(better, theirs)
    return torch.where(better.reshape(-1, *[1] * (mine.ndim - 1)), theirs, mine)
