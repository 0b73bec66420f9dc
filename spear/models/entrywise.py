"""What a piece of a model computes, found by trying it: entries in another order and scale, or ReLU."""

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, fx

from spear.models.graphs import like

ROWS = 4  # random rows that a piece is tried on
WIDEST = 1e4  # the random entries reach from one over it to it


@dataclass(frozen=True)
class Entrywise:
    """The map v_i = factor_i u_j + shift_i with j = `entries`_i, each entry of u used once and no factor zero.

    `rounding` is the unit with which it was found.
    """

    entries: Int[Tensor, " n"]
    factor: Float[Tensor, " n"]
    shift: Float[Tensor, " n"]
    rounding: float = 0.0

    @classmethod
    def same(cls, n: int) -> "Entrywise":
        one = torch.ones(n, dtype=torch.float64)
        return cls(torch.arange(n), one, torch.zeros_like(one))

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return self.keeps_order and bool((self.factor == 1).all()) and not bool(self.shift.any())

    @property
    def keeps_order(self) -> bool:
        return torch.equal(self.entries, torch.arange(len(self.entries)))

    def then(self, other: "Entrywise") -> "Entrywise":
        """This map, then another."""
        taken = other.entries
        factor, shift = other.factor * self.factor[taken], other.factor * self.shift[taken] + other.shift
        return Entrywise(self.entries[taken], factor, shift, max(self.rounding, other.rounding))

    def then_of(self, u: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """The v of each u."""
        return self.slope_of(u) + self.shift.to(u)

    def slope_of(self, u: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """What v gains with u."""
        return self.factor.to(u) * u[:, self.entries.to(u.device)]

    def back(self, v: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """The u of each v."""
        u = torch.empty_like(v)
        u[:, self.entries.to(v.device)] = (v - self.shift.to(v)) / self.factor.to(v)
        return u

    def growth(self, v: Float[Tensor, "k n"]) -> Float[Tensor, " k"]:
        """How many times larger an error of v may be in u, each relative to what it is an error of."""
        size = torch.linalg.vector_norm(v, dim=1) / torch.linalg.vector_norm(self.back(v), dim=1)
        return size / self.factor.abs().min().to(v)

    def stretch(self, apart: Float[Tensor, "k n"]) -> Float[Tensor, " k"]:
        """The same for differences of v, of which the shift takes nothing."""
        factor = self.factor.to(apart)
        back = torch.linalg.vector_norm(apart / factor, dim=1)
        return torch.linalg.vector_norm(apart, dim=1) / back / factor.abs().min()

    @property
    def error(self) -> float:
        """What the rounding with which the map was found leaves in v, relative to it."""
        return 10 * self.rounding * float((1 + (self.shift / self.factor).abs()).max())


class Piece:
    """A function of one tensor, in evaluation mode: tried in float64, or else in its own precision."""

    def __init__(self, module: fx.GraphModule) -> None:
        own = copy.deepcopy(module).cpu().eval()
        self.copies = (copy.deepcopy(own).double(), own)
        self.last = 0  # size of what it gave

    @property
    def double(self) -> fx.GraphModule:
        """It in float64."""
        return self.copies[0]

    def __call__(self, samples: Float[Tensor, "k *shape"]) -> Float[Tensor, "k n"] | None:
        """What it gives for samples, one row each, where that does not depend on the others; `None` where it fails."""
        for module in self.copies:
            given = like(samples, module)
            try:
                with torch.no_grad():
                    value, alone = module.forward(given), module.forward(given[-1:])  # a call would print errors
            except Exception:  # another shape, or the model's own code: it may raise anything
                continue
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == len(given) * alone.numel():
                rows, self.last = value.reshape(len(given), -1), value.shape[-1]
                return rows if torch.allclose(rows[-1], alone.flatten()) else None
        return None

    def feeds(self, shape: tuple[int, ...], n: int) -> bool:
        """Whether it makes vectors of n entries of a sample of that shape."""
        value = self(torch.zeros(2, *shape, dtype=torch.float64))
        return value is not None and self.last == n


def find(piece: Piece, shape: tuple[int, ...]) -> Entrywise | None:
    """The map that a piece of a model is on samples of that shape, `None` where it is none of this kind."""
    n = math.prod(shape)
    index, chance = torch.arange(n, dtype=torch.float64), _random(n)
    known = torch.stack([torch.zeros_like(index), torch.ones_like(index), index / n])
    v = piece(torch.cat([known, chance]).unflatten(1, shape))
    if v is None or v.shape != (len(known) + ROWS, n):
        return None
    fine, rounding = (1e-9 if v.dtype == torch.float64 else 1e-4), torch.finfo(v.dtype).eps
    v = v.double()
    shift, factor = v[0], v[1] - v[0]
    if not bool(v.isfinite().all()) or bool((factor.abs() <= 1e-12 * shift.abs()).any()):
        return None
    entries = (n * (v[2] - shift) / factor).round()
    if not torch.equal(entries.sort().values, index):
        return None
    found = Entrywise(entries.long(), factor, shift, rounding)
    moved = factor * chance[:, found.entries]
    good = (v[3:] - moved - shift).abs() <= fine * (moved.abs() + shift.abs() + factor.abs())
    return found if bool(good.all()) else None


def relu_then(piece: Piece, n: int) -> Entrywise | None:
    """The map of entries behind the ReLU of a piece that is ReLU and such a map; `None` where it is something else."""
    chance = _random(n)
    known = torch.stack([torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)])
    v = piece(torch.cat([known, chance]))
    if v is None or v.shape != (2 + ROWS, n):
        return None
    fine = 1e-12 if v.dtype == torch.float64 else 1e-6
    v = v.double()
    shift, factor = v[0], v[1] - v[0]
    good = (v[2:] - factor * chance.relu() - shift).abs() <= fine * ((factor * chance).abs() + shift.abs())
    return Entrywise(torch.arange(n), factor, shift) if bool(factor.all()) and bool(good.all()) else None


def is_log_softmax(piece: Piece, n: int) -> bool:
    """Whether a piece is the logarithm of the softmax of n > 1 entries."""
    chance = torch.randn(ROWS, n, generator=Generator().manual_seed(0), dtype=torch.float64)
    v = piece(chance) if n > 1 else None
    return v is not None and v.shape == chance.shape and torch.allclose(v.double(), chance.log_softmax(1), atol=1e-5)


def _random(n: int) -> Float[Tensor, "rows n"]:
    """Random entries of both signs and all sizes."""
    generator = Generator().manual_seed(0)
    size = WIDEST ** (2 * torch.rand(ROWS, n, generator=generator, dtype=torch.float64) - 1)
    return torch.randn(ROWS, n, generator=generator, dtype=torch.float64) * size
