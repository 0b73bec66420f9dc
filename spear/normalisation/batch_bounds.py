"""When a batch behind BatchNorm is the only one, and how far its inputs, less their mean, can be from the truth.

**Theorem.** Let a batch of b samples be found, ∂L/∂W of each hidden layer of rank b - 1, and let each layer's σ be that
of the update (`statistics`: every batch that gives the update has it). At the last hidden layer, let for every sample i
the columns of

    M_i = [ (σ/γ) U,  c ∘ P,  -D_i ∘ W_outᵀ Z ]

be independent (Z: the possible ∂L/∂logits, `replay.possible_errors`), and at each layer below those of
[(σ/γ) U, c ∘ P]. Then no other batch of b samples with these activation patterns gives the update, but for one image
added to every input.

*Proof.* Any such batch has G 1 = 0 and G X̄ = ∂L/∂W of rank b - 1, so its columns of G lie in span U and its centred
inputs in the rows' span: (t_i, s_i, d_i) solves M_i (t, s, d) = -a, which has one solution. That gives G of the last
hidden layer, hence dY of the layer below; there (t_i, s_i) solves the second system, and so on down to x_i = Rᵀ s_i.

*Error.* Each row of these systems is off by what rounding leaves in a, c, U, R and σ; rows are divided by it, and the
pseudo-inverse bounds the error of s and t, rows' errors being independent. That of t goes down through the weights'
norms. To first order, times `SAFETY`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.certificate import SAFETY, norms, rms
from spear.normalisation.problem import NormalisedView
from spear.normalisation.replay import Run, possible_errors
from spear.normalisation.spaces import open_spaces
from spear.normalisation.statistics import Deviation
from spear.published.lowrank import LowRank

AT_ONCE = 32  # samples whose systems are held together
DEPENDENT = 1e-10  # pivot of a column of unit length under which it is made of the others
MARGIN = 8  # rows beyond the unknowns


def difference_bounds(
    view: NormalisedView, own: Run, lows: Sequence[LowRank], deviations: Sequence[Deviation], misfit: float
) -> Float[Tensor, " b"]:
    """A bound on the error of each input less the mean input, relative to it; infinite where the batch is not the only
    one.

    `misfit` is the relative residual of the worst gradient.
    """
    network, size = view.network, len(own.inputs[0])
    eps = max(2 * network.precision, misfit)
    errors, off = possible_errors(network, own, eps)
    above = off.amax() / abs(network.unit(size))
    for k in range(network.last, -1, -1):
        low = lows[k]
        if low.rank != size - 1:
            return torch.full_like(own.inputs[0][:, 0], torch.inf)
        layer = _System.of(view, own, k, low, deviations[k], eps, above)
        if k == network.last:
            heads = network.weights[k + 1].mT @ errors
            t, s = layer.with_heads(heads, own.active[k])
        else:
            through = network.weights[k + 1].mT @ lows[k + 1].L / (1 - view.drops[k])
            t, s = layer.alone(through, t, own.active[k])
        above = layer.turn_off.amax()
    x = own.inputs[0] - own.inputs[0].mean(0)
    return (SAFETY * torch.hypot(s, layer.rows_off) / norms(x)).nan_to_num(torch.inf, torch.inf)


@dataclass(frozen=True)
class _System:
    """The columns (σ/γ) U and c ∘ P of a layer, rows over their errors, factorised: `inverse` is of the triangle.

    `noise` (m,) is the error of each row, `turn_off` (b,) that which U leaves in each entry of U t, `rows_off` (b,)
    what R leaves in Rᵀ s, all per sample in units of `NetworkView.unit`.
    """

    basis: Float[Tensor, "m r2"]
    inverse: Float[Tensor, "r2 r2"]
    noise: Float[Tensor, " m"]
    live: Bool[Tensor, " units"]
    turn_off: Float[Tensor, " b"]
    rows_off: Float[Tensor, " b"]

    @classmethod
    def of(
        cls, view: NormalisedView, own: Run, k: int, low: LowRank, deviation: Deviation, eps: float, above: Tensor
    ) -> "_System":
        """`above` is the error that U leaves in each entry of ∂L/∂z of the layer above."""
        spaces = open_spaces(view.network, view.norms[k], k, low, deviation)
        live, unit = spaces.live, view.network.unit(spaces.batch)
        normal, delta = own.normals[k][:, live], own.deltas[k] / unit
        x = own.inputs[k] - own.inputs[k].mean(0)
        t, s = delta @ low.L, x @ spaces.rows.mT
        entry = eps * rms(view.network.weight_gradients[k]) / abs(unit)
        turned = entry * (t / spaces.singular).norm(dim=1)
        ratio = (deviation.sigma / view.norms[k].scale).abs()[live]
        curved = spaces.slope * normal
        parts = (
            ratio * turned.amax(),
            eps * rms(spaces.level) * torch.ones_like(ratio),
            eps * rms(spaces.slope) * normal.abs().amax(0),
            deviation.error[live] * ((t @ spaces.turned.mT).abs() + curved.abs()).amax(0),
            view.network.weights[k + 1].norm(dim=0)[live] * above / (1 - view.drops[k]),
        )
        noise = torch.stack(parts).norm(dim=0).clamp_min(1e-300)
        columns = torch.cat([spaces.turned, spaces.slope[:, None] * spaces.place], 1) / noise[:, None]
        size = columns.norm(dim=0).clamp_min(1e-300)
        basis, triangle = torch.linalg.qr(columns / size)
        sound = len(columns) > columns.shape[1] and bool((triangle.diagonal().abs() > DEPENDENT).all())
        eye = torch.eye(len(triangle), dtype=columns.dtype, device=columns.device)
        inverse = (
            torch.linalg.solve_triangular(triangle, eye, upper=True) / size[:, None]
            if sound
            else torch.full_like(eye, torch.inf)
        )
        n = own.inputs[k].shape[1]
        rows_off = entry * n**0.5 * (s / spaces.singular).norm(dim=1)
        return cls(basis, inverse, noise, live, turned, rows_off)

    def alone(
        self, through: Float[Tensor, "units r"], moved: Float[Tensor, " b"], active: Bool[Tensor, "b units"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The error of t and of s where dY is D ∘ `through` t of the layer above, and that t is off by `moved`."""
        half, errors = len(self.inverse) // 2, []
        to_both = self.inverse @ (self.basis / self.noise[:, None]).mT
        for some, off in zip(active[:, self.live].split(AT_ONCE), moved.split(AT_ONCE), strict=True):
            carried = (to_both * some[:, None, :]) @ through[self.live]
            for part in (slice(None, half), slice(half, None)):
                own = self.inverse[part].square().sum().sqrt()
                errors.append(torch.hypot(own, _at_most(carried[:, part]) * off))
        return torch.cat(errors[::2]), torch.cat(errors[1::2])

    def with_heads(
        self, heads: Float[Tensor, "units c"], mask: Bool[Tensor, "b units"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The error of t and of s of each sample where dY is D ∘ heads · d, d unknown: the rows' being independent."""
        half, errors = len(self.inverse) // 2, []
        heads = heads[self.live] / self.noise[:, None]
        if len(heads) - len(self.inverse) - heads.shape[1] < MARGIN:
            unknown = torch.full_like(mask[:, 0], torch.inf, dtype=heads.dtype)
            return unknown, unknown
        for some in mask[:, self.live].split(AT_ONCE):
            masked = some[:, :, None] * heads
            inside = self.basis.mT @ masked
            size = masked.norm(dim=1, keepdim=True).clamp_min(1e-300)
            R = torch.linalg.qr((masked - self.basis @ inside) / size, mode="r")[1]
            sound = (R.diagonal(dim1=1, dim2=2).abs() > DEPENDENT).all(1)
            eye = torch.eye(R.shape[1], dtype=R.dtype, device=R.device)
            R = torch.where(sound[:, None, None], R, eye)
            moved = self.inverse @ (inside / size) @ torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
            for part in (slice(None, half), slice(half, None)):
                both = self.inverse[part].square().sum() + moved[:, part].square().sum((1, 2))
                errors.append(torch.where(sound, both.sqrt(), torch.inf))
        return torch.cat(errors[::2]), torch.cat(errors[1::2])


def _at_most(A: Float[Tensor, "s r r2"]) -> Float[Tensor, " s"]:
    """A bound on the spectral norm of each matrix: the eighth root of the sum of its singular values' eighth powers."""
    gram = A @ A.mT
    size = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)
    gram = gram / size[:, None, None]
    return (size**4 * (gram @ gram).square().sum((1, 2))) ** 0.125
