"""When a batch that does not mix is the only one, and how far its inputs can be from the truth.

**Theorem.** Let a batch of b samples be found, [∂L/∂W | ∂L/∂β] of each hidden layer of rank b. At the last hidden layer
let span[U, 1, A] (`sample_search`) and D_i ∘ γ ∘ W_outᵀ Z meet, for every sample i, in the line of g_i alone, and let
the columns of [U, 1, A] be independent in every layer. Here Z spans the possible ∂L/∂logits
(`replay.possible_errors`). Then no other batch of b samples with these activation patterns gives the update.

*Proof.* Such a batch has its ∂L/∂z in span U and its [x; 1] in the rows' span, so its g_i lies in both spaces: it is a
multiple of the one found, and so is its part U t_i. The rows x_i / σ_i follow from all t_i, up to a factor that their
last entry tells. Inputs of the last hidden layer give its ∂L/∂z, hence g_i of the layer below, and so on.

*Error.* A rounding e in g_i turns it by e over the sine of the angle between the spaces beside the line; the inverse of
[U, 1, A] bounds what that does to t_i, the inverse of all t what they do to the rows. To first order, times `SAFETY`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.certificate import SAFETY, norms, rms
from spear.normalisation.problem import NormalisedView, normalise
from spear.normalisation.replay import Run, possible_errors
from spear.normalisation.sample_search import columns
from spear.published.lowrank import LowRank

AT_ONCE = 32  # samples whose angles are held together
DEPENDENT = 1e-10  # pivot of a column of unit length under which it is made of the others
NO_ANGLE = 1e-6  # sine of two spaces that meet in more than a line
MARGIN = 8  # rows beyond the dimensions of the two


def sample_bounds(view: NormalisedView, own: Run, lows: Sequence[LowRank], misfit: float) -> Float[Tensor, " b"]:
    """A bound on each input's relative error; infinite where the batch is not the only one."""
    network, size = view.network, len(own.inputs[0])
    unknown = torch.full_like(own.inputs[0][:, 0], torch.inf)
    eps, moved = max(2 * network.precision, misfit), torch.zeros_like(unknown)
    for k in range(network.last, -1, -1):
        norm, low, scale = view.norms[k], lows[k], view.scale(k)
        g, W = scale * own.slopes[k], network.weights[k]
        span = columns(norm, low, network.affine(k))
        basis, triangle = torch.linalg.qr(span)
        if low.rank != size or len(span) < span.shape[1] or bool((triangle.diagonal().abs() < DEPENDENT).any()):
            return unknown
        turned = (eps + moved) * g.norm(dim=1)
        if k == network.last:
            errors, off = possible_errors(network, own, eps)
            above = scale[:, None] * network.weights[k + 1].mT
            turned = (turned + off * above.norm()) / _sines(basis, above @ errors, own.active[k], g)
        eye = torch.eye(len(triangle), dtype=g.dtype, device=g.device)
        inverse = torch.linalg.matrix_norm(torch.linalg.solve_triangular(triangle, eye, upper=True), 2)
        deviation = normalise(norm, network.apply(k, own.inputs[k]))[2]
        x = torch.cat([own.inputs[k], torch.ones_like(g[:, :1])], 1)
        t = (own.deltas[k] * deviation) @ low.L
        spread = torch.linalg.inv_ex(t.mT)[0].norm(dim=1)  # of each sample's row, by errors of all
        entry = eps * rms(network.augmented(k)) * x.shape[1] ** 0.5
        rows = spread * (size**0.5 * entry + ((inverse * turned) * (x / deviation).norm(dim=1)).norm())
        off = 2 * rows * deviation[:, 0]  # of the row itself, and of its last entry, by which it is divided
        length = deviation[:, 0] * len(W) ** 0.5
        moved = 2 * inverse * turned / t.norm(dim=1) + 2 * torch.linalg.matrix_norm(W, 2) * off / length
        if k:
            below = view.scale(k - 1) / (1 - view.drops[k - 1])
            size_below = (view.scale(k - 1) * own.slopes[k - 1]).norm(dim=1)
            moved = moved * own.deltas[k].norm(dim=1) * torch.linalg.matrix_norm(W * below, 2) / size_below
    return (SAFETY * off / norms(own.inputs[0])).nan_to_num(torch.inf, torch.inf)


def _sines(
    basis: Float[Tensor, "m k"], heads: Float[Tensor, "m c"], mask: Bool[Tensor, "b m"], own: Float[Tensor, "b m"]
) -> Float[Tensor, " b"]:
    """The least sine between the two spaces of each sample beside the line of its own g; 0 where they meet."""
    found = []
    for some, line in zip(mask.split(AT_ONCE), own.split(AT_ONCE), strict=True):
        family = torch.linalg.qr(some[:, :, None] * heads)[0]
        rest = family - basis @ (basis.mT @ family)
        gram = rest.mT @ rest
        place = (family.mT @ line[:, :, None]) / line.norm(dim=1)[:, None, None]
        apart = (gram + place @ place.mT).nan_to_num(0, 0, 0)  # a sample whose g is zero has no line
        least = torch.linalg.eigvalsh(apart)[:, 0].clamp_min(0).sqrt()
        found.append(
            torch.where((least > NO_ANGLE) & (len(basis) >= basis.shape[1] + heads.shape[1] + MARGIN), least, 0)
        )
    return torch.cat(found)
