"""Entries of an update that are not known: cut at a bound, or set to zero for being small. Told ones are NaN.

What was cut repeats a bound exactly, above values that do not repeat; what was set to zero leaves a gap around it,
beyond which values are many. A number as rare as that in an exact gradient may be suspected too: it is then found
again from the others.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spear.models.streaming import pieces

FEWEST = 2  # entries at a bound, in different rows or columns that differ: fewer do not repeat
OTHERS = 4  # rows in which two columns can be compared
BENEATH, APART = 4, 0.5  # values in the upper half of the range at least; the share of them that must differ
LOOKED_AT = 2**14  # such values of a tensor
CROWDED, SAME = 4, 1e-6  # times; relative difference of two sizes that are one point of a grid
AROUND, KINDS = 30, 8  # entries next to the gap around zero at least, and different sizes among them: no grid has them


@dataclass(frozen=True)
class Cuts:
    """What was done to tensors by name: entries of the size `bound` were cut to it, small ones set to zero (`gap`).

    `own` are the tensors that were cut at a least or largest value of their own.
    """

    bound: float | None
    gap: bool
    own: Mapping[str, tuple[float, ...]]

    def unknown(self, name: str, tensor: Tensor) -> Tensor:
        """Which entries of a tensor are not known."""
        cut = tensor == 0 if self.gap else torch.zeros_like(tensor, dtype=torch.bool)
        if self.bound is not None:
            cut = cut | (tensor.abs() == self.bound)
        for value in self.own.get(name, ()):
            cut = cut | (tensor == value)
        return cut

    def __bool__(self) -> bool:
        return self.gap or self.bound is not None or bool(self.own)


def is_rounding(tensor: Tensor) -> bool:
    """Whether zeros are points of a grid to which all was rounded, as secure aggregation in whole numbers leaves it:
    no more than `CROWDED` times as many as the points next to zero."""
    zeros = tensor.numel() - int(tensor.count_nonzero())
    if not zeros:
        return False
    nearest = (1 + SAME) * _extent([tensor])[1]
    beside = sum(int((part.abs() <= nearest).sum()) for _, part in _parts(tensor)) - zeros
    return beside > 1 and zeros <= CROWDED * beside


def cuts(tensors: Mapping[str, Tensor]) -> Cuts:
    """What the values of tensors show of cuts at a bound, common or a tensor's own, and of a gap around zero."""
    largest, least = _extent(tensors.values())
    if largest == 0:
        return Cuts(None, False, {})
    ends: dict[str, tuple[float, ...]] = {}
    rows, above, around, zeros, alone = set(), [], [], 0, False
    for name, tensor in ((name, tensor.detach()) for name, tensor in tensors.items()):
        rows |= _rows(tensor, lambda part: part.abs() == largest)
        alone |= _in_no_other_row(tensor, largest)
        above.append(_some(tensor, torch.abs, lambda size: (size >= largest / 2) & (size < largest)))
        around.append(_some(tensor, torch.abs, lambda size: (size >= least) & (size < 2 * least)))
        zeros += tensor.numel() - int(tensor.count_nonzero())
        found = tuple(v for v in (float(tensor.max()), float(tensor.min())) if _is_cut(tensor, v))
        ends |= {name: found} if found else {}
    bound = largest if (len(rows) >= FEWEST or alone) and _differ(torch.cat(above)) else None
    near = torch.cat(around)
    gap = zeros > 0 and len(near) >= AROUND and len(near.unique()) >= KINDS
    return Cuts(bound, gap, ends)


def _parts(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A tensor by blocks of rows, each with the number of its first: a copy of the whole may be too large."""
    for part in pieces(len(tensor), tensor[:1].numel()):
        yield part.start, tensor[part]


def _some(tensor: Tensor, change: Callable[[Tensor], Tensor], where: Callable[[Tensor], Tensor]) -> Tensor:
    """The first `LOOKED_AT` changed entries that are wanted."""
    found, count = [tensor.new_empty(0)], 0
    for _, part in _parts(tensor):
        changed = change(part)
        found.append(changed[where(changed)])
        count += len(found[-1])
        if count >= LOOKED_AT:
            break
    return torch.cat(found)[:LOOKED_AT]


def _extent(tensors: Iterable[Tensor]) -> tuple[float, float]:
    """The largest size of an entry, and the least that is not zero."""
    largest, least = 0.0, float("inf")
    for _, part in (pair for tensor in tensors for pair in _parts(tensor.detach())):
        size = part.abs()
        largest = max(largest, float(size.max()))
        least = min(least, float(torch.where(size > 0, size, torch.inf).min()))
    return largest, least


def _rows(tensor: Tensor, marked: Callable[[Tensor], Tensor]) -> set[int]:
    """The first indices of the entries that are marked."""
    there = ((start, marked(part).reshape(len(part), -1).any(1)) for start, part in _parts(tensor))
    return {start + row for start, own in there for row in own.nonzero()[:, 0].tolist()}


def _in_no_other_row(tensor: Tensor, largest: float) -> bool:
    """Whether two columns share the largest size in a row, and agree in no other, as those of equal pixels do."""
    if tensor.ndim != 2:
        return False
    columns, rows = [], []
    for _, part in _parts(tensor):
        there = part.abs() == largest
        rows.append(there.any(1))
        if len(columns) < FEWEST and bool(rows[-1].any()):
            columns += there.nonzero()[:FEWEST, 1].tolist()
    if len(columns) < FEWEST:
        return False
    a, b = (tensor[:, column] for column in columns[:FEWEST])
    other = (a != 0) & (b != 0) & ~torch.cat(rows)
    return int(other.sum()) >= OTHERS and not bool((other & (a == b)).any())


def _is_cut(tensor: Tensor, value: float) -> bool:
    """Whether a tensor's largest or least value repeats in several rows, above others that do not."""
    if value == 0 or len(_rows(tensor, lambda part: part == value)) <= FEWEST:
        return False
    return _differ(_some(tensor, lambda part: part / value, lambda outer: (outer >= 0.5) & (outer < 1)))


def _differ(values: Tensor) -> bool:
    return len(values) >= BENEATH and len(values.unique()) > APART * len(values)
