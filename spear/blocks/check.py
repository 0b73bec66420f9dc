"""When the tokens of a block are beyond doubt, and how far each can be from the truth.

**Theorem.** Let U = G X and U' = D A be the gradients of the two layers, all four factors of rank n, P the projection
on the row space of U', E a basis of the differences of the tokens (of the row space of U, where the first layer has no
bias). Let (1 - P) u'(z_t) W E, u = [phi(z); 1], have full column rank for each token t. Then the tokens are isolated:
no other n tokens near them give U and U', whatever their d, and so whatever stands before and behind the block. Where
phi is piecewise linear no other n tokens on the same pieces do. Of a gated block u = [phi(z) ∘ z'; 1], and the former
alone holds. Where the length of a token is open (`BlockView.is_scaled`), all this is of its direction, and
`spear.blocks.lengths` says what is known of the rest.

*Proof.* n tokens that give U and U' have their [x; 1] in the row space of U and their [a; 1] in that of U', as the
factors have full rank. So x_t moves by E v alone, and r(v) = (1 - P) u(z_t + W E v) = 0, whose derivative at v = 0 is
injective. On one piece of phi, r is affine.

*Error.* With the rounding N of U and N' of U', to first order: x_t is off its row space by the row (G⁺N)_t, u(z_t) off
its own by (D⁺N')_t and by what the former moves it, and v follows by the derivative's pseudo-inverse T⁺. The entries
are taken for independent, as large as rounding or what the tokens leave of U and U' makes them, whichever is more,
times `spear.certificate.SAFETY`.

**Assumed**, as elsewhere: that no second set of tokens, far from this one, gives both gradients. Each solves m - n
equations more than it has unknowns to rounding; its g and d, which no such equation mentions, must reproduce U and U'
entry by entry; and a round of starts from the whole gradients ends at none but these tokens. The number of tokens must
be disclosed, is taken on trust, and must be the rank. Where phi(c z) = c^k phi(z), the gradient of the second layer's
weights must tell the length of each token, beside the biases'.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from spear.blocks.curves import TokenCurves
from spear.blocks.lengths import Lengths
from spear.blocks.search import PART, Tokens, together
from spear.blocks.view import BlockView
from spear.certificate import BY_BIASES, SAFETY, Certificate, inverse_columns, length_by_reader, norms, rms
from spear.directions import unit_rows
from spear.models.streaming import Blocks


def certificate(view: BlockView, found: Tokens, lengths: Lengths, doubt: str) -> Certificate:
    """The evidence for the tokens, all of which were found."""
    d, g = together(view, found)
    left = view.below - g.T @ found.extended, view.above - d.T @ found.read
    whole = view.below, view.above
    entries = [max(rms(rest), view.eps * rms(all_)) for rest, all_ in zip(left, whole, strict=True)]
    residual = max(float(rest.norm() / all_.norm()) for rest, all_ in zip(left, whole, strict=True))
    bound = lengths.total(errors(view, found.extended, g, d, entries))
    return Certificate(
        copies=torch.ones_like(bound).long(),
        disclosed=view.disclosed,
        residual=residual,
        limit=view.accuracy.layer,
        error_bound=bound,
        allowed=view.accuracy.recovered,
        doubt=lengths.doubt,
        reserve=doubt or ("" if bool((open_lengths(view, found) <= view.accuracy.recovered).all()) else BY_BIASES),
    )


def open_lengths(view: BlockView, found: Tokens) -> Float[Tensor, " n"]:
    """By what share each token can be longer or shorter where the factor of the biases' gradients alone tells it:
    infinite where these biases are zero, and phi(c z) = c^k phi(z). What else tells lengths says so by itself."""
    x = view.tokens(found.extended)
    if not view.is_scaled or view.activation.degree is None:
        return torch.zeros_like(x[:, 0])
    m = view.above.shape[1] - view.anchored[1]
    moved = view.activation.slope(found.extended @ view.lift.T) * (x @ view.lift[:, : x.shape[1]].T)
    moved = moved.unflatten(1, (-1, m)).sum(1)  # gated: by either factor
    return length_by_reader(found.read[:, :m], moved, Blocks(view.above[:, :m], None, view.above), view.eps)[0]


def errors(
    view: BlockView,
    extended: Float[Tensor, "n n1"],
    g: Float[Tensor, "n m"],
    d: Float[Tensor, "n outputs"],
    entries: list[float],
) -> Float[Tensor, " n"]:
    """A bound on each token's relative error; infinite where the tokens are not isolated.

    `entries` are the root mean square errors of an entry of each gradient.
    """
    curves = TokenCurves.of(view, *view.factors())
    w = curves.coordinates(extended)
    lever, reach = [], []
    labels = torch.zeros(len(w), dtype=torch.long, device=w.device)
    away = view.tokens(curves.place.T @ curves.rows)  # of x by w
    gram = away @ away.T
    weights = view.lift.norm() / view.lift.shape[1] ** 0.5
    for part in torch.arange(len(w), device=w.device).split(max(1, PART // max(1, curves.frame.numel()))):
        at = curves.at(w[part], labels[part])
        T = curves.matrix(at) * at.size[:, None]
        factor, failed = torch.linalg.cholesky_ex(T @ T.mT)
        inverse = torch.cholesky_inverse(factor)
        squared = (inverse * _beside(view, w[part], gram)).sum((1, 2))
        lever.append(torch.where(failed == 0, squared.clamp_min(0).sqrt(), torch.inf))
        reach.append(at.bend.abs().amax(1) * weights)
    lever, reach = torch.cat(lever), torch.cat(reach)
    row, column, x = inverse_columns(g), inverse_columns(d), view.tokens(extended)
    off = entries[0] * row * x.shape[1] ** 0.5
    moved = lever * (entries[1] * column + off * reach)
    return (SAFETY * (off * (1 + norms(x)) + moved) / norms(x)).nan_to_num(torch.inf, torch.inf)


def _beside(view: BlockView, w: Float[Tensor, "k q"], gram: Float[Tensor, "q q"]) -> Float[Tensor, "#k q q"]:
    """The products of moves of x, beside x itself where its length is open."""
    if view.is_scaled:
        return gram[None]
    line = unit_rows(w)
    aside = torch.eye(len(gram)).to(gram) - line[:, :, None] * line[:, None]
    return aside @ gram @ aside
