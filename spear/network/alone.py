"""Each solved sample alone, by the layer below: its activations y, from what u and the gradients there say of them.

Once u_i of the last hidden layer is known, so are the sign of its z_i in every unit and h'_i = Wᵀ u_i, primes for the
layer below; and its [z_i; y_i] lies in the span of what is free for all unsolved samples, and one vector of its own.
Three conditions then tell its mask D' there, at batch sizes far beyond those where u was found: z_i has those signs,
y_i is positive where D' is 1 and 0 elsewhere, and

    g_i = D' ∘ h'_i lies in span(U'), where the gradient below has the rank of the batch;
    y_i = ReLU(z'_i) with z'_i in the image of that gradient's rows, where it has less: fewer inputs than samples.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.directions import quick, unit_rows
from spear.network.spaces import Solved, Spaces, complement, dual, project

STEPS, STEPS_BY_INPUTS = 60, 200  # of relaxed reflections: by h' 20 are enough at half the width
RELAXATION = 0.7  # of a step


@dataclass(frozen=True)
class Alone:
    """Where [z; y] of each sample lies: in the span of `samples` and of its `own` vector, with z on these `sides`.

    `start` is the part of it that is known; a side is 0 where the mask at the last hidden layer tells none.
    """

    samples: Float[Tensor, "both r"]
    own: Float[Tensor, "k both"]
    start: Float[Tensor, "k both"]
    sides: Float[Tensor, "k m"]

    @classmethod
    def of(cls, spaces: Spaces, solved: Solved, index: Int[Tensor, " k"], units: int) -> "Alone":
        """Of the samples `index` of those `solved`, with so many units below."""
        y = spaces.rows[:, :units].T
        lift = torch.cat([spaces.lift, y * (spaces.lift.norm() / y.norm())])
        samples = torch.linalg.qr(lift @ complement(spaces, solved))[0]
        start = unit_rows(dual(spaces, solved)[index] @ lift.T)
        own = unit_rows(start - (start @ samples) @ samples.T)
        told = spaces.levels is None or spaces.levels.signed
        sides = torch.where(solved.mask[index], 1, -1) * told
        return cls(quick(samples.float()), own.float(), start.float(), sides.to(own.device, torch.float32))

    def near(self, x: Float[Tensor, "k both"]) -> Float[Tensor, "k both"]:
        """The projection of each sample on its space."""
        return project(x, self.samples) + (x * self.own).sum(1, keepdim=True) * self.own

    def parted(self, x: Float[Tensor, "k both"]) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k m1"]]:
        """z on its sides, and y."""
        z, y = x.tensor_split((self.sides.shape[1],), 1)
        return torch.where(z * self.sides < 0, 0.0, z), y

    def masks(self, h: Float[Tensor, "k m1"], basis: Float[Tensor, "m1 b1"]) -> Bool[Tensor, "k m1"]:
        """D' by h' and span(U')."""
        h, samples, span = unit_rows(h).float(), self.start, quick(basis.float())
        below, active = torch.zeros_like(h), torch.zeros_like(h)
        for _ in range(STEPS):
            near, near_below = self.near(samples), project(below, span)
            z, y = self.parted(torch.lerp(samples, near, 2.0))
            g = torch.lerp(below, near_below, 2.0)
            active = ((2 * g - h) * h).addcmul_(y, y.abs()).sign_().add_(1).div_(2)
            kept = torch.cat([z, y.clamp_min(0) * active], 1)
            samples = unit_rows(samples + RELAXATION * (kept - near))
            below = below + RELAXATION * (active * h - near_below)
        return active > 0

    def masks_by_inputs(self, image: Float[Tensor, "m1 r1"]) -> tuple[Bool[Tensor, "k m1"], Float[Tensor, "k m1"]]:
        """D' by the `image` of the rows of the gradient below, orthonormal; and the middle of y and z'."""
        samples, image = self.start, quick(image.float())
        below = middle = self.parted(samples)[1]
        active = torch.zeros_like(below)
        for _ in range(STEPS_BY_INPUTS):
            near, near_below = self.near(samples), project(below, image)
            z, y = self.parted(torch.lerp(samples, near, 2.0))
            z_below = torch.lerp(below, near_below, 2.0)
            middle = (y + z_below) / 2
            on = middle.clamp_min(0)
            costs = y * y + z_below.clamp_min(0).square() - (y - on).square() - (z_below - on).square()
            active = costs.sign().add_(1).div_(2)
            samples = samples + RELAXATION * (torch.cat([z, on * active], 1) - near)
            below = below + RELAXATION * (on * active + (1 - active) * z_below.clamp_max(0) - near_below)
            size = torch.linalg.vector_norm(samples, dim=1, keepdim=True)
            samples, below = samples / size, below / size
        return active > 0, middle
