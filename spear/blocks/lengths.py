"""How long the tokens of a block are where its own gradients leave that open: by the normalisation before it.

Where phi(c z) = c^k phi(z) for c > 0 and no layer has a bias, the tokens c_t x_t give the same gradients. But of
x = gain ∘ n + shift, n = h / r of RMSNorm ((h - mean h) / r of LayerNorm), r² = mean(h²) + eps, it is known that

    mean(n²) = 1 - eps / r²

so that only eps / r² is open: T5's eps is 1e-6. The gradient of gain tells nothing more, being the diagonal of
Wᵀ dLoss/dW over gain. That of the layer W_o which is added last to h does. With d the loss' gradient by what the block
gives, v that by x led back through a normalisation of r = 1: where h goes through the block and past it alone,

    dLoss/dh_t = d_t + v_t / r_t        lies in the column space of dLoss/dW_o

which are entries less tokens equations for one unknown, r_t; c_t is a factor of all.

*Error.* What is left of the equations is taken to be as large in the direction of v_t as in the others. A length is off
by what its token's direction moves in n, by the error of eps / r², and by the precision of the model's normalisation.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from spear.blocks.search import Tokens, together
from spear.blocks.view import BlockView
from spear.certificate import SAFETY
from spear.directions import TINY
from spear.models.normalised import Normaliser

FITS = 1e-4  # relative residual of equations that hold
STEPS = 20  # in each r is read off tokens of the length that the last r gives: its error shrinks by about eps / r²
EQUATIONS = 4  # for the one unknown of each token


@dataclass(frozen=True)
class Lengths:
    """Of tokens: `own` is how far each may be off by itself, relative to it, `lever` times the error of its direction
    comes to that; `doubt` is why they are open."""

    own: Float[Tensor, " n"]
    lever: Float[Tensor, " n"]
    doubt: str = ""

    def total(self, direction: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The error of tokens whose direction is known that well."""
        return direction * (1 + self.lever) + self.own


@dataclass(frozen=True)
class Streams:
    """The loss' gradient by each h, `over` = 1 / r, how far this may be off; and whether the equations hold."""

    by_h: Float[Tensor, "n d"]
    over: Float[Tensor, " n"]
    off: Float[Tensor, " n"]
    fits: bool


def by_stream(
    norm: Normaliser,
    columns: Float[Tensor, "d n"],
    x: Float[Tensor, "n d"],
    by_x: Float[Tensor, "n d"],
    by_y: Float[Tensor, "n d"],
) -> Streams:
    """What the columns of dLoss/dW_o, an orthonormal basis, say of the stream before a block, by the gradients by what
    enters it and by what it adds."""
    unit, by_unit = (x - norm.shift.to(x)) / norm.scale.to(x), by_x * norm.scale.to(x)
    v = by_unit - unit * (by_unit * unit).mean(1, keepdim=True)
    v = v - by_unit.mean(1, keepdim=True) if norm.kind == "layer" else v
    away, rest = (u - (u @ columns) @ columns.T for u in (v, by_y))
    size = away.norm(dim=1).clamp_min(TINY)
    over = -(away * rest).sum(1) / size**2
    by_h, left = by_y + over[:, None] * v, rest + over[:, None] * away
    fits = bool((over > 0).all()) and float(left.norm()) <= FITS * float(by_h.norm())
    return Streams(by_h, over, left.norm(dim=1) / size, fits)


def columns_of(total: Float[Tensor, "d r"], n: int) -> Float[Tensor, "d n"]:
    """The n largest directions of a gradient's columns."""
    return torch.linalg.svd(total, full_matrices=False)[0][:, :n]


def measured(view: BlockView, found: Tokens) -> tuple[Tokens, Lengths]:
    """All tokens of a block at their lengths, as near as these are known."""
    none = torch.zeros_like(found.sine)
    if view.is_scaled:
        return found, Lengths(none, none)
    opened = Lengths(none + torch.inf, none, "without biases the activation leaves the length of each token open")
    if view.before is None:
        return found, opened
    norm = view.before.norm
    if not bool(norm.scale.all()):
        blind = f"{int((norm.scale == 0).sum())} entries of what is normalised before {view.name} do not enter it"
        return found, replace(opened, doubt=f"{opened.doubt}: {blind}")
    if (tokens := _sized(view, found, none + 1)) is None:
        blind = f"what the normalisation before {view.name} adds is larger than what it makes"
        return found, replace(opened, doubt=f"{opened.doubt}: {blind}")
    share = f"up to a share of {norm.eps:.0e} / 2r², r² the mean square of what that is given"
    told = f"the length of each token is known by the normalisation before it {share}: the gradients do not tell it"
    opened = replace(opened, doubt=told)
    if view.before.total is None or view.lift.shape[1] - len(found) < EQUATIONS:
        return tokens, opened
    exact = _iterated(view, found, tokens)
    return (tokens, opened) if exact is None else exact


def _iterated(view: BlockView, found: Tokens, tokens: Tokens) -> tuple[Tokens, Lengths] | None:
    """Tokens at the length of their own r; `None` where the equations of r do not hold."""
    norm, over = view.before.norm, torch.zeros_like(found.sine)
    columns = columns_of(view.before.total, len(found))
    for _ in range(STEPS):
        d, g = together(view, tokens)
        seen = by_stream(norm, columns, tokens.extended, g @ view.lift, d)
        moved, over = (seen.over - over).abs(), seen.over
        if (tokens := _sized(view, found, 1 - norm.eps * over**2)) is None:
            return None
    if not seen.fits:
        return None
    square = 2 * norm.eps * over * (seen.off + moved) + view.before.rounding + view.eps
    n, spread = _spread(norm, tokens.extended)
    along = 2 * (n * spread).mean(1)
    lever = 2 * (n / norm.scale).norm(dim=1) * tokens.extended.norm(dim=1) / (along * n.shape[1])
    return tokens, Lengths(SAFETY * square / along, lever)


def _spread(norm: Normaliser, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """n of x = gain ∘ n + shift, and the share of it that grows with x."""
    both = torch.stack([x - norm.shift, x]) / norm.scale
    return tuple(both - both.mean(2, keepdim=True) if norm.kind == "layer" else both)


def _sized(view: BlockView, found: Tokens, square: Float[Tensor, " n"]) -> Tokens | None:
    """Tokens at the lengths c at which mean(n²) is `square`; `None` where there is no such c, or another beside it."""
    n, p = _spread(view.before.norm, found.extended)
    q = p - n
    a, b, c = p.square().mean(1), (p * q).mean(1), q.square().mean(1) - square
    if not bool((c < 0).all()):
        return None
    extended = found.extended * ((b + (b**2 - a * c).sqrt()) / a)[:, None]
    return replace(found, extended=extended, read=view.read(view.activation.value(extended @ view.lift.T)))
