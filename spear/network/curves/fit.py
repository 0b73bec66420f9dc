"""Levenberg-Marquardt on the sine between a vector of z and a space, all starts at once, by conjugate gradients.

No start has a matrix of its own: a step is some products of all starts with the same U and Q.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

DAMPED, LESS, MORE, MOST = 0.1, 0.2, 5.0, 1e4  # damping at first, after a success and a failure (times), given up past
EVERY, EARLIEST = 5, 9  # steps after which starts are looked at, and before which none is given up
STUCK, FAR = 0.9, 100.0  # share of the sine that `EVERY` steps must take away, unless it is under so many `arrived`
MOST_ENTRIES = 2**22  # of the matrices that are held at once
MATRICES, CHORDS = 10, 5  # of a start that is nearly right: at most, and for how many steps each serves
GAIN = 0.5  # share of the sine that a matrix must take away for there to be another
SLOPPY, SHARPEST = 0.1, 1e-6  # residual of a step's linear system, relative to its right side: at most, at least


@runtime_checkable
class Family(Protocol):
    """Vectors u(z), z = z_0 + Q w with Q the `frame`, held against a space, as `spear.network.curves.layer.Curves`.

    `at` says where starts are, as its `Points`: `unit` is u at length 1, `rest` its part off the space, `bend` the
    derivative of u by z, entry by entry. `forth`, `back` and `matrix` are the derivative of the rest by w.
    """

    frame: Tensor

    def at(self, w: Tensor, labels: Tensor, pieces: Tensor | None = None) -> Any: ...
    def forth(self, at: Any, v: Tensor) -> Tensor: ...
    def back(self, at: Any, u: Tensor) -> Tensor: ...
    def matrix(self, at: Any) -> Tensor: ...


@dataclass(frozen=True)
class Effort:
    """How far a fit goes: so many `steps` of `inner` products, until a sine is under `arrived` or the clock shows
    `until`."""

    steps: int
    inner: int
    arrived: float
    until: float = math.inf


def fit(
    curves: Family,
    w: Float[Tensor, "k q"],
    labels: Int[Tensor, " k"],
    effort: Effort,
    pieces: Int[Tensor, "k m"] | None = None,
) -> tuple[Float[Tensor, "k q"], Float[Tensor, " k"]]:
    """Where starts w lead, and their sines. Starts that arrived, or no longer gain, end.

    With `pieces`, each entry stays on its piece of phi.
    """
    at = curves.at(w, labels, pieces)
    sine = checked = at.sine
    ends, sines, number = w.clone(), sine.clone(), torch.arange(len(w), device=w.device)
    damping = torch.full_like(sine, DAMPED)
    for step in range(effort.steps if curves.frame.shape[1] else 0):
        if time.monotonic() > effort.until:
            break
        own = None if pieces is None else pieces[number]
        new = curves.at(at.w + solve(curves, at, damping, effort.inner), at.labels, own)
        reached = new.sine
        good = reached < sine
        at, sine = at.where(good, new), torch.where(good, reached, sine)
        damping = torch.where(good, LESS * damping, MORE * damping)
        over = (sine < effort.arrived) | (damping > MOST)
        if step % EVERY == EVERY - 1:
            over |= (sine > STUCK * checked) & (sine > FAR * effort.arrived) & (step >= EARLIEST)
            checked = sine
        ends[number], sines[number] = at.w, sine
        go = ~over
        if not go.any():
            break
        number, at, damping, sine, checked = number[go], at[go], damping[go], sine[go], checked[go]
    return ends, sines


def finish(
    curves: Family,
    w: Float[Tensor, "k q"],
    labels: Int[Tensor, " k"],
    *,
    arrived: float,
    pieces: Int[Tensor, "k m"] | None = None,
) -> tuple[Float[Tensor, "k q"], Float[Tensor, " k"]]:
    """Gauss-Newton from where starts are nearly right, as long as it gains. Each has its own matrix for some steps.

    With `pieces`, each entry stays on its piece of phi.
    """
    ends, sines = w.clone(), curves.at(w, labels, pieces).sine
    left = (sines > arrived).nonzero()[:, 0]
    for _ in range(MATRICES if curves.frame.shape[1] else 0):
        before = sines[left]
        for part in left.split(max(1, MOST_ENTRIES // curves.frame.numel())):
            own = None if pieces is None else pieces[part]
            at = curves.at(ends[part], labels[part], own)
            M = curves.matrix(at)
            factor = torch.linalg.cholesky_ex(M @ M.mT)[0]
            for _ in range(CHORDS):
                v = torch.cholesky_solve(-curves.back(at, at.rest)[:, :, None], factor)[:, :, 0]
                new = curves.at(at.w + v, at.labels, own)
                better = new.sine < at.sine
                at = at.where(better, new)
                if not bool((better & (at.sine > arrived)).any()):
                    break
            ends[part], sines[part] = at.w, at.sine
        left = left[(sines[left] > arrived) & (sines[left] < GAIN * before)]
    return ends, sines


def solve(curves: Family, at: Any, damping: Float[Tensor, " k"], most: int) -> Float[Tensor, "k q"]:
    """The step v of (MᵀM + damping · scale) v = -Mᵀ r, M the derivative of the residual r, as far as is worth it."""
    tiny = torch.finfo(at.w.dtype).tiny
    shift = (damping * (at.bend / at.size).pow(2).mean(1))[:, None]
    r = p = -curves.back(at, at.rest)
    v, size = torch.zeros_like(r), _dot(r, r)
    enough = at.sine[:, None].clamp(SHARPEST, SLOPPY) ** 2 * size
    for _ in range(most):
        forward = curves.back(at, curves.forth(at, p)) + shift * p
        length = size / _dot(p, forward).clamp_min(tiny)
        v, r = torch.addcmul(v, length, p), torch.addcmul(r, length, forward, value=-1)
        before, size = size, _dot(r, r)
        if bool((size < enough).all()):
            break
        p = torch.addcmul(r, size / before.clamp_min(tiny), p)
    return v


def _dot(x: Float[Tensor, "k q"], y: Float[Tensor, "k q"]) -> Float[Tensor, "k 1"]:
    return torch.linalg.vecdot(x, y)[:, None]
