"""The spaces of the last hidden layer, directions found in them, and projections onto a span for all starts at once.

Vectors are rows: u, h, v are (starts, m), t (samples, b), d (samples, outputs).
"""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear import directions
from spear.directions import TINY, distinct, times, unit_rows
from spear.models.activations import Activation
from spear.network.problem import NetworkView

VANISHED = 1e-3  # squared length of a target, of |h| = 1, that has no unit left to speak of
MOST_LEVERAGE = 0.95  # of an entry on its own projection: past it the other units know nothing of it
SAME = 1 - 1e-9  # cosine of two exact solutions that are one: each is off by the root of rounding
GONE, INACTIVE, ACTIVE = range(3)  # which slope a unit has, where dropout may have taken it

Mask = Bool[Tensor, "k m"] | Int[Tensor, "k m"]


def project(x: Float[Tensor, "k m"], basis: Float[Tensor, "m r"]) -> Float[Tensor, "k m"]:
    """The part of each x in the span of an orthonormal basis, computed in the basis' precision."""
    return times(times(x, basis), basis.T)


def leverages(basis: Float[Tensor, "m b"]) -> Float[Tensor, " m"]:
    """Of each entry on its own projection on the span of an orthonormal basis: b/m on average."""
    return basis.pow(2).sum(1).clamp_max(MOST_LEVERAGE)


def without_itself(
    u: Float[Tensor, "k m"], wanted: Float[Tensor, "k m"], leverage: Float[Tensor, " m"]
) -> Float[Tensor, "k m"]:
    """What the other entries say of each, u being the projection of `wanted`: in a crowded span it follows that."""
    return (u - leverage * wanted) / (1 - leverage)


def misfit(target: Float[Tensor, "k m"], basis: Float[Tensor, "m b"]) -> Float[Tensor, " k"]:
    """Squared sine between each target and span(U); 1 for a target that vanished."""
    energy = target.pow(2).sum(1)
    inside = times(target, basis)
    return torch.where(energy > VANISHED, 1 - inside.pow(2).sum(1) / energy.clamp_min(TINY), 1.0)


@dataclass(frozen=True)
class Levels:
    """The two slopes of a piecewise linear activation: each unit's when it is active, and when it is not.

    ReLU's are 1 and 0. A unit is active where z > 0 if `signed`; else the pre-activation's sign says nothing. Where
    units may be `dropped`, 0 is a third slope, and masks say which: `GONE`, `INACTIVE` or `ACTIVE`.
    """

    active: Float[Tensor, " m"]
    inactive: Float[Tensor, " m"]
    signed: bool
    dropped: bool = False

    @classmethod
    def of(cls, activation: Activation, units: int) -> "Levels | None":
        """Those of an activation; `None` for ReLU, and where there are not two slopes."""
        levels = activation.levels
        if activation.is_relu or levels is None:
            return None
        low, high = levels.amin(0), levels.amax(0)
        two = ((levels == low) | (levels == high)).all() and (low < high).any()
        signed = 0.0 in activation.breaks
        if signed:
            k = activation.breaks.index(0.0)
            low, high = levels[k], levels[k + 1]
        return cls(high.expand(units), low.expand(units), signed) if two else None

    def to(self, dtype: torch.dtype) -> "Levels":
        """The same in another precision."""
        return replace(self, active=self.active.to(dtype), inactive=self.inactive.to(dtype))

    def slopes(self, mask: Mask) -> Float[Tensor, "k m"]:
        """The slopes of these masks."""
        if not self.dropped:
            return torch.where(mask, self.active, self.inactive)
        return torch.where(mask == ACTIVE, self.active, (mask == INACTIVE) * self.inactive)

    def mask(self, u: Float[Tensor, "k m"], h: Float[Tensor, "k m"]) -> Mask:
        """At which slope h is nearest to u."""
        active = self.evidence(u, h) > 0
        if not self.dropped:
            return active
        nearer = torch.where(active, ACTIVE, INACTIVE)
        wanted = self.slopes(nearer) * h
        return torch.where((2 * u - wanted) * wanted > 0, nearer, GONE)

    def evidence(self, u: Float[Tensor, "k m"], h: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
        """How much nearer, squared, u is to h at the active slope than at the other."""
        both = self.active + self.inactive
        return (2 * u - both * h) * h * (self.active - self.inactive)


@dataclass(frozen=True)
class Spaces:
    """The known spaces of the last hidden layer: `basis` U, `singular` S, `rows` V, and the output weights `head`.

    `lift` is [W | beta] Vᵀ, so that z = lift s; `contrasts` spans the possible d. `levels` are the activation's two
    slopes, `None` those of ReLU.
    """

    basis: Float[Tensor, "m b"]
    singular: Float[Tensor, " b"]
    rows: Float[Tensor, "b n1"]
    lift: Float[Tensor, "m b"]
    head: Float[Tensor, "outputs m"]
    contrasts: Float[Tensor, "outputs free"]
    levels: Levels | None = None

    @property
    def rank(self) -> int:
        """How many samples are in the problem."""
        return len(self.singular)

    def to(self, dtype: torch.dtype) -> "Spaces":
        """The same in another precision."""
        parts = (getattr(self, f.name) for f in fields(self))
        return Spaces(*(None if part is None else part.to(dtype) for part in parts))

    def scaled(self, mask: Mask, h: Float[Tensor, "*k m"]) -> Float[Tensor, "k m"]:
        """D ∘ h: each h at the slopes of a mask."""
        return mask * h if self.levels is None else self.levels.slopes(mask) * h

    def evidence(self, u: Float[Tensor, "k m"], h: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
        """How much nearer, squared, u is to h at the active slope than at the other."""
        return (2 * u - h) * h if self.levels is None else self.levels.evidence(u, h)

    def active(self, u: Float[Tensor, "k m"], h: Float[Tensor, "k m"]) -> Mask:
        """The mask that u implies."""
        return self.evidence(u, h) > 0 if self.levels is None else self.levels.mask(u, h)

    def without_itself(self, u: Float[Tensor, "k m"], wanted: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
        """What the other units say of each entry, u being the projection of `wanted` on span(U)."""
        return without_itself(u, wanted, leverages(self.basis))

    @property
    def head_space(self) -> Float[Tensor, "m free"]:
        """Columns span every possible h: W_outᵀ times a basis of the possible d."""
        return self.head.T @ self.contrasts


def contrasts(outputs: int, loss: str, like: Tensor) -> Float[Tensor, "outputs free"]:
    """Orthonormal basis of the possible d: under cross-entropy p - e_c sums to zero, else every vector is one."""
    eye = torch.eye(outputs, dtype=like.dtype, device=like.device)
    return torch.linalg.qr(eye - 1 / outputs)[0][:, : outputs - 1] if loss == "cross_entropy" else eye


def possible_errors(problem: NetworkView, rank: int) -> Float[Tensor, "outputs free"]:
    """Orthonormal basis of the possible d: of the samples' own where the output layer's gradient has their rank."""
    every = contrasts(problem.outputs, problem.loss, problem.weights[-1])
    if every.shape[1] <= rank:
        return every
    own = problem.factors(problem.last + 1)
    return own.L if own.rank == rank else every


@dataclass(frozen=True)
class Solved:
    """Gradient directions found so far, one row each: unit t, d to the same scale, mask D of the active units."""

    t: Float[Tensor, "f b"]
    d: Float[Tensor, "f outputs"]
    mask: Mask

    @classmethod
    def none(cls, spaces: Spaces) -> "Solved":
        """Before any direction was found."""
        m, b = spaces.basis.shape
        empty = spaces.basis.new_zeros
        return cls(empty(0, b), empty(0, len(spaces.head)), spaces.active(empty(0, m), empty(0, m)))

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: Int[Tensor, " j"] | Bool[Tensor, " f"]) -> "Solved":
        return Solved(self.t[index], self.d[index], self.mask[index])

    @property
    def labels(self) -> Int[Tensor, " f"]:
        """The class whose entry of d is negative."""
        return self.d.argmin(1)

    def join(self, other: "Solved", room: int, cosine: float = SAME) -> "Solved":
        """Add the directions of `other` that are new up to sign, as far as there is room."""
        new = other[distinct(other.t, cosine, known=self.t)[:room]]
        return Solved(torch.cat([self.t, new.t]), torch.cat([self.d, new.d]), torch.cat([self.mask, new.mask]))


def complement(spaces: Spaces, solved: Solved) -> Float[Tensor, "b r"]:
    """Orthonormal basis N of {s : ⟨s, t_i / S⟩ = 0 for every solved i}: where the other samples' s lie."""
    return directions.complement(solved.t / spaces.singular)


def dual(spaces: Spaces, solved: Solved) -> Float[Tensor, "f b"]:
    """Of each solved sample the shortest s with ⟨s, t_k / S⟩ = [k = i] for every solved k: it lacks what is free."""
    return torch.linalg.pinv(solved.t / spaces.singular).T


@dataclass(frozen=True)
class Foretold:
    """The unsolved samples as the gradient foretells them: s = `coordinates` w, w normal but for its part along `mean`.

    Their s are taken for normal with the covariance S² that the gradient shows, within the span of `free`, given that
    the last entry of [y; 1] = Vᵀ s is 1 where layers have biases: that entry is `mean` w, up to a factor.
    """

    coordinates: Float[Tensor, "b r"]
    mean: Float[Tensor, " r"]

    @classmethod
    def of(cls, spaces: Spaces, free: Float[Tensor, "b r"], *, biased: bool) -> "Foretold":
        """Of the samples whose s lie in the span of `free`."""
        triangle = torch.linalg.qr(free / spaces.singular[:, None])[1]
        coordinates = torch.linalg.solve_triangular(triangle, free, upper=True, left=False)
        ones = spaces.rows[:, -1] @ coordinates
        return cls(coordinates, unit_rows(ones[None])[0] if biased else torch.zeros_like(ones))

    def draw(self, count: int, generator: Generator) -> Float[Tensor, "k b"]:
        """The s of samples such as these, up to one factor."""
        w = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64).to(self.mean)
        return (w + (1 - w @ self.mean)[:, None] * self.mean) @ self.coordinates.T


def sine(x: Float[Tensor, "s n"], projected: Float[Tensor, "s n"]) -> Float[Tensor, " s"]:
    """Of each x to a span, given its projection there."""
    return (x - projected).norm(dim=1) / x.norm(dim=1)
