"""Between two BatchNorms: pre-activations from activations that are known less their mean, for any activation.

With y_i = η + γ P s_i in front of phi (`spaces`), and both what phi gives less its mean, v_i, and the gradient dA_i by
it known, each sample solves

    phi(y_i) - o = v_i        phi'(y_i) ∘ dA_i - a - c/γ ∘ (y_i - η) in span (σ/γ) U

2 m - b + 1 equations for b - 1 unknowns; the mean activation o, common to all, is renewed from the y. Gauss-Newton,
from the y that a linear phi would have; where phi' jumps, by the first equations alone before both.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import least_squares
from spear.models.activations import Activation
from spear.normalisation.spaces import BatchSpaces
from spear.reconstruction import Refusal

STEPS = 40  # of Gauss-Newton
SOLVED = 1e-6  # root mean square of v's residual, relative to v, under which its last steps have converged
ALONE = 25  # steps by the first equations, where phi' jumps


def pre_activations(
    activation: Activation, spaces: BatchSpaces, v: Float[Tensor, "b m"], behind: Float[Tensor, "b m"]
) -> Float[Tensor, "b m"]:
    """y of every sample, of the live units; `behind` is dA per sample in units of `NetworkView.unit`.

    Raises `Refusal` where the steps do not converge.
    """
    centred = v - v.mean(0)
    place = spaces.scale[:, None] * spaces.place
    span = torch.linalg.qr(spaces.turned)[0]
    along = spaces.slope / spaces.scale
    size = centred.square().mean(0).sqrt().clamp_min(1e-300)
    s = _project(place, spaces.scale.abs() * centred / size)
    even = float(size.square().mean().sqrt() / behind.square().mean().sqrt())
    best, least = s, torch.inf
    for step in range(STEPS):
        weight = 0.0 if activation.jumps and step < ALONE else even
        y = spaces.shift + s @ place.mT
        value, slope, bend = activation.at(y)
        off = centred - (value - value.mean(0))
        g = behind * slope - spaces.level - along * (y - spaces.shift)
        g = even * (g - (g @ span) @ span.mT)
        now = float(torch.hypot(off.norm(), g.norm()) / centred.norm())
        if least < SOLVED and now > least / 2:
            break
        best, least = (s, now) if now < least else (best, least)
        turned = weight * (behind * bend - along)
        parts = zip(slope, turned, off, g * bool(weight), strict=True)
        s = s + torch.stack([_step(place, span, one) for one in parts])
        s = s - s.mean(0)
    if not least < SOLVED:
        raise Refusal(f"pre-activations between two batch normalisations: Newton's steps end {least:.0e} off")
    return spaces.shift + best @ place.mT


def _project(place: Float[Tensor, "m r"], x: Float[Tensor, "b m"]) -> Float[Tensor, "b r"]:
    return least_squares(place, x.mT).mT


def _step(place: Float[Tensor, "m r"], span: Float[Tensor, "m r"], parts: tuple[Tensor, ...]) -> Float[Tensor, " r"]:
    """One step of one sample: the derivatives of both equations beside each other."""
    slope, turned, off, g = parts
    moved = turned[:, None] * place
    moved = moved - span @ (span.mT @ moved)
    both, wanted = torch.cat([slope[:, None] * place, moved]), torch.cat([off, -g])
    gram = both.mT @ both
    ridge = 1e-14 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve((both.mT @ wanted)[:, None], torch.linalg.cholesky_ex(gram + ridge)[0])[:, 0]
