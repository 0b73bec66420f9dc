"""Steps of least squares on what a front must reproduce: features sample by sample, and its parameters' gradients.

At a point the front is replaced by its derivative, ReLU's zeros and the places of maxima fixed; nothing is formed but
products with it and its transpose, both by autograd.
"""

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from spear.conjugate_gradients import conjugate_gradients, dot_each
from spear.fronts.problem import FrontProblem

RIDGE = 1e-4  # of the mean curvature, taken off again by corrections: single precision stands no less


@dataclass(frozen=True)
class Residual:
    """How far candidates are from what is known: of each one's features relative to its own (k, n), and the rows that
    bind; of the gradient of each parameter relative to it (none where they are not asked for)."""

    features: Float[Tensor, "k n"]
    binding: Bool[Tensor, "k n"]
    gradients: tuple[Tensor, ...]

    @property
    def samples(self) -> Float[Tensor, " k"]:
        """Relative residual of each sample's features."""
        return torch.linalg.vector_norm(self.features, dim=1)

    @property
    def parameters(self) -> float:
        """The largest relative residual of a parameter's gradient."""
        return max((float(torch.linalg.vector_norm(g)) for g in self.gradients), default=0.0)


class Linearised:
    """A front at candidates `x` (k, *shape): the residual, and products with its derivative and the transpose of that.

    With `joint` the gradients of the parameters are among the equations, which ties the samples together.
    """

    def __init__(self, problem: FrontProblem, x: Float[Tensor, "k *shape"], joint: bool) -> None:
        self.sizes = torch.linalg.vector_norm(problem.features, dim=1, keepdim=True).clamp_min(1e-300)
        self.x = x.detach().requires_grad_()
        with torch.enable_grad():
            z = problem.front(self.x)
            g = _gradients(problem, z, create_graph=True) if joint else ()
        self.norms = (
            [torch.linalg.vector_norm(u).clamp_min(1e-300) for u in problem.gradients.values()] if joint else []
        )
        self.outputs = [z, *g]
        self.residual = _residual(problem, z.detach(), [one.detach() for one in g], self.sizes, self.norms)
        self.rows = [self.residual.binding, *(torch.ones_like(one, dtype=torch.bool) for one in g)]  # those that count
        self.cotangents = [torch.zeros_like(one, requires_grad=True) for one in self.outputs]
        with torch.enable_grad():
            (self.back,) = torch.autograd.grad(self.outputs, self.x, self.cotangents, create_graph=True)

    def curvature(self) -> float:
        """About the mean eigenvalue of the derivative's square, by a vector of signs."""
        v = torch.ones_like(self.x)
        v[..., ::2] = -1
        return float(sum(u.square().sum() for u in self.times(v))) / v.numel()

    def leave_out(self, share: float, generator: Generator) -> "Linearised":
        """The same without a random share of the equations."""
        for k, rows in enumerate(self.rows):
            kept = torch.rand(rows.shape, generator=generator) >= share
            self.rows[k] = rows & kept.to(rows.device)
        return self

    def times(self, v: Float[Tensor, "k *shape"]) -> list[Tensor]:
        """The derivative times v, in the units of the residual."""
        made = torch.autograd.grad(
            self.back, self.cotangents, v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [one * rows / unit for one, rows, unit in zip(made, self.rows, [self.sizes, *self.norms], strict=True)]

    def transposed(self, u: list[Tensor]) -> Float[Tensor, "k *shape"]:
        """The transpose of the derivative times u."""
        weighted = [one * rows / unit for one, rows, unit in zip(u, self.rows, [self.sizes, *self.norms], strict=True)]
        return torch.autograd.grad(self.outputs, self.x, weighted, retain_graph=True)[0]


def _gradients(problem: FrontProblem, z: Float[Tensor, "k n"], create_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradients of the front's parameters, from features that are differentiable; none where it has none."""
    parameters = dict(problem.front.named_parameters())
    wanted = [parameters[name] for name in problem.gradients]
    if not wanted:
        return ()
    slopes = torch.where(problem.positive, problem.slopes, 0)
    return torch.autograd.grad((z * slopes).sum(), wanted, create_graph=create_graph, materialize_grads=True)


def _residual(
    problem: FrontProblem, z: Float[Tensor, "k n"], g: list[Tensor], sizes: Tensor, norms: list[Tensor]
) -> Residual:
    binding = problem.positive | (z > problem.features)
    own = torch.where(binding, (z - problem.features) / sizes, 0)
    known = list(problem.gradients.values()) if norms else []
    return Residual(own, binding, tuple((a - u) / n for a, u, n in zip(g, known, norms, strict=True)))


def residual(problem: FrontProblem, x: Float[Tensor, "k *shape"], joint: bool) -> Residual:
    """How far candidates are from what is known."""
    sizes = torch.linalg.vector_norm(problem.features, dim=1, keepdim=True).clamp_min(1e-300)
    if not joint:
        with torch.no_grad():
            return _residual(problem, problem.front(x), [], sizes, [])
    norms = [torch.linalg.vector_norm(u).clamp_min(1e-300) for u in problem.gradients.values()]
    with torch.enable_grad():
        z = problem.front(x)
        g = _gradients(problem, z)
    return _residual(problem, z.detach(), list(g), sizes, norms)


def refined(
    fine: Linearised,
    rough: Linearised,
    right: Float[Tensor, "k *shape"],
    *,
    joint: bool,
    enough: float,
    rounds: int,
    inner: int,
    until: float = math.inf,
) -> tuple[Float[Tensor, "k *shape"], Float[Tensor, " _n"]]:
    """(JᵀJ)⁻¹ right, and its relative residual: solved in the precision of `rough`, corrected in that of `fine`, or all
    in that of `fine` where the former leads nowhere."""
    dot = _dot_together if joint else dot_each
    wide = lambda kept: kept.reshape(-1, *[1] * (right.ndim - 1))  # noqa: E731
    ridge = RIDGE * rough.curvature()
    w, left, size = torch.zeros_like(right), right, dot(right, right).clamp_min(1e-300)
    off = torch.ones_like(size)
    for _ in range(rounds):
        if bool((off <= enough).all()) or time.monotonic() >= until:
            break
        unit = left.abs().max().clamp_min(1e-300)
        step = conjugate_gradients(
            lambda v, by=rough: by.transposed(by.times(v)) + ridge * v,
            (left / unit).to(rough.x.dtype),
            inner,
            dot=dot,
            until=until,
        )[0]
        trial = w + unit * step.to(w)
        rest = right - fine.transposed(fine.times(trial))
        size_of_rest = (dot(rest, rest) / size).sqrt()
        better = size_of_rest < off
        w, left = torch.where(wide(better), trial, w), torch.where(wide(better), rest, left)
        off = torch.where(better, size_of_rest, off)
        if rough is fine and not bool(better.any()):
            break
        if not bool((better | (off <= enough)).all()):
            rough = fine  # where maxima tie, single precision places them elsewhere
    return w, off


def _dot_together(a: Tensor, b: Tensor) -> Float[Tensor, " 1"]:
    return (a * b).sum().reshape(1)
