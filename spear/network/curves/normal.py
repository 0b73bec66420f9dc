"""What a normalisation adds to a sample's curve: of the sample itself, or what the rest of its batch takes from it."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spear.network.side_by_side import SideBySide


@dataclass(frozen=True)
class Taken:
    """What normalisation over the batch takes from every sample's gradient, per sample in `NetworkView.unit`.

        delta = phi'(z) ∘ (h - behind_0 - behind_1 ∘ phi(z)) - before_0 - before_1 ∘ z

    The batch's mean gradient, and its mean along the normalised values, which z or phi(z) is up to a known map: both
    are in the update, as the gradients of the normalisation's shift and scale.
    """

    before: Float[Tensor, "2 m"]
    behind: Float[Tensor, "2 m"]

    def to(self, dtype: torch.dtype) -> "Taken":
        """The same in another precision."""
        return Taken(self.before.to(dtype), self.behind.to(dtype))


def respond(
    taken: Taken | None,
    h: Float[Tensor, "k m"],
    z: Float[Tensor, "k m"],
    phi: tuple[Float[Tensor, "k m"], Float[Tensor, "k m"], Float[Tensor, "k m"]],
) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k m"]]:
    """delta, and its derivative by z for a fixed h, from phi, phi' and phi'' at z."""
    value, slope, bend = phi
    if taken is None:
        return h * slope, h * bend
    h = h - taken.behind[0] - taken.behind[1] * value
    delta = h * slope - taken.before[0] - taken.before[1] * z
    return delta, h * bend - taken.behind[1] * slope * slope - taken.before[1]


@dataclass(frozen=True)
class Normal:
    """A normalisation of each sample between z and phi: y = scale ∘ x̂ + shift, x̂ = z, less its mean unless `kind` is
    rms, over its deviation. Vectors are rows, and sums over their entries."""

    kind: Literal["layer", "rms"]
    scale: Float[Tensor, " m"]
    shift: Float[Tensor, " m"]
    eps: float

    def to(self, dtype: torch.dtype) -> "Normal":
        """The same in another precision."""
        return Normal(self.kind, self.scale.to(dtype), self.shift.to(dtype), self.eps)

    def at(self, z: Float[Tensor, "k m"]) -> tuple[Float[Tensor, "k m"], "Normalised"]:
        """y, and what its derivatives need."""
        centred = self._centred(z)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        normal = centred / deviation
        return self.scale * normal + self.shift, Normalised(normal, deviation, torch.empty_like(normal))

    def forth(self, at: "Normalised", dz: Float[Tensor, "*k m"]) -> Float[Tensor, "*k m"]:
        """The change of y with z."""
        return self.scale * self._normal_along(at, dz)

    def back(self, at: "Normalised", dy: Float[Tensor, "*k m"]) -> Float[Tensor, "*k m"]:
        """Its transpose: the gradient by z from that by y."""
        return self._normal_along(at, self.scale * dy)

    def bent(self, at: "Normalised", dz: Float[Tensor, "*k m"]) -> Float[Tensor, "*k m"]:
        """The change of `back` of `at.above` with z."""
        u = self.scale * at.above
        along, normal = (at.normal * self._centred(dz)).mean(-1, keepdim=True), self._normal_along(at, dz)
        turned = normal * (at.normal * u).mean(-1, keepdim=True) + at.normal * (normal * u).mean(-1, keepdim=True)
        return -(along * self._normal_along(at, u) + turned) / at.deviation

    def _normal_along(self, at: "Normalised", dz: Float[Tensor, "*k m"]) -> Float[Tensor, "*k m"]:
        centred = self._centred(dz)
        return (centred - at.normal * (at.normal * centred).mean(-1, keepdim=True)) / at.deviation

    def _centred(self, z: Float[Tensor, "*k m"]) -> Float[Tensor, "*k m"]:
        return z if self.kind == "rms" else z - z.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Normalised(SideBySide):
    """Where a normalisation is: x̂, its `deviation`, and the gradient by y `above` it."""

    normal: Float[Tensor, "k m"]
    deviation: Float[Tensor, "k 1"]
    above: Float[Tensor, "k m"]
