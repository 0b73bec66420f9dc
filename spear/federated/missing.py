"""Entries of an update that are not known: cut at a bound, or set to zero for being small. Told ones are NaN.

What was cut repeats a bound exactly, above values that do not repeat; what was set to zero leaves a gap around it,
beyond which values are many. A number as rare as that in an exact gradient may be suspected too: it is then found
again from the others.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 2  # entries at a bound, in different rows or columns that differ: fewer do not repeat
OTHERS = 4  # rows in which two columns can be compared
BENEATH, APART = 4, 0.5  # values in the upper half of the range at least; the share of them that must differ
LOOKED_AT = 2**14  # such values of a tensor
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


def cuts(tensors: Mapping[str, Tensor]) -> Cuts:
    """What the values of tensors show of cuts at a bound, common or a tensor's own, and of a gap around zero."""
    largest, least = _extent(tensors.values())
    if largest == 0:
        return Cuts(None, False, {})
    ends: dict[str, tuple[float, ...]] = {}
    rows, above, around, zeros, alone = set(), [], [], 0, False
    for name, tensor in ((name, tensor.detach()) for name, tensor in tensors.items()):
        size = tensor.abs()
        rows |= _rows(size == largest)
        alone |= _in_no_other_row(size == largest, tensor)
        above.append(size[(size >= largest / 2) & (size < largest)][:LOOKED_AT])
        around.append(size[(size >= least) & (size < 2 * least)][:LOOKED_AT])
        zeros += int((size == 0).sum())
        found = tuple(v for v in (float(tensor.max()), float(tensor.min())) if _is_cut(tensor, v))
        ends |= {name: found} if found else {}
    bound = largest if (len(rows) >= FEWEST or alone) and _differ(torch.cat(above)) else None
    near = torch.cat(around)
    gap = zeros > 0 and len(near) >= AROUND and len(near.unique()) >= KINDS
    return Cuts(bound, gap, ends)


def _extent(tensors: Iterable[Tensor]) -> tuple[float, float]:
    """The largest size of an entry, and the least that is not zero."""
    largest, least = 0.0, float("inf")
    for tensor in tensors:
        size = tensor.detach().abs()
        size = size[size > 0]
        if len(size):
            largest, least = max(largest, float(size.max())), min(least, float(size.min()))
    return largest, least


def _rows(there: Tensor) -> set[int]:
    """The first indices of the entries that are marked."""
    return set(there.nonzero()[:, 0].tolist())


def _in_no_other_row(there: Tensor, tensor: Tensor) -> bool:
    """Whether two columns share the marked value in a row, and agree in no other, as those of equal pixels do."""
    if tensor.ndim != 2 or there.sum() < FEWEST:
        return False
    a, b = (tensor[:, column] for column in there.nonzero()[:FEWEST, 1])
    other = (a != 0) & (b != 0) & ~there.any(1)
    return int(other.sum()) >= OTHERS and not bool((other & (a == b)).any())


def _is_cut(tensor: Tensor, value: float) -> bool:
    """Whether a tensor's largest or least value repeats in several rows, above others that do not."""
    if value == 0 or len(_rows(tensor == value)) <= FEWEST:
        return False
    outer = tensor / value
    return _differ(outer[(outer >= 0.5) & (outer < 1)][:LOOKED_AT])


def _differ(values: Tensor) -> bool:
    return len(values) >= BENEATH and len(values.unique()) > APART * len(values)
