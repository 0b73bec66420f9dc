"""The affine space of a sample's gradient and pre-activations behind BatchNorm.

With dY the gradient at BatchNorm's output, a = ∂L/∂η / b, c = ∂L/∂γ / b and ∂L/∂W = U S R of rank r = b - 1,

    g_i = dY_i = a + (σ/γ) ∘ U t_i + c ∘ x̂_i        y_i = η + γ ∘ x̂_i        x̂_i = P s_i,  P = diag(1/σ) W Rᵀ

are functions of (t_i, s_i), 2 (b - 1) numbers; x_i is the mean input plus Rᵀ s_i. The t and the s sum to zero, and
⟨s_k, S⁻¹ t_i⟩ = [k = i] - 1/b: every sample found confines the others. All gradients here are per sample, in units of
`NetworkView.unit`.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear import directions
from spear.network.problem import NetworkView
from spear.normalisation.problem import Norm
from spear.normalisation.statistics import Deviation
from spear.published.lowrank import LowRank

DEAD = 1e-9  # of the largest γ: units under it have no gradient


@dataclass(frozen=True)
class BatchSpaces:
    """What is known of a hidden layer behind BatchNorm: spans and means, rows of `live` units alone.

    `turned` (m, r) is (σ/γ) ∘ U, `place` (m, r) is P, `level` (m,) a and `slope` (m,) c. Where a is not told, they are
    `loose`: the t of samples found are known but for a shift common to all.
    """

    turned: Float[Tensor, "m r"]
    place: Float[Tensor, "m r"]
    singular: Float[Tensor, " r"]
    rows: Float[Tensor, "r n"]
    level: Float[Tensor, " m"]
    slope: Float[Tensor, " m"]
    scale: Float[Tensor, " m"]
    shift: Float[Tensor, " m"]
    live: Bool[Tensor, " units"]
    loose: bool = False

    @property
    def batch(self) -> int:
        """b: one more than the rank."""
        return len(self.singular) + 1

    def gradients(self, t: Float[Tensor, "k r"], s: Float[Tensor, "k r"]) -> Float[Tensor, "k m"]:
        """g of each sample."""
        return self.level + t @ self.turned.mT + self.slope * (s @ self.place.mT)

    def outputs(self, s: Float[Tensor, "k r"]) -> Float[Tensor, "k m"]:
        """y of each sample."""
        return self.shift + self.scale * (s @ self.place.mT)

    @property
    def as_told(self) -> "BatchSpaces":
        """The same, a shift common to the t neglected: for a search, not for a solution."""
        return replace(self, loose=False)

    def with_deviation(self, factor: Float[Tensor, " m"]) -> "BatchSpaces":
        """The same where σ is so many times as large."""
        return replace(self, turned=factor[:, None] * self.turned, place=self.place / factor[:, None])


def open_spaces(problem: NetworkView, norm: Norm, k: int, low: LowRank, deviation: Deviation) -> BatchSpaces:
    """The spaces of hidden layer k, from its factorised gradient."""
    unit, size = problem.unit(low.rank + 1), low.rank + 1
    live = (norm.scale.abs() > DEAD * norm.scale.abs().max()) & deviation.known
    singular = low.R.norm(dim=1)
    rows, scale, sigma = low.R / singular[:, None], norm.scale[live], deviation.sigma[live]
    return BatchSpaces(
        turned=(sigma / scale)[:, None] * low.L[live],
        place=(problem.weights[k][live] @ rows.mT) / sigma[:, None],
        singular=singular / abs(unit),
        rows=rows,
        level=torch.zeros_like(sigma) if norm.shift_gradient is None else norm.shift_gradient[live] / (unit * size),
        slope=norm.scale_gradient[live] / (unit * size),
        scale=scale,
        shift=norm.shift[live],
        live=live,
    )


@dataclass(frozen=True)
class Found:
    """Samples found: t and s (f, r), their d = contrasts · free (f, c) and masks (f, m) of the live units."""

    t: Float[Tensor, "f r"]
    s: Float[Tensor, "f r"]
    d: Float[Tensor, "f c"]
    mask: Bool[Tensor, "f m"]

    @classmethod
    def none(cls, spaces: BatchSpaces, free: int) -> "Found":
        m, r = spaces.turned.shape
        empty = spaces.turned.new_zeros
        return cls(empty(0, r), empty(0, r), empty(0, free), empty(0, m).bool())

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: Int[Tensor, " j"] | Bool[Tensor, " f"]) -> "Found":
        return Found(self.t[index], self.s[index], self.d[index], self.mask[index])

    def join(self, other: "Found", room: int, cosine: float) -> "Found":
        """With those of `other` that point elsewhere, as far as there is room."""
        unit = directions.unit_rows
        new = other[directions.distinct(unit(other.t), cosine, known=unit(self.t), signed=True)[:room]]
        parts = ((getattr(self, name), getattr(new, name)) for name in ("t", "s", "d", "mask"))
        return Found(*(torch.cat(pair) for pair in parts))


@dataclass(frozen=True)
class Plane:
    """Where (g, y) of a sample that is not found lies: g = `g0` + `g_basis` x, y = `y0` + `y_basis` x, x (k,).

    (t, s) = (`t0` + `t_basis` x_1, `s0` + `s_basis` x_2) with the parts of x. g is in units in which h is about 1.
    """

    g0: Float[Tensor, " m"]
    g_basis: Float[Tensor, "m k"]
    y0: Float[Tensor, " m"]
    y_basis: Float[Tensor, "m k"]
    t0: Float[Tensor, " r"]
    t_basis: Float[Tensor, "r kt"]
    s0: Float[Tensor, " r"]
    s_basis: Float[Tensor, "r ks"]

    def coordinates(self, x: Float[Tensor, "j k"]) -> tuple[Float[Tensor, "j r"], Float[Tensor, "j r"]]:
        """t and s of points of the plane."""
        first = self.t_basis.shape[1]
        return self.t0 + x[:, :first] @ self.t_basis.mT, self.s0 + x[:, first:] @ self.s_basis.mT


def plane(spaces: BatchSpaces, found: Found, size: float) -> Plane:
    """The plane of the samples that are left beside `found` ones; g is multiplied by `size`."""
    found = found[torch.arange(min(len(found), spaces.batch - 2))]
    left = spaces.batch - len(found)
    certain = found.t[1:] - found.t[:1] if spaces.loose else found.t
    t_basis, s_basis = (directions.complement(v / spaces.singular) for v in (found.s, certain))
    t0, s0 = -found.t.sum(0) / left, -found.s.sum(0) / left
    place = spaces.place @ s_basis
    turned = size * spaces.turned @ t_basis
    return Plane(
        g0=size * spaces.gradients(t0[None], s0[None])[0],
        g_basis=torch.cat([turned, size * spaces.slope[:, None] * place], 1),
        y0=spaces.outputs(s0[None])[0],
        y_basis=torch.cat([torch.zeros_like(turned), spaces.scale[:, None] * place], 1),
        t0=t0,
        t_basis=t_basis,
        s0=s0,
        s_basis=s_basis,
    )
