"""Rounds of starts at a block: what they find is held against both whole gradients, and subtracted from them.

A token's own share of the gradients, g [x; 1]ᵀ and d [a; 1]ᵀ, follows from x: d lies in the column space of the second
gradient, g = phi'(z) ∘ W'ᵀ d in that of the first, linear in d. Its length is the weight at which each of the two
lowers its gradient's rank: the same in both, or the token is none.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from spear.blocks.curves import TokenCurves
from spear.blocks.view import BlockView
from spear.directions import TINY, apart, unit_rows
from spear.network.curves.fit import Effort, finish, fit
from spear.network.factors import Factors, wedderburn
from spear.network.layerwise import solve
from spear.network.projection import Limits, Projections
from spear.network.side_by_side import SideBySide
from spear.network.spaces import sine

FEWEST, MOST = 16, 256  # starts of a round
ROUGH = Effort(steps=40, inner=30, arrived=1e-4)  # of every start, in single precision
NEAR, LOOSER = 1e-2, 3  # sine under which a start in single precision has arrived; times that after an idle round
EXACT = 1e-13  # sine that needs no further step
SAME, ROUGHLY_SAME = 1e-4, 3e-3  # relative distances of two ends that are one, in double and single precision
ZEROS = Limits(rough=0.2, alike=0.9999, sine=1e-6, same=1 - 1e-6)  # of what ReLU's zeros lead to, in double precision
BLUR, MOST_BLURRED = 10.0, 0.01  # sine of a weak token: times the rounding over the last singular value; at most
INVERSIONS = 3  # steps of inverse iteration
PART = 2**23  # entries of matrices that are held at once


@dataclass(frozen=True)
class Tokens(SideBySide):
    """Tokens found: [x; 1], g, d and [a; 1] of each, so that the gradients are sums of g [x; 1]ᵀ and d [a; 1]ᵀ; the
    larger sine of g and [a; 1] to their spaces, and how far the two weights differ, relative to them."""

    extended: Float[Tensor, "f n1"]
    g: Float[Tensor, "f m"]
    d: Float[Tensor, "f outputs"]
    read: Float[Tensor, "f m1"]
    sine: Float[Tensor, " f"]
    apart: Float[Tensor, " f"]

    def __len__(self) -> int:
        return len(self.extended)


class TokenSearch:
    """A search in progress: `whole` are both gradients as received, `left` what remains of them, `known` was found."""

    until = math.inf

    def __init__(self, view: BlockView, generator: Generator) -> None:
        self.view, self.generator = view, generator
        self.whole = self.left = view.factors()
        self.curves = TokenCurves.of(view, *self.whole)
        self.known = witnessed(view, view.lift.new_zeros(0, view.lift.shape[1]))
        self.limits = replace(ZEROS, sine=max(ZEROS.sine, 30 * view.accuracy.certain))
        self.starts = self.rounds = self.idle = 0

    @property
    def missing(self) -> int:
        """How many tokens are still to be found."""
        return self.view.rank - len(self.known)

    def round(self) -> None:
        """One round of starts."""
        self.rounds += 1
        new = self._new(self._found())
        self.idle = 0 if len(new) else self.idle + 1
        if len(new):
            self.known = Tokens.joined([self.known, new])
            if self.missing:
                pairs = (self.known.g, self.known.extended), (self.known.d, self.known.read)
                self.left = tuple(f.without(*pair) for f, pair in zip(self.whole, pairs, strict=True))

    def strangers(self, known: Tokens) -> int:
        """How many tokens of one round, from the whole gradients, are none of the known ones; nor is -x, which fits as
        well behind an odd or even activation and no bias."""
        self.round()
        mirrored = known.extended[:0] if self.view.anchored[0] else self._fitting(-known.extended).extended
        both = self.view.tokens(torch.cat([known.extended, self.known.extended, mirrored]))
        both = both if self.view.is_scaled else unit_rows(both)
        return int(apart(both, both[:0], SAME).sum()) - len(known)

    def _found(self) -> Float[Tensor, "j n1"]:
        """The [x; 1] that starts lead to: by ReLU's zeros, else, and where these found nothing, by fits to curves."""
        count = min(MOST, max(FEWEST, self.missing))
        self.starts += count
        by_zeros = self.view.activation.is_relu and self.idle % 2 == 0
        found = self._by_zeros(count) if by_zeros else self._fitted(count)
        labels = torch.zeros(len(found), dtype=torch.long, device=found.device)
        w, _ = finish(self.curves, self.curves.coordinates(found), labels, arrived=EXACT)
        return self.curves.extended(w) if self.view.is_scaled else unit_rows(self.curves.extended(w))

    def _fitted(self, count: int) -> Float[Tensor, "j n1"]:
        curves = TokenCurves.of(self.view, *self.left)
        w = curves.coordinates(self._draw(count))
        labels = torch.zeros(count, dtype=torch.long, device=w.device)
        effort = Effort(ROUGH.steps, ROUGH.inner, ROUGH.arrived, self.until)
        w, rough = fit(curves.to(torch.float32), w.float(), labels, effort)
        arrived = (rough < NEAR * LOOSER**self.idle).nonzero()[:, 0]
        arrived = arrived[rough[arrived].argsort()]
        found = curves.extended(w[arrived].double())
        z = found @ self.view.lift.T
        return found[apart(z, z[:0], ROUGHLY_SAME)]

    def _by_zeros(self, count: int) -> Float[Tensor, "j n1"]:
        below, above = self.left
        problem = Projections.onto(self.view.lift @ below.rows.T, below.rows, above.rows[:, : len(self.view.lift)])
        c, _ = problem.settle(problem.climb(problem.starts(count, self.generator), self.limits), self.limits)
        found = problem.extended(c)
        if not self.view.anchored[0]:
            return self._scaled(unit_rows(found))
        found = found[found[:, -1] > 0]
        return found / found[:, -1:]

    def _scaled(self, found: Float[Tensor, "j n1"]) -> Float[Tensor, "j n1"]:
        """Tokens at the length at which [phi(z); 1] lies in its space; as they are where that has no 1."""
        if not self.view.anchored[1]:
            return found
        a, V = self.view.activation.value(found @ self.view.lift.T), self.whole[1].rows
        inside = (a @ V[:, :-1].T) @ V[:, -1]  # c [a; 0] + [0; 1] in span(V): the last entry of its projection is 1
        return found * ((1 - V[:, -1] @ V[:, -1]) / inside.where(inside.abs() > TINY, torch.inf))[:, None]

    def _draw(self, count: int) -> Float[Tensor, "k n1"]:
        """Starts as the gradient's singular values have its tokens."""
        below = self.left[0]
        s = torch.randn(count, len(below.rows), generator=self.generator, dtype=torch.float64).to(below.rows)
        s = s * below.singular
        if not self.view.anchored[0]:
            drawn = s @ below.rows
            return drawn / (drawn @ self.view.lift.T).std(1, keepdim=True).clamp_min(TINY)
        ones = below.rows[:, -1]
        s = s / (below.singular * ones).norm().clamp_min(TINY)
        return (s + (1 - s @ ones)[:, None] * ones / (ones @ ones).clamp_min(TINY)) @ below.rows

    def _new(self, extended: Float[Tensor, "j n1"]) -> Tokens:
        """The candidates that fit both whole gradients and are no known token, the best first."""
        found = self._fitting(extended)
        tokens, known = self.view.tokens(found.extended), self.view.tokens(self.known.extended)
        return found[apart(tokens, known, SAME).nonzero()[: self.missing, 0]]

    def _fitting(self, extended: Float[Tensor, "j n1"]) -> Tokens:
        """The candidates that fit both whole gradients, the best first."""
        found = witnessed(self.view, extended)
        low = min((low.smallest / low.largest for low in self.view.low), default=1.0)
        limit = max(self.view.accuracy.certain**0.75, min(BLUR * self.view.eps / max(low, TINY), MOST_BLURRED))
        found = found[(found.sine < limit) & (found.apart < limit**0.5)]
        return found[found.sine.argsort()]


def witnessed(view: BlockView, extended: Float[Tensor, "j n1"]) -> Tokens:
    """What both whole gradients say of tokens [x; 1], each by itself."""
    z = extended @ view.lift.T
    a, slope, _ = view.activation.at(z, bend=False)
    read, (below, above) = view.read(a), view.factors()
    parts = slope.split(max(1, PART // (view.lift.shape[0] * view.rank)))
    c = torch.cat([_directions(view, below, above, part) for part in parts])
    d = c @ above.basis.T
    g = slope * (d @ view.reader)
    t, s = below.place(g, extended)
    own, other = wedderburn(below.singular, t, s), wedderburn(above.singular, *above.place(d, read))
    off = torch.maximum(sine(g, t @ below.basis.T), sine(read, read @ above.rows.T @ above.rows))
    found = Tokens(extended, g * own[:, None], d * own[:, None], read, off, (own / other - 1).abs())
    return found[torch.isfinite(own) & torch.isfinite(off)]


def _directions(view: BlockView, below: Factors, above: Factors, slope: Float[Tensor, "k m"]) -> Float[Tensor, "k r"]:
    """The unit d, in coordinates of the second gradient's columns, whose phi'(z) ∘ W'ᵀ d is nearest to the first's."""
    lifted = slope[:, :, None] * (view.reader.T @ above.basis)
    rest = lifted - below.basis @ (below.basis.T @ lifted)
    R = torch.linalg.qr(rest, mode="r")[1]
    diagonal = R.diagonal(dim1=1, dim2=2)
    least = 1e-16 * diagonal.abs().amax(1, keepdim=True) + 1e-300
    diagonal.copy_(torch.where(diagonal.abs() < least, least, diagonal))
    c = torch.ones_like(R[:, :, :1])
    for _ in range(INVERSIONS):
        c = torch.linalg.solve_triangular(R.mT, c, upper=False)
        c = c / c.abs().amax(1, keepdim=True).clamp_min(TINY)
        c = torch.linalg.solve_triangular(R, c, upper=True)
        c = c / c.norm(dim=1, keepdim=True).clamp_min(TINY)
    return c[:, :, 0]


def together(view: BlockView, found: Tokens) -> tuple[Float[Tensor, "n outputs"], Float[Tensor, "n m"]]:
    """d and g of all tokens, from the second gradient: what is left of the first is then a check."""
    d = solve(found.read, view.above.T)
    return d, view.activation.slope(found.extended @ view.lift.T) * (d @ view.reader)
