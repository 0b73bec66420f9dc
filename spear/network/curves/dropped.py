"""Dropout behind an activation of any form: each unit is on the curve of phi over 1 - p, or it is gone.

What is gone is one more piece of the curve, on which phi, phi' and phi'' are zero whatever z is. All units gone would
fit any gradient: no more may be than chance takes.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.models.activations import Activation

SPARE = 4.0  # standard deviations of what dropout takes, by which a start may lose more units
MOST = 0.95  # share of its units that a start may lose in any case


@dataclass(frozen=True, eq=False)
class Dropping(Activation):
    """phi of an activation, and dropout of a `share` p of its units behind it; the last piece is that of those gone."""

    share: float = 0.0

    @classmethod
    def behind(cls, activation: Activation, share: float) -> "Dropping":
        """Dropout behind an activation."""
        return cls(**{f.name: getattr(activation, f.name) for f in fields(activation)}, share=share)

    @property
    def gone(self) -> int:
        """The piece of a dropped unit."""
        return len(self.breaks) + 1

    def at(
        self, z: Float[Tensor, "*s m"], *, bend: bool = True
    ) -> tuple[Float[Tensor, "*s m"], Float[Tensor, "*s m"], Float[Tensor, "*s m"]]:
        """phi, phi' and phi'' of units that were kept."""
        return tuple(x / (1 - self.share) for x in super().at(z, bend=bend))

    def within(self, z: Float[Tensor, "*s m"], piece: Int[Tensor, "*s m"]) -> Float[Tensor, "*s m"]:
        """z, or the nearest point inside the given piece; that of dropped units has no ends."""
        inside = super().within(z, piece.clamp_max(len(self.breaks)))
        return torch.where(piece == self.gone, z, inside)

    def at_piece(
        self, z: Float[Tensor, "*s m"], piece: Int[Tensor, "*s m"]
    ) -> tuple[Float[Tensor, "*s m"], Float[Tensor, "*s m"], Float[Tensor, "*s m"]]:
        """phi, phi' and phi'' of the given pieces."""
        there = super().at_piece(z, piece.clamp_max(len(self.breaks)))
        return tuple(torch.where(piece == self.gone, 0.0, x) for x in there)

    def drawn(self, z: Float[Tensor, "*s m"], generator: Generator) -> Int[Tensor, "*s m"]:
        """Pieces at random: some units gone, the others where z is."""
        taken = torch.rand(z.shape, generator=generator).to(z.device) < self.share
        return torch.where(taken, self.gone, self.piece(z))

    def settled(self, z: Float[Tensor, "k m"], pieces: Int[Tensor, "k m"]) -> Int[Tensor, "k m"]:
        """The pieces at the end: a unit that is on another than its z is gone, if anything."""
        return torch.where(pieces == self.piece(z), pieces, self.gone)

    def taken(self, gain: Float[Tensor, "k m"]) -> Bool[Tensor, "k m"]:
        """Which units are gone, from what each gains by that: those that gain most, and no more than chance takes."""
        m = gain.shape[1]
        share = min(MOST, self.share + SPARE * math.sqrt(self.share * (1 - self.share) / m))
        least = gain.kthvalue(max(1, m - int(share * m)), dim=1, keepdim=True).values.clamp_min(0)
        return gain > least
