"""What stands between two linear layers: an elementwise function phi, its slope phi', and where that breaks.

Nothing is asked of its name: a piece of a model is tried, and derived by autograd, as its client derives it. ReLU is
the one whose slope is the step function.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

REACH, POINTS = 32.0, 4097  # pre-activations at which breaks are looked for: up to this size, so many
FARTHEST, TABLE = 1e3, 513  # pre-activations among which an inverse is looked for, closer together near zero
ANOMALY, LEAST_BREAK = 4.0, 1e-6  # times its neighbours' change, and share of the largest: what is a break
HALVINGS = 50  # of a bracket: to rounding
ASIDE = 1e-12  # how far from a break a piece's own end is taken; the root of it in single precision
STEP = 1e-5  # of a central difference, where autograd has no second derivative
AT_ONCE = 2**24  # entries that are held at once


@dataclass(frozen=True, eq=False)
class Activation:
    """phi of m units, each by itself.

    `function` maps pre-activations (s, m) to activations, in double precision. `breaks` are the pre-activations, in
    increasing order, at which phi' or phi'' jumps. `levels` (breaks + 1, m or 1) are the slopes between them where phi
    is linear there, else `None`. `shared` says that all units have one phi; `units` is m.
    """

    function: nn.Module
    breaks: tuple[float, ...] = ()
    levels: Float[Tensor, "pieces _m"] | None = None
    shared: bool = True
    units: int = 1
    _moved: dict[tuple[torch.dtype, torch.device], nn.Module] = field(default_factory=dict, repr=False)

    @property
    def is_relu(self) -> bool:
        """Whether phi is max(z, 0)."""
        return isinstance(self.function, nn.ReLU)

    @property
    def is_flat(self) -> bool:
        """Whether phi is piecewise linear: its slope then tells the piece, and nothing more of z."""
        return self.levels is not None

    @property
    def degree(self) -> float | None:
        """The k of phi(c z) = c^k phi(z) for c > 0, if there is one: the length of z shows in that of phi(z) alone."""
        z = torch.logspace(-2, 2, 17, dtype=torch.float64)
        once, twice = (self.value(c * torch.cat([-z, z])[:, None].expand(-1, self.units).contiguous()) for c in (1, 2))
        ratio = float(twice.norm() / once.norm())
        return math.log2(ratio) if torch.allclose(twice, ratio * once, rtol=1e-9, atol=0) else None

    def value(self, z: Float[Tensor, "*s m"]) -> Float[Tensor, "*s m"]:
        """phi(z)."""
        with torch.no_grad():
            return self._for(z)(z)

    def slope(self, z: Float[Tensor, "*s m"]) -> Float[Tensor, "*s m"]:
        """phi'(z), by autograd unless phi is piecewise linear."""
        if self.is_relu:
            return (z > 0).to(z)
        return self._levels_at(z) if self.is_flat else self.at(z, bend=False)[1]

    def at(
        self, z: Float[Tensor, "*s m"], *, bend: bool = True
    ) -> tuple[Float[Tensor, "*s m"], Float[Tensor, "*s m"], Float[Tensor, "*s m"]]:
        """phi(z), phi'(z) and phi''(z), zero unless it is asked for."""
        if self.is_flat:
            return self.value(z), self.slope(z), torch.zeros_like(z)
        function = self._for(z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = function(z)
            (slope,) = torch.autograd.grad(y.sum(), z, create_graph=bend)
            second = _second(function, slope, z) if bend else torch.zeros_like(z)
        return y.detach(), slope.detach(), second

    @property
    def jumps(self) -> bool:
        """Whether phi' jumps anywhere."""
        if self.is_flat or not self.breaks:
            return self.is_flat
        edges = torch.tensor(self.breaks, dtype=torch.float64)
        sides = torch.stack([edges - ASIDE, edges + ASIDE]).reshape(-1, 1)
        below, above = self.slope(sides.expand(-1, self.units).contiguous()).unflatten(0, (2, -1))
        return bool(((above - below).abs() > LEAST_BREAK).any())

    def piece(self, z: Float[Tensor, "*s m"]) -> Tensor:
        """Which piece of phi each z is on: how many breaks are at or below it."""
        return torch.bucketize(z, torch.tensor(self.breaks, dtype=z.dtype, device=z.device), right=True)

    def within(self, z: Float[Tensor, "*s m"], piece: Int[Tensor, "*s m"]) -> Float[Tensor, "*s m"]:
        """z, or the nearest point inside the given piece."""
        inner = torch.tensor(self.breaks, dtype=z.dtype, device=z.device)
        aside = ASIDE if z.dtype == torch.float64 else ASIDE**0.5
        low, high = inner.new_full((1,), -torch.inf), inner.new_full((1,), torch.inf)
        return z.clamp(torch.cat([low, inner + aside])[piece], torch.cat([inner - aside, high])[piece])

    def at_piece(
        self, z: Float[Tensor, "*s m"], piece: Int[Tensor, "*s m"]
    ) -> tuple[Float[Tensor, "*s m"], Float[Tensor, "*s m"], Float[Tensor, "*s m"]]:
        """phi, phi' and phi'' of the given pieces, each continued beyond its ends by its derivatives there."""
        inside = self.within(z, piece)
        value, slope, bend = self.at(inside)
        beyond = z - inside
        return value + slope * beyond, slope + bend * beyond, bend

    def inverse(self, y: Float[Tensor, "s m"], margin: float) -> tuple[Float[Tensor, "s m"], Bool[Tensor, "s m"]]:
        """z with phi(z) = y, and where it is the only one for every value within `margin` of y."""
        ends = math.asinh(FARTHEST)
        g = torch.sinh(torch.linspace(-ends, ends, TABLE, dtype=y.dtype, device=y.device))
        table = self.value(g[:, None].expand(-1, y.shape[1]).contiguous())
        if self.shared:
            sure, index = (x.view_as(y) for x in _bracket(y.reshape(1, -1), margin, table[:, :1]))
        else:
            sure, index = _bracket(y.T.contiguous(), margin, table)
            sure, index = sure.T, index.T
        low, high = g[index], g[index + 1]
        rising = self.value(high) > self.value(low)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            right = (self.value(middle) < y) == rising
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        z = (low + high) / 2
        return z, sure & (self.slope(z) != 0)

    def to(self, device: torch.device) -> "Activation":
        """The same for tensors on another device."""
        levels = None if self.levels is None else self.levels.to(device)
        return replace(self, levels=levels)

    def _for(self, z: Tensor) -> nn.Module:
        """The function in the precision, and on the device, of z."""
        if z.dtype == torch.float64 and z.device.type == "cpu":
            return self.function
        key = z.dtype, z.device
        if key not in self._moved:
            self._moved[key] = copy.deepcopy(self.function).to(z.device, z.dtype)
        return self._moved[key]

    def _levels_at(self, z: Float[Tensor, "*s m"]) -> Float[Tensor, "*s m"]:
        levels = self.levels.to(z)
        slope = levels[0].expand_as(z)
        for k, edge in enumerate(self.breaks):
            slope = torch.where(z > edge, levels[k + 1], slope)
        return slope


def _bracket(y: Float[Tensor, "u s"], margin: float, table: Float[Tensor, "g u"]) -> tuple[Tensor, Tensor]:
    """Where a table passes every value near y once, and between which of its entries it passes y.

    The steps of the table that hold a value are those that begin at or under it, less those that end there.
    """
    steps = torch.stack([table[:-1].T, table[1:].T])
    low, first = steps.amin(0).sort(1)
    high, last = steps.amax(0).sort(1)
    summed = [torch.nn.functional.pad(order.cumsum(1), (1, 0)) for order in (first, last)]
    sure, places = torch.ones_like(y, dtype=torch.bool), []
    for off in (-margin, margin, 0.0):
        begun, ended = (torch.searchsorted(edge.contiguous(), y + off, right=True) for edge in (low, high))
        sure &= begun - ended == 1
        places.append(summed[0].gather(1, begun) - summed[1].gather(1, ended))
    return sure & ((places[0] - places[1]).abs() <= 1), places[2].clamp(0, len(table) - 2)


@dataclass(frozen=True, eq=False)
class Gated:
    """phi(z) ∘ z' of m units, as an `Activation` of [z, z'] together, 2m numbers: slopes are by each of these."""

    phi: Activation

    is_relu = False

    @property
    def degree(self) -> float | None:
        """The k of value(c [z, z']) = c^k value([z, z']) for c > 0, if there is one."""
        return None if self.phi.degree is None else self.phi.degree + 1

    def value(self, z: Float[Tensor, "*s m2"]) -> Float[Tensor, "*s m"]:
        """phi(z) ∘ z'."""
        z, other = z.chunk(2, -1)
        return self.phi.value(z) * other

    def slope(self, z: Float[Tensor, "*s m2"]) -> Float[Tensor, "*s m2"]:
        """Its derivatives by z, then those by z'."""
        return self.at(z, bend=False)[1]

    def at(
        self, z: Float[Tensor, "*s m2"], *, bend: bool
    ) -> tuple[Float[Tensor, "*s m"], Float[Tensor, "*s m2"], None]:
        """Both; `bend` must be off."""
        z, other = z.chunk(2, -1)
        value, slope, _ = self.phi.at(z, bend=bend)
        return value * other, torch.cat([slope * other, value], -1), None

    def to(self, device: torch.device) -> "Gated":
        """The same for tensors on another device."""
        return Gated(self.phi.to(device))


RELU = Activation(nn.ReLU(), (0.0,), torch.tensor([[0.0], [1.0]], dtype=torch.float64))


def recognise(function: nn.Module, units: int) -> Activation | None:
    """The activation that a function of `units` entries, in double precision, is; `None` where it is none.

    Each entry of what it gives must be a function of one entry alone, and differentiable by autograd.
    """
    function.requires_grad_(False)
    try:
        if not _is_elementwise(function, units):
            return None
        shared, points = _is_shared(function, units), torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
        probe = Activation(function, shared=shared, units=units)
        curve = lambda z: _on_curve(probe, z, units)  # noqa: E731
        points = points + REACH / POINTS / math.e  # no likely break among them
        slope, bend = curve(points)
    except Exception:  # another shape, or the model's own code: it may raise anything
        return None
    if not bool(slope.isfinite().all() and bend.isfinite().all() and slope.any()):
        return None
    found = [_breaks(points, x, lambda z, k=k: curve(z)[k]) for k, x in enumerate((slope, bend))]
    breaks = tuple(torch.cat(found).unique().tolist())
    return Activation(function, breaks, _levels(points, slope, breaks), shared, units)


def _second(function: Callable[[Tensor], Tensor], slope: Tensor, z: Tensor) -> Tensor:
    """phi'' by autograd, or else by a difference of slopes."""
    if not slope.requires_grad:
        return torch.zeros_like(z)
    try:
        (second,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
        return torch.zeros_like(z) if second is None else second
    except RuntimeError:  # an operation whose derivative has none
        step = STEP if z.dtype == torch.float64 else STEP**0.5
        ends = [(z.detach() + side * step).requires_grad_() for side in (1, -1)]
        right, left = (torch.autograd.grad(function(x).sum(), x)[0] for x in ends)
        return (right - left) / (2 * step)


def _is_elementwise(function: nn.Module, units: int) -> bool:
    """Whether changed entries change their own results only."""
    generator = Generator().manual_seed(0)
    x, other = torch.randn(2, 4, units, generator=generator, dtype=torch.float64) * torch.tensor([[0.3], [1], [3], [9]])
    kept = torch.rand(4, units, generator=generator) < 0.5
    with torch.no_grad():
        of = function.forward  # a call would print errors
        y, moved, alone = of(x), of(torch.where(kept, x, other)), of(x[-1:])
    if not isinstance(y, Tensor) or y.shape != x.shape or not bool(y.isfinite().all()):
        return False
    same = lambda a, b: torch.allclose(a, b, rtol=1e-12, atol=1e-14)  # noqa: E731
    return same(y[kept], moved[kept]) and same(y[-1:], alone)


def _is_shared(function: nn.Module, units: int) -> bool:
    row = torch.linspace(-REACH, REACH, 64, dtype=torch.float64)[:, None].expand(-1, units).contiguous()
    with torch.no_grad():
        y = function(row)
    return torch.allclose(y, y[:, :1].expand_as(y), rtol=1e-12, atol=1e-14)


def _on_curve(probe: Activation, z: Float[Tensor, " p"], units: int) -> tuple[Tensor, Tensor]:
    """Slopes and their derivatives (p, units or 1) at points."""
    if probe.shared:
        rows = torch.cat([z, z.new_zeros(-len(z) % units)]).reshape(-1, units)
        return tuple(x.flatten()[: len(z), None] for x in probe.at(rows)[1:])
    parts = [probe.at(part[:, None].repeat(1, units))[1:] for part in z.split(max(1, AT_ONCE // units))]
    slope, bend = (torch.cat(x) for x in zip(*parts, strict=True))
    return slope, bend


def _breaks(
    points: Float[Tensor, " p"], values: Float[Tensor, "p u"], curve: Callable[[Tensor], Tensor]
) -> Float[Tensor, " breaks"]:
    """Where values on a grid change far more than beside it, and still do once the place is bracketed to rounding."""
    least = LEAST_BREAK * float(values.abs().max())
    change = values.diff(dim=0).abs()
    beside = torch.zeros_like(change)
    beside[1:] = change[:-1]
    beside[:-1] = torch.maximum(beside[:-1], change[1:])
    place = (change > ANOMALY * beside + least).any(1).nonzero()[:, 0]
    low, high = points[place], points[place + 1]
    at_low, at_high = values[place], values[place + 1]
    for _ in range(HALVINGS if len(place) else 0):
        middle = (low + high) / 2
        at = curve(middle)
        left = (at - at_low).abs().amax(1) > (at_high - at).abs().amax(1)
        low, high = torch.where(left, low, middle), torch.where(left, middle, high)
        at_low, at_high = torch.where(left[:, None], at_low, at), torch.where(left[:, None], at, at_high)
    found = ((low + high) / 2)[(at_high - at_low).abs().amax(1) > least]
    whole = (found * 64).round() / 64
    return torch.where((found - whole).abs() < 1e-9, whole, found) + 0.0  # no -0


def _levels(
    points: Float[Tensor, " p"], slope: Float[Tensor, "p u"], breaks: tuple[float, ...]
) -> Float[Tensor, "pieces u"] | None:
    """The slopes between breaks where they are constant; `None` where they are not."""
    piece = torch.bucketize(points, torch.tensor(breaks, dtype=points.dtype), right=True)
    levels = []
    for k in range(len(breaks) + 1):
        own = slope[piece == k]
        if not len(own) or float((own - own[:1]).abs().max()) > 1e-12 * float(slope.abs().max()):
            return None
        levels.append(own[0])
    return torch.stack(levels) + 0.0
