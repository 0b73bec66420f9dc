"""Conjugate gradients on many problems side by side."""

import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

CONVERGED = 1e-6  # squared relative residual in single precision
FINE = 1e-24  # the same in double
LOOKS = 10  # steps between looks at the residual: each waits for the device


def dot_each(a: Tensor, b: Tensor) -> Float[Tensor, " k"]:
    """The inner products row by row."""
    return (a * b).flatten(1).sum(1)


def conjugate_gradients(
    A: Callable[[Tensor], Tensor],
    b: Tensor,
    steps: int,
    *,
    dot: Callable[[Tensor, Tensor], Tensor] = dot_each,
    until: float = math.inf,
    enough: float | None = None,
) -> tuple[Tensor, Float[Tensor, " _n"]]:
    """A⁻¹ b for a positive A, by at most so many steps, and the squared residual relative to b."""
    wide = lambda s: s.reshape(-1, *[1] * (b.ndim - 1))  # noqa: E731
    enough = enough or (CONVERGED if b.dtype == torch.float32 else FINE)
    tiny = torch.finfo(b.dtype).tiny
    x, r, p = torch.zeros_like(b), b, b
    first = size = dot(r, r).clamp_min(tiny)
    for step in range(steps):
        late = until < math.inf and time.monotonic() >= until
        if late or (step % LOOKS == 0 and bool((size <= enough * first).all())):
            break
        Ap = A(p)
        along = size / dot(p, Ap).clamp_min(tiny)
        x, r = x + wide(along) * p, r - wide(along) * Ap
        new = dot(r, r).clamp_min(tiny)
        p, size = r + wide(new / size) * p, new
    return x, size / first
