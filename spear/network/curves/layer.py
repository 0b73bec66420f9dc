"""The last hidden layer as curves: everything about a sample is a function of its pre-activations alone.

    delta = W_outᵀ(a - e_c) ∘ phi'(z)      a = softmax(W_out phi(z) + beta_out)      z = z_0 + Q w      delta in span(U)

The samples' s have their last entry fixed, [y; 1] = Vᵀ s, so that z = [W | beta] Vᵀ s lies in an affine space of b - 1
dimensions, with Q orthonormal; m - b equations for b - 1 unknowns. Vectors are rows: z, delta are (starts, m).

A normalisation leaves that so (`normal`): of the sample, z is normalised before phi; of the batch, known vectors are
taken from delta.
"""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.directions import TINY, unit_rows
from spear.federated.losses import activate_along
from spear.network.curves.normal import Normal, Normalised, Taken, respond
from spear.network.factors import subtract, wedderburn
from spear.network.problem import NetworkView
from spear.network.side_by_side import SideBySide
from spear.network.spaces import project
from spear.published.lowrank import LowRank

MARGIN = 8  # equations beyond the unknowns of a sample: those that a wrong answer fails


@dataclass(frozen=True)
class Known(SideBySide):
    """Samples found: their s and t, in coordinates of V and U, and their labels; behind dropout, the pieces of phi on
    which their units are."""

    s: Float[Tensor, "f b"]
    t: Float[Tensor, "f b"]
    labels: Int[Tensor, " f"]
    pieces: Int[Tensor, "f m"] | None = None

    def join(self, other: "Known") -> "Known":
        """These, then the others."""
        return Known.joined([self, other])

    def __len__(self) -> int:
        return len(self.s)


@dataclass(frozen=True)
class Layer:
    """What is left of the last hidden layer's gradient U diag(S) V once the samples found are subtracted.

    `lift` is [W | beta] Vᵀ, `ones` V's last column; `left` and `right` lead from its coordinates to those of the whole.
    Where directions alone are known, s is confined (r is less than U's columns) and nothing is subtracted. z is `shift`
    + lift s; `taken` and `normal` are what a normalisation of the batch or of each sample does. `means` are the s of
    each class, and `reach` is how far z scatter over the units, where the gradient does not tell them (`search`).
    """

    basis: Float[Tensor, "m _columns"]
    singular: Float[Tensor, " r"]
    lift: Float[Tensor, "m r"]
    ones: Float[Tensor, " r"]
    left: Float[Tensor, "b r"]
    right: Float[Tensor, "r b"]
    shift: Float[Tensor, " m"] | float = 0.0
    taken: Taken | None = None
    normal: Normal | None = None
    means: Float[Tensor, "_classes r"] | None = None
    reach: float | None = None

    @classmethod
    def of(
        cls, problem: NetworkView, low: LowRank, taken: Taken | None = None, normal: Normal | None = None
    ) -> "Layer":
        """The whole gradient's."""
        singular = low.R.norm(dim=1)
        rows = low.R / singular[:, None]
        eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        lift = problem.affine(problem.last) @ rows.T
        return cls(low.L, singular, lift, rows[:, -1], eye, eye, taken=taken, normal=normal)

    @property
    def samples(self) -> int:
        """How many samples are in it."""
        return len(self.singular)

    @property
    def tangent(self) -> Float[Tensor, "r q"]:
        """The directions in which a sample's s is free."""
        return torch.linalg.qr(self.ones[:, None], mode="complete")[0][:, 1:]

    @property
    def crowded(self) -> bool:
        """Whether the equations of a sample alone, `MARGIN` to spare, are fewer than its unknowns."""
        return self.coupled > 0

    @property
    def coupled(self) -> int:
        """How many samples together have equations enough: k (m - r) + k² for k (r - 1) unknowns, and to spare."""
        return 2 * len(self.singular) - 1 + MARGIN - len(self.basis)

    @property
    def origin(self) -> Float[Tensor, " r"]:
        """The shortest s whose last entry of [y; 1] is 1."""
        return self.ones / (self.ones @ self.ones).clamp_min(TINY)

    def pre_activations(self, s: Float[Tensor, "*k r"]) -> Float[Tensor, "*k m"]:
        """z of samples' s."""
        return self.shift + s @ self.lift.T

    def in_whole(self, s: Float[Tensor, "k r"]) -> Float[Tensor, "k b"]:
        """The same s in the coordinates of the whole."""
        return s @ self.right

    def directions(self, delta: Float[Tensor, "k m"]) -> Float[Tensor, "k _columns"]:
        """t of samples' delta, each at length 1."""
        return unit_rows(delta) @ self.basis

    def without(self, known: Known) -> "Layer":
        """The rest once samples, in its coordinates, are subtracted, each with the weight that lowers the rank."""
        weight = wedderburn(self.singular, known.t, known.s)
        left, singular, right = subtract(self.singular, known.t * weight[:, None], known.s)
        return replace(
            self,
            basis=self.basis @ left,
            singular=singular,
            lift=self.lift @ right.T,
            ones=right @ self.ones,
            left=self.left @ left,
            right=right @ self.right,
            means=None if self.means is None else self.means @ right.T,
        )

    def weight(self, known: Known) -> Float[Tensor, " f"]:
        """Each sample's weight in units of its t."""
        return wedderburn(self.singular, known.t, known.s)


@dataclass(frozen=True)
class Curves:
    """All that is needed to hold starts against a layer, in one precision: z = `base` + `frame` w.

    The s of w is `origin` + `place` w. The head's `bias` is 0 where it has none.
    """

    problem: NetworkView
    basis: Float[Tensor, "m _columns"]
    base: Float[Tensor, " m"]
    frame: Float[Tensor, "m q"]
    head: Float[Tensor, "outputs m"]
    bias: Float[Tensor, " outputs"]
    origin: Float[Tensor, " r"]
    place: Float[Tensor, "r q"]
    taken: Taken | None
    normal: Normal | None

    @classmethod
    def of(cls, problem: NetworkView, layer: Layer) -> "Curves":
        """Of what is left."""
        tangent = layer.tangent
        frame, triangle = torch.linalg.qr(layer.lift @ tangent)
        place = torch.linalg.solve_triangular(triangle, tangent, upper=True, left=False)
        base, head, bias = layer.pre_activations(layer.origin), problem.weights[-1], problem.biases[-1]
        along = frame.T @ base
        bias = head.new_zeros(len(head)) if bias is None else bias
        origin = layer.origin - place @ along
        base, taken, normal = base - frame @ along, layer.taken, layer.normal
        return cls(problem, layer.basis, base, frame, head, bias, origin, place, taken, normal)

    def to(self, dtype: torch.dtype) -> "Curves":
        """The same in another precision."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: part.to(dtype) for name, part in parts.items() if hasattr(part, "to")})

    def coordinates_of(self, z: Float[Tensor, "k m"]) -> Float[Tensor, "k q"]:
        """The w of pre-activations, or of the nearest that samples can have."""
        return (z - self.base) @ self.frame

    def samples(self, w: Float[Tensor, "k q"]) -> Float[Tensor, "k r"]:
        """The s of w."""
        return self.origin + w @ self.place.T

    def at(
        self, w: Float[Tensor, "k q"], labels: Int[Tensor, " k"], pieces: Int[Tensor, "k m"] | None = None
    ) -> "Points":
        """Where starts are; with `pieces`, each entry on the given piece of phi, continued."""
        z = self.base + w @ self.frame.T
        activation = self.problem.activations[self.problem.last]
        entered, place = (z, None) if self.normal is None else self.normal.at(z)
        phi = activation.at(entered) if pieces is None else activation.at_piece(entered, pieces)
        logits = phi[0] @ self.head.T + self.bias
        h = (self.problem.activate(logits) - self.problem.one_hot(labels).to(z)) @ self.head
        delta, bend = respond(self.taken, h, entered, phi)
        if place is not None:
            place = replace(place, above=delta)
            delta = self.normal.back(place, delta)
        size = delta.norm(dim=1, keepdim=True).clamp_min(TINY)
        unit = delta / size
        return Points(w, labels, z, logits, h, phi[1], bend, size, unit, unit - project(unit, self.basis), place)

    def turn(self, at: "Points", dz: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
        """The change of delta / |delta|'s length with z, a symmetric map: the loss' second derivative."""
        dy = dz if at.place is None else self.normal.forth(at.place, dz)
        along = activate_along(self.problem.loss, at.logits, (at.slope * dy) @ self.head.T)
        turned = at.bend * dy + at.slope * (along @ self.head)
        if at.place is not None:
            turned = self.normal.back(at.place, turned) + self.normal.bent(at.place, dz)
        return turned / at.size

    def forth(self, at: "Points", v: Float[Tensor, "k q"]) -> Float[Tensor, "k m"]:
        """The derivative of the residual along v."""
        moved = self.turn(at, v @ self.frame.T)
        moved = torch.addcmul(moved, _along(at, moved), at.unit, value=-1)
        return torch.addmm(moved, moved @ self.basis, self.basis.T, alpha=-1)

    def matrix(self, at: "Points") -> Float[Tensor, "k q m"]:
        """The derivative of the residual along every direction, one row each."""
        if at.place is not None:
            return torch.stack([self.forth(at, row.expand_as(at.w)) for row in torch.eye(at.w.shape[1]).to(at.w)], 1)
        dz = self.frame.T
        along = (at.slope[:, None] * dz) @ self.head.T
        logits = at.logits[:, None].expand_as(along).flatten(0, 1)
        along = activate_along(self.problem.loss, logits, along.flatten(0, 1)).view_as(along)
        moved = (along @ self.head).mul_(at.slope[:, None]).addcmul_(at.bend[:, None], dz).div_(at.size[:, None])
        moved = torch.baddbmm(moved, moved @ at.unit[:, :, None], at.unit[:, None], alpha=-1)
        return moved - (moved @ self.basis) @ self.basis.T

    def back(self, at: "Points", u: Float[Tensor, "k m"]) -> Float[Tensor, "k q"]:
        """Its transpose, of u that are orthogonal to span(U)."""
        return self.turn(at, torch.addcmul(u, _along(at, u), at.unit, value=-1)) @ self.frame


def _along(at: "Points", x: Float[Tensor, "k m"]) -> Float[Tensor, "k 1"]:
    """Of each x the part along delta."""
    return torch.linalg.vecdot(at.unit, x)[:, None]


@dataclass(frozen=True)
class Points(SideBySide):
    """Starts w with what they imply: `bend` is the derivative of delta by z for this h, h ∘ phi''(z), `unit` delta at
    length 1, `rest` its part off span(U), `place` where a normalisation of the sample is."""

    w: Float[Tensor, "k q"]
    labels: Int[Tensor, " k"]
    z: Float[Tensor, "k m"]
    logits: Float[Tensor, "k outputs"]
    h: Float[Tensor, "k m"]
    slope: Float[Tensor, "k m"]
    bend: Float[Tensor, "k m"]
    size: Float[Tensor, "k 1"]
    unit: Float[Tensor, "k m"]
    rest: Float[Tensor, "k m"]
    place: Normalised | None

    @property
    def sine(self) -> Float[Tensor, " k"]:
        """Of delta to span(U)."""
        return self.rest.norm(dim=1)
