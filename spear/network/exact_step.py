"""The exact step for a fixed mask, and the masks that it settles on."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.directions import TINY, first_of_each, unit_rows
from spear.network.phase_retrieval import Iterate, Reflections, retrieve_phases
from spear.network.side_by_side import SideBySide
from spear.network.spaces import Mask, Solved, Spaces, misfit

STAGES, STEPS = 10, 50  # near misses go on with a better h, essential past b/m = 0.4; steps of each stage
HOPEFUL = 0.3  # the sine of a mask's best t under which its h leads on
SAFETY = 10  # times what noise explains
ALONE = 0.1  # sine of a second t that no noise explains
FINEST, COARSEST = 1e-7, 2e-2  # sines that are always accepted, never: the root of rounding; h's own error in a guess
AT_ONCE = 32  # classes up to which the products of their pairs for all masks at once are the faster way
RIDGE = 500  # roundings of the mean diagonal: keeps the Gram matrix of a mask with too few units positive definite


@dataclass(frozen=True)
class Exact(SideBySide):
    """Outcome of the exact step for each mask: t, d, the sine to span(U) and the next larger one.

    `mask` is what t itself implies, `settled` whether that was the mask it came from. `lever` is |t / S|, by which
    noise in the gradient turns t out of span(U).
    """

    t: Float[Tensor, "k b"]
    d: Float[Tensor, "k outputs"]
    sine: Float[Tensor, " k"]
    second: Float[Tensor, " k"]
    mask: Mask
    settled: Bool[Tensor, " k"]
    lever: Float[Tensor, " k"]

    def solved(self, index: Int[Tensor, " j"] | Bool[Tensor, " k"]) -> Solved:
        """The directions of these masks."""
        return Solved(self.t[index], self.d[index], self.mask[index])

    def replaced(self, index: Int[Tensor, " j"], other: "Exact") -> "Exact":
        """The same with the masks `index` as in `other`."""
        return Exact(*(getattr(self, f.name).index_copy(0, index, getattr(other, f.name)) for f in fields(self)))


def solve_mask(spaces: Spaces, mask: Mask, *, rounds: int = 4) -> Exact:
    """For a fixed mask the best (t, d) is a generalised eigenpair: the smallest of (EᵀE - (UᵀE)ᵀ(UᵀE), EᵀE).

    Here E = D ∘ W_outᵀ Z, D the slopes, Z a basis of the possible d. Masks are renewed from the solution until they
    settle, at most `rounds` times. The largest entry of d, the label's, is negative.
    """
    exact = _exact_once(spaces, mask)
    for _ in range(rounds - 1):
        left = (~exact.settled).nonzero()[:, 0]
        if not len(left):
            break
        exact = exact.replaced(left, _exact_once(spaces, exact.mask[left]))
    return exact


def _exact_once(spaces: Spaces, mask: Mask) -> Exact:
    heads = spaces.head_space
    slopes = mask if spaces.levels is None else spaces.levels.slopes(mask)
    gram, t_all = _normal_equations(spaces.basis, heads, slopes)
    values, d = _smallest(gram, t_all)
    t = torch.einsum("kcb,kc->kb", t_all, d)
    u, h = t @ spaces.basis.T, d @ heads.T
    masked = h * slopes
    new = spaces.active(spaces.without_itself(u, masked), h)
    size = masked.norm(dim=1)  # 0 where no unit is active: that fits everything
    off = (masked - u).norm(dim=1) / size.clamp_min(TINY)  # the eigenvalue is known to rounding only
    sine = torch.where(size > 0, off, 1.0)
    d = d @ spaces.contrasts.T
    norm = t.norm(dim=1, keepdim=True).clamp_min(TINY) * _sign(d)[:, None]
    second = values[:, 1].clamp_min(0).sqrt() if values.shape[1] > 1 else torch.ones_like(sine)
    t, d = t / norm, d / norm
    return Exact(t, d, sine, second, new, (new == mask).all(1), (t / spaces.singular).norm(dim=1))


def _sign(d: Float[Tensor, "k outputs"]) -> Float[Tensor, " k"]:
    """Orientation that makes the largest entry of d, the label's, negative."""
    return -torch.sign(d.gather(1, d.abs().argmax(1, keepdim=True))[:, 0])


def _normal_equations(
    basis: Float[Tensor, "m b"], heads: Float[Tensor, "m c"], slopes: Bool[Tensor, "k m"] | Float[Tensor, "k m"]
) -> tuple[Float[Tensor, "k c c"], Float[Tensor, "k c b"]]:
    """EᵀE and (UᵀE)ᵀ for E = D ∘ heads: few classes by products of all masks at once, many one mask after the other."""
    c = heads.shape[1]
    if c > AT_ONCE:
        if slopes.dtype == torch.bool:
            parts = [(heads[on], basis[on]) for on in slopes]
        else:
            parts = [(one[:, None] * heads, basis) for one in slopes]
        pairs = [(own.T @ own, own.T @ span) for own, span in parts]
        gram, t = zip(*pairs, strict=True)
        return torch.stack(gram), torch.stack(t)
    weight = slopes.to(basis.dtype)
    gram = (
        (weight if slopes.dtype == torch.bool else weight**2)
        @ (heads[:, :, None] * heads[:, None, :]).reshape(len(heads), c * c)
    ).reshape(-1, c, c)
    masked = weight[:, None, :] * heads.T
    return gram, (masked.reshape(-1, len(heads)) @ basis).reshape(len(slopes), c, -1)


def _smallest(
    gram: Float[Tensor, "k c c"], t: Float[Tensor, "k c b"]
) -> tuple[Float[Tensor, "k two"], Float[Tensor, "k c"]]:
    """The two smallest eigenvalues of gram - t tᵀ against gram, and the first eigenvector."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    factor = torch.linalg.cholesky(gram + (RIDGE * torch.finfo(gram.dtype).eps * ridge + TINY) * eye)
    half = torch.linalg.solve_triangular(factor, gram - t @ t.transpose(1, 2), upper=False)
    full = torch.linalg.solve_triangular(factor, half.transpose(1, 2), upper=False)
    values, vectors = torch.linalg.eigh((full + full.transpose(1, 2)) / 2)
    d = torch.linalg.solve_triangular(factor.transpose(1, 2), vectors[:, :, :1], upper=True)[:, :, 0]
    return values[:, :2], d


def different_masks(mask: Mask, order: Float[Tensor, " k"]) -> Int[Tensor, " j"]:
    """One index for each different mask, smallest `order` first (masks are compared by a random linear hash)."""
    weights = torch.rand(mask.shape[1], generator=Generator().manual_seed(0), dtype=torch.float64)
    code = mask.double() @ weights.to(mask.device)
    ranked = torch.argsort(order)
    return ranked[first_of_each(code[ranked])]


@dataclass(frozen=True)
class Tolerances:
    """Squared sine under which a target is refined, sine under which a solution is accepted, and its least gap.

    `rough` is the sine under which a solution in single precision is solved again in full precision.

    `noise` is the size of the noise in the gradient, in its unit: the exact step accepts what that explains.
    """

    near: float = 0.03
    rough: float = 1e-3
    accept: float = 1e-7
    gap: float = 1e3
    noise: float = 0.0


def refine(
    spaces: Spaces,
    iterate: Iterate,
    *,
    head: Float[Tensor, "m free"] | None,
    tolerances: Tolerances,
) -> Solved:
    """Exact steps on every target near span(U); near misses go on from the h that the step found (second stage).

    The steps that settle the masks run in the precision of `iterate`; only what fits there is solved in full precision.
    """
    rough, found = spaces.to(iterate.u.dtype), Solved.none(spaces)
    for stage in range(STAGES + 1):
        distance = misfit(iterate.target, rough.basis)
        iterate, distance = iterate[distance < tolerances.near], distance[distance < tolerances.near]
        if not len(distance):
            break
        mask = iterate.target != 0 if rough.levels is None else rough.active(iterate.target, iterate.h)
        one = different_masks(mask, distance)
        iterate, mask = iterate[one], mask[one]
        exact = solve_mask(rough, mask)
        one = different_masks(exact.mask, exact.sine)
        iterate, exact = iterate[one], exact[one]
        again = exact.sine < HOPEFUL
        close = (exact.settled & (exact.sine < tolerances.rough)).nonzero()[:, 0]
        if len(close):
            fine = solve_mask(spaces, exact.mask[close])
            good = accepted(fine, tolerances)
            found = found.join(fine.solved(good), room=spaces.rank)
            again[close[good]] = False
        if stage == STAGES or not again.any():
            break
        iterate = iterate[again]
        h = unit_rows(exact.d[again] @ rough.head)
        h = h * torch.sign((h * iterate.h).sum(1, keepdim=True))
        onward = Reflections(STEPS, head=head, levels=rough.levels)
        iterate = retrieve_phases(replace(iterate, h=h), rough.basis, onward)
    return found


def accepted(exact: Exact, tolerances: Tolerances) -> Bool[Tensor, " k"]:
    """A mask that settled, whose t fits to rounding, and no second t for the same mask (equal masks merge samples)."""
    limit = (SAFETY * tolerances.noise * exact.lever).clamp(FINEST, COARSEST)
    apart = exact.second > (tolerances.gap * exact.sine.clamp_min(FINEST / 10)).clamp_max(ALONE)
    return exact.settled & (exact.sine < limit) & apart
