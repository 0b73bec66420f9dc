"""Projections from the input: each sample alone, from two linear layers that follow each other.

A sample's z = [W | beta] [x; 1] lies in the image B of the first gradient's row space, and ReLU(z) in the row space of
the second gradient. Nothing above the second layer is used, no label is guessed: what stops phase retrieval at the last
hidden layer (layers that no longer tell samples apart, a thousand classes) is no obstacle. Vectors are rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from spear.directions import TINY, distinct, unit_rows
from spear.network.factors import Factors
from spear.network.problem import NetworkView, Targets, passes_of
from spear.network.spaces import sine

STEP, MOMENTUM = 5.0, 0.95  # a step of 5.5 diverges, 4 is clearly slower
STEPS = 400  # of the ascent: what has not arrived by then mostly never does
RIDGE = 1e-13  # of the mean of a Gram matrix's diagonal: keeps that of a mask with too few units positive definite
PART = 32  # masks that are polished at once: each holds a copy of the lift
LOST = 1e-9  # share of |[x; 1]| under which its 1 is rounding
NEEDED = "two hidden layers, the first of them with a bias"


def ascend(
    c: Float[Tensor, "k r"], lift: Float[Tensor, "m r"], span: Float[Tensor, "m b"], *, steps: int = STEPS
) -> tuple[Float[Tensor, "k r"], Float[Tensor, " k"]]:
    """Maximise |P y|² / |y|², y = ReLU(z), z = `lift` c, over all starts at once: the c, and the sine of y to `span`.

    Gradient ascent with momentum on the unit sphere; `lift` and `span` have orthonormal columns.
    """
    before = c
    for _ in range(steps):
        z = c @ lift.T
        y = z.clamp_min(0)
        inside = y @ span
        rho = inside.pow(2).sum(1, keepdim=True) / y.pow(2).sum(1, keepdim=True).clamp_min(TINY)
        pull = ((inside @ span.T) / rho.clamp_min(TINY) - y) * (z > 0)
        after = c + STEP * (pull @ lift) + MOMENTUM * (c - before)
        c, before = unit_rows(after), c
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
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-300
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[1], dtype=c.dtype, device=c.device))
        half = torch.linalg.solve_triangular(factor, gram - inside.mT @ inside, upper=False)
        full = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        values, vectors = torch.linalg.eigh((full + full.mT) / 2)
        new = torch.linalg.solve_triangular(factor.mT, vectors[:, :, :1], upper=True)[:, :, 0]
        new = unit_rows(new)
        c = new * torch.where((new * c).sum(1, keepdim=True) < 0, -1.0, 1.0)
        settled = ((c @ lift.T > 0) == mask).all(1)
        if settled.all():
            break
    sines = values.clamp_min(0).sqrt()
    second = sines[:, 1] if sines.shape[1] > 1 else torch.ones_like(sines[:, 0])
    return c, torch.where(settled, sines[:, 0], 1.0), second


@dataclass(frozen=True)
class Limits:
    """What projections keep on their way, from the ends of the ascent to samples.

    `rough` is the sine under which an end is polished, `alike` the cosine of two ends that lead to one sample; `sine`,
    `same` are those of solutions. `gap` says how many times larger the next sine for the same mask must be: else two
    solutions share it; a sine under `floor` counts as that much, for it is rounding. `rounds` bound the polish.
    """

    rough: float
    alike: float
    sine: float
    same: float
    gap: float = 0.0
    floor: float = 0.0
    rounds: int = 12


@dataclass(frozen=True)
class Projections:
    """The problem that each sample alone solves: z = `lift` c with ReLU(z) in `span`, both orthonormal.

    c are coordinates of [x; 1] along `rows`, the first gradient's row space, changed by `triangle`, so that |z| = |c|.
    """

    lift: Float[Tensor, "m r"]
    triangle: Float[Tensor, "r r"]
    span: Float[Tensor, "m k"]
    rows: Float[Tensor, "r n1"]

    @classmethod
    def onto(
        cls, lift: Float[Tensor, "m r"], rows: Float[Tensor, "r n1"], above: Float[Tensor, "k m"]
    ) -> "Projections":
        """From the first layer's [W | beta] rowsᵀ, its gradient's rows, and the second gradient's less the bias."""
        return cls(*torch.linalg.qr(lift), torch.linalg.qr(above.T)[0], rows)

    @classmethod
    def of(cls, problem: NetworkView, first: Factors, second: Factors) -> "Projections":
        """From the first two gradients, or what is left of them."""
        lift = problem.lift(0, first.rows)
        return cls.onto(lift, first.rows, second.rows[:, : len(lift)])

    def draw(self, count: int, generator: Generator) -> Float[Tensor, "k r"]:
        """Normal c of any length."""
        return torch.randn(count, len(self.rows), generator=generator, dtype=torch.float64).to(self.lift)

    def starts(self, count: int, generator: Generator) -> Float[Tensor, "k r"]:
        """Random unit c."""
        return unit_rows(self.draw(count, generator))

    def place(self, inputs: Float[Tensor, "s n"]) -> Float[Tensor, "s r"]:
        """The unit c of inputs."""
        return unit_rows(torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1) @ self.rows.T @ self.triangle.T)

    def climb(self, c: Float[Tensor, "k r"], limits: Limits) -> Float[Tensor, "j r"]:
        """Where starts lead in single precision, each once, the best first."""
        end, sine = ascend(c.float(), self.lift.float(), self.span.float())
        keep = distinct(end, limits.alike, order=sine, signed=True)
        return end[keep[sine[keep] < limits.rough]].to(self.lift)

    def settle(self, c: Float[Tensor, "k r"], limits: Limits) -> tuple[Float[Tensor, "j r"], Float[Tensor, " j"]]:
        """The solutions near to c, whose masks are nearly right, each once, the best first; and their sines."""
        parts = [polish(part, self.lift, self.span, rounds=limits.rounds) for part in c.split(PART)]
        c, sine, further = (torch.cat(x) for x in zip(*parts, strict=True))
        good = (sine < limits.sine) & (further >= limits.gap * sine.clamp_min(limits.floor))
        c, sine = c[good], sine[good]
        keep = distinct(c, limits.same, order=sine, signed=True)
        return c[keep], sine[keep]

    def extended(self, c: Float[Tensor, "k r"]) -> Float[Tensor, "k n1"]:
        """The [x; 1] of c, up to a factor."""
        return torch.linalg.solve_triangular(self.triangle, c.T, upper=True).T @ self.rows

    def inputs(self, c: Float[Tensor, "k r"]) -> Float[Tensor, "j n"]:
        """The inputs of those c that have one: where the 1 of [x; 1] is lost in rounding there is none."""
        rows = self.extended(c)
        there = rows[:, -1].abs() > LOST * rows.norm(dim=1)
        return (rows / rows[:, -1:])[there][:, :-1]

    def samples(self, c: Float[Tensor, "k r"], limits: Limits) -> Float[Tensor, "j n"]:
        """The inputs that starts lead to."""
        return self.inputs(self.settle(self.climb(c, limits), limits)[0])

    def polished(self, inputs: Float[Tensor, "s n"], limits: Limits) -> Float[Tensor, "j n"]:
        """The inputs that solve this problem near to those given."""
        return self.inputs(self.settle(self.place(inputs), limits)[0])


def applicable(problem: NetworkView) -> bool:
    """Whether there are two gradients to project on, and a bias that fixes the scale of each input: `NEEDED`."""
    return problem.last > 0 and problem.biases[0] is not None


def class_sines(
    problem: NetworkView,
    inputs: Float[Tensor, "s n"],
    basis: Float[Tensor, "m b"],
    layer: int = 0,
    units: slice | Bool[Tensor, " _m"] = slice(None),
) -> Float[Tensor, "s classes"]:
    """Of each class's back-propagated vector at a layer to the span of its gradient, of these units."""
    vectors = (d[:, units] for d in each_class(problem, inputs, layer))
    return torch.stack([sine(d, d @ basis @ basis.T) for d in vectors], 1)


def each_class(problem: NetworkView, inputs: Float[Tensor, "s n"], layer: int = 0) -> Iterator[Float[Tensor, "s m"]]:
    """The samples' back-propagated vectors at a layer, class by class."""
    labels = F.one_hot(torch.arange(problem.classes, device=inputs.device)).to(inputs)
    each = (Targets(label.expand(len(inputs), -1), 1.0, 0.0) for label in labels)
    return (run.deltas[layer] for run in passes_of(problem, inputs, each))
