"""The equations of one token: its pre-activations lie in a known affine space, what they become in a known linear one.

    z = z_0 + Q w        u(z) = [phi(z); 1] in span(V)

V is an orthonormal basis of the second gradient's rows. The least sine of u to it is sought by the fits of
`spear.network.curves.fit`, which know nothing of what u is. Vectors are rows: z is (starts, m), u (starts, m + 1).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from spear.blocks.view import BlockView
from spear.directions import TINY
from spear.network.factors import Factors
from spear.network.side_by_side import SideBySide
from spear.network.spaces import project


@dataclass(frozen=True)
class TokenPoints(SideBySide):
    """Starts w with what they imply: `bend` is the derivative of u by z, entry by entry, `size` |u|, `unit` u at length
    1, `rest` its part off span(V)."""

    w: Float[Tensor, "k q"]
    labels: Int[Tensor, " k"]
    z: Float[Tensor, "k m"]
    bend: Float[Tensor, "k m"]
    size: Float[Tensor, "k 1"]
    unit: Float[Tensor, "k m1"]
    rest: Float[Tensor, "k m1"]

    @property
    def sine(self) -> Float[Tensor, " k"]:
        """Of u to span(V)."""
        return self.rest.norm(dim=1)


@dataclass(frozen=True)
class TokenCurves:
    """All that is needed to hold starts against a block, in one precision: z = `base` + `frame` w.

    The [x; 1] of w is `origin` + `place` w, in coordinates of `rows`. Without a bias in the first layer both origins
    are 0.
    """

    view: BlockView
    span: Float[Tensor, "m1 r"]
    base: Float[Tensor, " m"]
    frame: Float[Tensor, "m q"]
    origin: Float[Tensor, " r"]
    place: Float[Tensor, "r q"]
    rows: Float[Tensor, "r n1"]

    @classmethod
    def of(cls, view: BlockView, below: Factors, above: Factors) -> "TokenCurves":
        """Of both gradients, or of what is left of them."""
        lift, span = view.lift @ below.rows.T, torch.linalg.qr(above.rows.T)[0]
        origin, tangent = lift.new_zeros(len(below.rows)), torch.eye(len(below.rows)).to(lift)
        if view.anchored[0]:
            ones = below.rows[:, -1]
            origin = ones / (ones @ ones).clamp_min(TINY)
            tangent = torch.linalg.qr(ones[:, None], mode="complete")[0][:, 1:]
        frame, triangle = torch.linalg.qr(lift @ tangent)
        place = torch.linalg.solve_triangular(triangle, tangent, upper=True, left=False)
        along = frame.T @ (lift @ origin)
        return cls(view, span, lift @ origin - frame @ along, frame, origin - place @ along, place, below.rows)

    @property
    def units(self) -> int:
        """How many activations the second layer reads."""
        return len(self.span) - self.view.anchored[1]

    def to(self, dtype: torch.dtype) -> "TokenCurves":
        """The same in another precision."""
        names = ("span", "base", "frame", "origin", "place", "rows")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def extended(self, w: Float[Tensor, "k q"]) -> Float[Tensor, "k n1"]:
        """The [x; 1] of w."""
        return (self.origin + w @ self.place.T) @ self.rows

    def coordinates(self, extended: Float[Tensor, "k n1"]) -> Float[Tensor, "k q"]:
        """The w of tokens, or of the nearest that there are."""
        return (extended @ self.view.lift.to(self.base).T - self.base) @ self.frame

    def at(
        self, w: Float[Tensor, "k q"], labels: Int[Tensor, " k"], pieces: Int[Tensor, "k m"] | None = None
    ) -> TokenPoints:
        """Where starts are; with `pieces`, each entry on the given piece of phi, continued. Labels are kept."""
        z, activation = self.base + w @ self.frame.T, self.view.activation
        a, slope, _ = activation.at(z, bend=False) if pieces is None else activation.at_piece(z, pieces)
        u = self.view.read(a)
        size = u.norm(dim=1, keepdim=True).clamp_min(TINY)
        unit = u / size
        return TokenPoints(w, labels, z, slope, size, unit, unit - project(unit, self.span))

    def forth(self, at: TokenPoints, v: Float[Tensor, "k q"]) -> Float[Tensor, "k m1"]:
        """The derivative of the residual along v."""
        moved = self._moved(at, v @ self.frame.T)
        return moved - project(moved, self.span)

    def back(self, at: TokenPoints, u: Float[Tensor, "k m1"]) -> Float[Tensor, "k q"]:
        """Its transpose, of u that are orthogonal to span(V)."""
        u = u - torch.linalg.vecdot(at.unit, u)[:, None] * at.unit
        u = u[:, : self.units].repeat(1, len(self.base) // self.units)
        return (at.bend * u / at.size) @ self.frame

    def matrix(self, at: TokenPoints) -> Float[Tensor, "k q m1"]:
        """The derivative of the residual along every direction, one row each; where the length of z is open, that of
        its logarithm along the unit, so that the rows are independent."""
        moved = self._read(at.bend[:, None] * self.frame.T / at.size[:, None])
        moved = torch.baddbmm(moved, moved @ at.unit[:, :, None], at.unit[:, None], alpha=-1)
        moved = moved - (moved @ self.span) @ self.span.T
        if self.view.is_scaled:
            return moved
        return moved + (at.w / at.w.square().sum(1, keepdim=True))[:, :, None] * at.unit[:, None]

    def _moved(self, at: TokenPoints, dz: Float[Tensor, "k m"]) -> Float[Tensor, "k m1"]:
        """The change of u at length 1 with z."""
        moved = self._read(at.bend * dz / at.size)
        return moved - torch.linalg.vecdot(at.unit, moved)[:, None] * at.unit

    def _read(self, moved: Float[Tensor, "*k m"]) -> Float[Tensor, "*k m1"]:
        """The change of u by those that each z makes: of a gated block two for each unit."""
        moved = moved if moved.shape[-1] == self.units else sum(moved.chunk(2, -1))
        return F.pad(moved, (0, 1)) if self.view.anchored[1] else moved
