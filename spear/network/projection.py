"""Projections from the input: each sample alone, from two linear layers that follow each other.

A sample's z = [W | beta] [x; 1] lies in the image B of the first gradient's row space, and ReLU(z) in the row space of
the second gradient. Nothing above the second layer is used, no label is guessed: what stops phase retrieval at the last
hidden layer (layers that no longer tell samples apart, a thousand classes) is no obstacle. Vectors are rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from spear.network.problem import NetworkView, Targets, passes
from spear.published.lowrank import LowRank

STEP, MOMENTUM = 5.0, 0.95  # a step of 5.5 diverges, 4 is clearly slower


@dataclass(frozen=True)
class Factors:
    """A gradient as U diag(S) V, with what samples were subtracted from it so far."""

    basis: Float[Tensor, "m r"]
    singular: Float[Tensor, " r"]
    rows: Float[Tensor, "r n1"]

    @classmethod
    def of(cls, low: LowRank) -> "Factors":
        singular = low.R.norm(dim=1)
        return cls(low.L, singular, low.R / singular[:, None])

    def without(self, deltas: Float[Tensor, "s m"], inputs: Float[Tensor, "s n1"]) -> "Factors":
        """The gradient less the samples' own outer products, its rank lowered by their number."""
        core = torch.diag(self.singular) - (deltas @ self.basis).T @ (inputs @ self.rows.T)
        left, singular, right = torch.linalg.svd(core)
        rank = len(singular) - len(deltas)
        return Factors(self.basis @ left[:, :rank], singular[:rank], right[:rank] @ self.rows)


def ascend(
    c: Float[Tensor, "k r"], lift: Float[Tensor, "m r"], span: Float[Tensor, "m b"], *, steps: int = 400
) -> tuple[Float[Tensor, "k r"], Float[Tensor, " k"]]:
    """Maximise |P y|² / |y|², y = ReLU(z), z = `lift` c, over all starts at once: the c, and the sine of y to `span`.

    Gradient ascent with momentum on the unit sphere; `lift` and `span` have orthonormal columns.
    """
    before = c
    for _ in range(steps):
        z = c @ lift.T
        y = z.clamp_min(0)
        inside = y @ span
        rho = inside.pow(2).sum(1, keepdim=True) / y.pow(2).sum(1, keepdim=True).clamp_min(1e-30)
        pull = ((inside @ span.T) / rho.clamp_min(1e-30) - y) * (z > 0)
        after = c + STEP * (pull @ lift) + MOMENTUM * (c - before)
        c, before = after / after.norm(dim=1, keepdim=True), c
    return c, (1 - rho[:, 0]).clamp_min(0).sqrt()


def polish(
    c: Float[Tensor, "k r"], lift: Float[Tensor, "m r"], span: Float[Tensor, "m b"], *, rounds: int = 8
) -> tuple[Float[Tensor, "k r"], Float[Tensor, " k"], Float[Tensor, " k"]]:
    """For the mask D of every z the smallest eigenpair of Bᵀ D (I - P) D B against Bᵀ D B, until the masks settle.

    Returns c, its sine and the next larger one. A mask that did not settle has sine 1.
    """
    for _ in range(rounds):
        mask = c @ lift.T > 0
        part = mask[:, :, None] * lift
        inside = span.T @ part
        gram = part.mT @ part
        ridge = 1e-13 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-300
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[1], dtype=c.dtype, device=c.device))
        half = torch.linalg.solve_triangular(factor, gram - inside.mT @ inside, upper=False)
        full = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        values, vectors = torch.linalg.eigh((full + full.mT) / 2)
        new = torch.linalg.solve_triangular(factor.mT, vectors[:, :, :1], upper=True)[:, :, 0]
        new = new / new.norm(dim=1, keepdim=True)
        c = new * torch.where((new * c).sum(1, keepdim=True) < 0, -1.0, 1.0)
        settled = ((c @ lift.T > 0) == mask).all(1)
        if settled.all():
            break
    sines = values.clamp_min(0).sqrt()
    second = sines[:, 1] if sines.shape[1] > 1 else torch.ones_like(sines[:, 0])
    return c, torch.where(settled, sines[:, 0], 1.0), second


def distinct(c: Float[Tensor, "k r"], order: Float[Tensor, " k"], cosine: float) -> Int[Tensor, " j"]:
    """Indices by increasing `order`, each less than `cosine` from every earlier one."""
    ranked = order.argsort()
    close = (c[ranked] @ c[ranked].T > cosine).triu(1)
    keep = torch.ones(len(c), dtype=torch.bool, device=c.device)
    for k in range(len(c)):
        if keep[k]:
            keep &= ~close[k]
    return ranked[keep]


def project_samples(
    problem: NetworkView, first: Factors, second: Factors, *, starts: int, accept: float, generator: Generator
) -> Float[Tensor, "s n"]:
    """Inputs whose pre-activations and activations fit both gradients to the sine `accept`, from random starts."""
    lift, triangle = torch.linalg.qr(problem.affine(0) @ first.rows.T)
    span = torch.linalg.qr(second.rows[:, : len(lift)].T)[0]
    c = torch.randn(starts, lift.shape[1], generator=generator, dtype=torch.float64).to(lift)
    c = c / c.norm(dim=1, keepdim=True)
    end, sine = ascend(c.float(), lift.float(), span.float())
    end, sine = end.double()[sine < 0.2], sine[sine < 0.2]
    if not len(end):
        return first.rows.new_zeros(0, problem.weights[0].shape[1])
    end = end[distinct(end, sine, 0.9999)]
    parts = [polish(part, lift, span) for part in end.split(32)]
    c, sine, further = (torch.cat(x) for x in zip(*parts, strict=True))
    good = (sine < accept) & (further > 1e3 * sine.clamp_min(accept / 10))
    c = c[good][distinct(c[good], sine[good], 1 - 1e-6)]
    s = torch.linalg.solve_triangular(triangle, c.T, upper=True).T
    rows = s @ first.rows
    return (rows / rows[:, -1:])[rows[:, -1] != 0][:, :-1]


def class_sines(
    problem: NetworkView, inputs: Float[Tensor, "s n"], basis: Float[Tensor, "m b"], layer: int = 0
) -> Float[Tensor, "s classes"]:
    """Of each class's back-propagated vector at a layer to the span of its gradient."""
    sines = [(d - d @ basis @ basis.T).norm(dim=1) / d.norm(dim=1) for d in each_class(problem, inputs, layer)]
    return torch.stack(sines, 1)


def each_class(problem: NetworkView, inputs: Float[Tensor, "s n"], layer: int = 0) -> Iterator[Float[Tensor, "s m"]]:
    """The samples' back-propagated vectors at a layer, class by class."""
    for k in range(problem.classes):
        counts = torch.zeros(len(inputs), problem.classes, dtype=inputs.dtype, device=inputs.device)
        counts[:, k] = 1
        yield passes(problem, inputs, Targets(counts, 1.0, 0.0)).deltas[layer]
