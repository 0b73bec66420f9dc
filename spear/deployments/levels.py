"""How far apart the values are between which an entry was rounded: few distinct ones, 16-bit floats, or weights.

A quantiser leaves few distinct values in a tensor, or in each row or block of it, block-wise ones times the block's
largest entry. They are counted: each entry lay in the cell around the value that it has. Floats have their type's
spacing, and so has a change of weights the weights' own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOOKED_AT = 2**14  # entries, in the order in which they are sent, that show what a block is
SMALLEST = 32  # entries of a block
MOSTLY, ROUNDED = 0.9, 1e-9  # share of the entries that a type must hold, up to this relative error
FEW = 0.5  # of the entries of a block: distinct values up to which they are few
AS_FEW = 1.1  # times the least share of distinct values: still that
TOGETHER = 1e-5  # of the largest entry of a block: values so near to each other are one
POOLED = 2  # times as many values in all blocks as in one: they share their values, up to the largest entry of each


@dataclass(frozen=True)
class Cells:
    """Between which bounds the entries of a tensor lay before they were rounded, in the tensor's unit and shape."""

    low: Float[Tensor, "*shape"]
    high: Float[Tensor, "*shape"]

    @property
    def width(self) -> Float[Tensor, "*shape"]:
        return self.high - self.low


def cells(sent: Float[Tensor, "*shape"]) -> Cells | None:
    """The cells of the few values that a tensor holds, as a whole, or in each row or block; `None` where it has many.

    Blocks are consecutive entries of the flattened tensor. The outermost values' cells are even.
    """
    flat = sent.flatten()
    size = block_size(flat, sent.shape[-1])
    if size is None:
        return None
    blocks = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    bounds = _between_shared(blocks) or _between_own(blocks)
    low, high = (bound.flatten()[: len(flat)].view(sent.shape) for bound in bounds)
    return Cells(low, high)


def block_size(flat: Float[Tensor, " n"], row: int) -> int | None:
    """The smallest number of consecutive entries with as few distinct values, for their number, as any number has.

    Candidates are powers of two, rows, and the whole. `None` where no block holds few: zeros do not count.
    """
    part = flat[:LOOKED_AT]
    sizes = {2**k for k in range(SMALLEST.bit_length() - 1, len(part).bit_length()) if 2**k <= len(part)}
    sizes |= {size for size in (row, len(part)) if SMALLEST <= size <= len(part)}
    shares = {size: _share(part[: len(part) // size * size].view(-1, size)) for size in sorted(sizes)}
    least = min(shares.values(), default=1.0)
    if not least <= FEW:
        return None
    size = next(size for size, share in shares.items() if share <= AS_FEW * least)
    return len(flat) if size == max(sizes) else size


def _share(blocks: Float[Tensor, "k size"]) -> float:
    """Distinct values of the blocks over their entries, zeros aside."""
    ranked = blocks.sort(dim=1)[0]
    there = ranked != 0
    new = there.clone()
    new[:, 1:] &= ranked[:, 1:] != ranked[:, :-1]
    return float(new.sum() / there.sum()) if there.any() else 1.0


def _between_shared(blocks: Float[Tensor, "k size"]) -> tuple[Tensor, Tensor] | None:
    """Bounds from the values that all blocks share once they are divided by their largest entry."""
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(blocks.dtype).tiny)
    some = blocks[: max(1, LOOKED_AT // blocks.shape[1])]
    most = max(len(block.unique()) for block in some[:SMALLEST])
    values = (some / scale[: len(some)] / TOGETHER).round().unique() * TOGETHER
    apart = torch.ones_like(values, dtype=torch.bool)
    apart[1:] = values.diff() > 2 * TOGETHER
    values = values[apart]
    if len(values) < 2 or len(values) > POOLED * most + 1:
        return None
    middle = (values[1:] + values[:-1]) / 2
    ends = 2 * values[:1] - middle[:1], 2 * values[-1:] - middle[-1:]
    edges = torch.cat([ends[0], middle, ends[1]])
    index = torch.bucketize(blocks / scale, middle)
    return edges[index] * scale, edges[index + 1] * scale


def _between_own(blocks: Float[Tensor, "k size"]) -> tuple[Tensor, Tensor]:
    """Bounds half way to the next smaller and the next larger value of each entry's own block."""
    ranked, order = blocks.sort(dim=1)
    place = torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks)
    new = torch.ones_like(blocks, dtype=torch.bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    last = torch.ones_like(new)
    last[:, :-1] = new[:, 1:]
    first = torch.where(new, place, 0).cummax(1)[0]
    end = torch.where(last, place, blocks.shape[1]).flip(1).cummin(1)[0].flip(1)
    below = (ranked - ranked.gather(1, (first - 1).clamp_min(0))) / 2
    above = (ranked.gather(1, (end + 1).clamp_max(blocks.shape[1] - 1)) - ranked) / 2
    below, above = torch.where(first > 0, below, above), torch.where(end + 1 < blocks.shape[1], above, below)
    low, high = torch.empty_like(blocks), torch.empty_like(blocks)
    return low.scatter_(1, order, ranked - below), high.scatter_(1, order, ranked + above)


def spacing(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The distance of neighbouring numbers of a floating type at each value; 0 at 0."""
    info = torch.finfo(dtype)
    size = values.abs().clamp_min(info.tiny)
    return torch.where(values == 0, 0, 2.0 ** size.log2().floor() * info.eps)


def held_by(values: Float[Tensor, "*shape"], dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    """The first of these floating types that holds nearly every value; a part answers for all."""
    part = values.flatten()[:LOOKED_AT]
    part = part[part != 0]
    for dtype in dtypes:
        off = (part.to(dtype).to(part) - part).abs()
        if len(part) >= SMALLEST and bool((off <= ROUNDED * part.abs()).double().mean() >= MOSTLY):
            return dtype
    return None
