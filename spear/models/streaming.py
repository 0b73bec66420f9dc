"""Layers too large to be converted: float64 arithmetic on matrices in the precision they came in, rows after rows."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

CHUNK = 2**20  # entries that are converted, or looked at, in one piece


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive rows of a matrix, about `CHUNK` entries at a time."""
    size = max(1, CHUNK // max(columns, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


@dataclass(frozen=True)
class Blocks:
    """The matrix [weight | column] in the precision and on the device of `like`, a block of rows at a time."""

    weight: Float[Tensor, "m n"]
    column: Float[Tensor, " m"] | None
    like: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n + (self.column is not None)

    def __iter__(self) -> Iterator[tuple[slice, Float[Tensor, "_rows n1"]]]:
        for part in pieces(*self.weight.shape):
            block = self.weight[part].to(self.like)
            if self.column is not None:
                block = torch.cat([block, self.column[part, None].to(self.like)], 1)
            yield part, block

    def times(self, other: Float[Tensor, "n1 k"]) -> Float[Tensor, "m k"]:
        """J other."""
        n, plain = self.weight.shape[1], Blocks(self.weight, None, self.like)
        made = other.new_empty(self.shape[0], other.shape[1])  # first: results between blocks would scatter the heap
        for part, block in plain:
            torch.mm(block, other[:n], out=made[part])
        return made if self.column is None else made.addr_(self.column.to(self.like), other[n])

    def after(self, basis: Float[Tensor, "m k"]) -> Float[Tensor, "k n1"]:
        """basis^T J."""
        n, plain = self.weight.shape[1], Blocks(self.weight, None, self.like)
        made = basis.new_zeros(basis.shape[1], self.shape[1])
        for part, block in plain:
            made[:, :n].addmm_(basis[part].mT, block)
        if self.column is not None:
            made[:, n] = basis.mT @ self.column.to(self.like)
        return made

    def whole(self) -> Float[Tensor, "m n1"]:
        """J itself, converted."""
        made = self.like.new_empty(self.shape)
        for part, block in self:
            made[part] = block
        return made

    def any(self) -> bool:
        """Whether an entry differs from zero."""
        return any(bool(block.any()) for _, block in self)


def product(x: Float[Tensor, "*s n"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "*s m"]:
    """x Wᵀ where x is, in its precision; weights elsewhere, or in another, are converted by blocks."""
    if (weight.dtype, weight.device) == (x.dtype, x.device):
        return x @ weight.mT
    return Blocks(weight, None, x).times(x.flatten(0, -2).mT).mT.unflatten(0, x.shape[:-1])


def product_back(x: Float[Tensor, "*s m"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "*s n"]:
    """x W, likewise."""
    if (weight.dtype, weight.device) == (x.dtype, x.device):
        return x @ weight
    return Blocks(weight, None, x).after(x.flatten(0, -2).mT).unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """x W^T, or x W, by blocks of rows of W; of x alone there is a derivative, of any order."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        return product_back(x, weight) if transposed else product(x, weight)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.weight, ctx.transposed = inputs

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(g, ctx.weight, not ctx.transposed), None, None


class Streamed(nn.Linear):
    """A linear layer that computes in float64 with the weights of another, which stay as and where they are."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight.detach()
        self.bias = None if linear.bias is None else linear.bias.detach().to(device, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        z = _Product.apply(x.flatten(0, -2), self.weight, False).unflatten(0, x.shape[:-1])
        return z if self.bias is None else z + self.bias


def streamed(tail: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of a module in float64 whose linear layers are `Streamed`; its other parameters require gradients."""
    linear = {id(module): Streamed(module, device) for module in tail.modules() if type(module) is nn.Linear}
    return copy.deepcopy(tail, linear).to(device, torch.float64).eval().requires_grad_(True)


def weight_names(module: nn.Module) -> list[str]:
    """The names of all weights and biases, those of `Streamed` layers included, which are no parameters."""
    linear = [name for name, part in module.named_modules() if isinstance(part, Streamed)]
    own = [f"{name}.{kind}" for name in linear for kind in ("weight", "bias")]
    return [*own, *(name for name, _ in module.named_parameters())]


@dataclass(frozen=True)
class Outer:
    """A linear layer's gradient as a sum of outer products: deltas^T inputs."""

    deltas: Float[Tensor, "s m"]
    inputs: Float[Tensor, "s n"]

    def __getitem__(self, part: slice) -> Float[Tensor, "_rows n"]:
        return self.deltas[:, part].mT @ self.inputs
