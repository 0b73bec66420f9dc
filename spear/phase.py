"""Phase retrieval at the last hidden layer: each sample's gradient is 0 or h_j in every entry, and h is nearly known.

    [dL/dW | dL/dbeta] = sum_i delta_i [y_i; 1]ᵀ = U S V      delta_i = U t_i = D_i ∘ h_i      [y_i; 1] = Vᵀ s_i

with ⟨s_k, t_i / S⟩ = [k = i], so that solved t_i confine the remaining s_k. h_i = W_outᵀ d_i lies in a space of
C - 1 dimensions (d_i = p_i - e_c sums to zero), and in a fresh network it is known to a few per cent once the class
is guessed. Vectors are rows: u, h, v are (starts, m), t (samples, b), d (samples, outputs).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.spans import TINY, Evened, misfit, normalise, project, quick

EVERY = 5  # steps after which starts are looked at


@dataclass(frozen=True)
class Spaces:
    """The known spaces of the last hidden layer: `basis` U, `singular` S, `rows` V, and the output weights `head`.

    `lift` is [W | beta] Vᵀ, so that z = lift s; `contrasts` spans the possible d.
    """

    basis: Float[Tensor, "m b"]
    singular: Float[Tensor, " b"]
    rows: Float[Tensor, "b n1"]
    lift: Float[Tensor, "m b"]
    head: Float[Tensor, "outputs m"]
    contrasts: Float[Tensor, "outputs free"]

    @property
    def rank(self) -> int:
        return len(self.singular)

    def to(self, dtype: torch.dtype) -> "Spaces":
        return Spaces(*(getattr(self, f.name).to(dtype) for f in fields(self)))

    @property
    def head_space(self) -> Float[Tensor, "m free"]:
        """Columns span every possible h: W_outᵀ times a basis of the possible d."""
        return self.head.T @ self.contrasts


def contrasts(outputs: int, loss: str, like: Tensor) -> Float[Tensor, "outputs free"]:
    """Orthonormal basis of the possible d: under cross-entropy p - e_c sums to zero, else every vector is one."""
    eye = torch.eye(outputs, dtype=like.dtype, device=like.device)
    return torch.linalg.qr(eye - 1 / outputs)[0][:, : outputs - 1] if loss == "cross_entropy" else eye


@dataclass(frozen=True)
class Solved:
    """Gradient directions found so far, one row each: unit t, d to the same scale, mask D of the active units."""

    t: Float[Tensor, "f b"]
    d: Float[Tensor, "f outputs"]
    mask: Bool[Tensor, "f m"]

    @classmethod
    def none(cls, spaces: Spaces) -> "Solved":
        m, b = spaces.basis.shape
        empty = spaces.basis.new_zeros
        return cls(empty(0, b), empty(0, len(spaces.head)), empty(0, m).bool())

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: Tensor) -> "Solved":
        return Solved(self.t[index], self.d[index], self.mask[index])

    @property
    def labels(self) -> Int[Tensor, " f"]:
        """The class whose entry of d is negative."""
        return self.d.argmin(1)

    def join(self, other: "Solved", room: int, cosine: float = 1 - 1e-9) -> "Solved":
        """Add the directions of `other` that are new up to sign, as far as there is room."""
        t = torch.cat([self.t, other.t])
        position = torch.arange(len(t), device=t.device)
        same = (t @ other.t.T).abs() > cosine
        repeated = (same & (position[:, None] < position[len(self) :])).any(0)
        new = other[(~repeated).nonzero()[:room, 0]]
        return Solved(torch.cat([self.t, new.t]), torch.cat([self.d, new.d]), torch.cat([self.mask, new.mask]))


def complement(spaces: Spaces, solved: Solved) -> Float[Tensor, "b r"]:
    """Orthonormal basis N of {s : ⟨s, t_i / S⟩ = 0 for every solved i}: where the other samples' s lie."""
    b = spaces.rank
    if not len(solved):
        return torch.eye(b, dtype=spaces.basis.dtype, device=spaces.basis.device)
    return torch.linalg.qr((solved.t / spaces.singular).T, mode="complete")[0][:, len(solved) :]


def leaning(spaces: Spaces, free: Float[Tensor, "b r"]) -> Float[Tensor, " m"]:
    """How far each unit leans to being active in the unsolved samples: mean over spread of its pre-activation.

    Their s are taken for normal with the covariance S² that the gradient shows, within the span of `free`, given that
    the last entry of [y; 1] = Vᵀ s is 1. Deep layers and images make samples alike: there it foretells most masks. At
    most 3 in size, as no more can be known from so rough a model.
    """
    triangle = torch.linalg.qr(free / spaces.singular[:, None])[1]
    both = torch.cat([spaces.lift, spaces.rows[:, -1:].T]) @ free
    white = torch.linalg.solve_triangular(triangle, both, upper=True, left=False)
    lift, ones = white[:-1], normalise(white[-1:])[0]
    mean = lift @ ones
    return (mean / (lift.pow(2).sum(1) - mean**2).clamp_min(TINY).sqrt()).clamp(-3, 3)


@dataclass(frozen=True)
class Iterate:
    """A batch of starts: u towards span(U), h the guessed back-propagated vector, v the pre-activations' partner."""

    u: Float[Tensor, "k m"]
    h: Float[Tensor, "k m"]
    v: Float[Tensor, "k m"]
    target: Float[Tensor, "k m"]

    def __getitem__(self, index: Tensor) -> "Iterate":
        return Iterate(self.u[index], self.h[index], self.v[index], self.target[index])

    def to(self, dtype: torch.dtype) -> "Iterate":
        return Iterate(*(x.to(dtype) for x in (self.u, self.h, self.v, self.target)))

    @classmethod
    def joined(cls, parts: Sequence["Iterate"]) -> "Iterate":
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("u", "h", "v", "target")))


def search(
    iterate: Iterate,
    basis: Float[Tensor, "m b"],
    *,
    steps: int,
    partner: Float[Tensor, "m r"] | None = None,
    weight: float = 1.0,
    head: Float[Tensor, "m free"] | None = None,
    relaxation: float = 0.5,
    near: float = 0.0,
    evened: Evened | None = None,
    lean: Float[Tensor, " m"] | None = None,
    until: float = math.inf,
) -> Iterate:
    """Relaxed reflections on all starts at once (relax-reflect-relax): u in span(U) whose entries are 0 or h_j.

    With `partner`, an orthonormal basis of the possible pre-activations, v > 0 exactly where u = h_j, with `weight` on
    that evidence. With `head`, an orthonormal basis of the possible h, h moves too; without it h stays. Norms of h and
    v are kept at 1. With `evened`, made for these starts, span(U) is projected on with weights on the units. The
    returned `target` is u's last value among {0, h_j}. A positive `lean` (`leaning`) is evidence that a unit is active,
    which counts most where h_j is small.

    A start ends after `steps`, or before, when its target is within the squared sine `near` of span(U) and no longer
    halves that in `EVERY` steps: since h is not exact, a start that has arrived would only drift away again. One whose
    target vanished ends too, and all when the clock (`time.perf_counter`) shows `until`.
    """
    basis, partner = quick(basis), None if partner is None else quick(partner)
    number = torch.arange(len(iterate.u), device=basis.device)
    before, ends, order = torch.full_like(iterate.u[:, 0], math.inf), [], []
    for done in range(0, steps, EVERY):
        if not len(number) or time.perf_counter() > until:
            break
        iterate = relax(iterate, basis, min(EVERY, steps - done), partner, weight, head, relaxation, evened, lean)
        if near:
            fit = misfit(iterate.target, basis)
            over = ((fit < near) & (fit > before / 2)) | ((fit == 1) & (before == 1))
            ends.append(iterate[over])
            order.append(number[over])
            iterate, number, before = iterate[~over], number[~over], fit[~over]
            evened = evened[~over] if evened else None
    return Iterate.joined([*ends, iterate])[torch.cat([*order, number]).argsort()]


def relax(
    iterate: Iterate,
    basis: Float[Tensor, "m b"],
    steps: int,
    partner: Float[Tensor, "m r"] | None,
    weight: float,
    head: Float[Tensor, "m free"] | None,
    relaxation: float,
    evened: Evened | None,
    lean: Float[Tensor, " m"] | None,
) -> Iterate:
    """The steps of `search`. Choices between two values are made by a sign: comparisons are slow at this size."""
    u, h, v, target = iterate.u.clone(), iterate.h, iterate.v.clone(), iterate.target
    push = None if lean is None else lean * h.abs() * h.shape[1] ** -0.5
    for _ in range(steps):
        pu = evened.project(u, basis) if evened else project(u, basis)
        ru = torch.lerp(u, pu, 2.0)
        if head is None:
            x, evidence = h, ru.mul(2).sub_(h).mul_(h)
        else:
            ph = project(h, head)
            rh = torch.lerp(h, ph, 2.0)
            x, evidence = (ru + rh) / 2, ru * ru - (ru - rh) ** 2 / 2
        if push is not None:
            evidence.add_(push)
        if partner is not None:
            pv = project(v, partner)
            rv = torch.lerp(v, pv, 2.0)
            size = rv.abs()
            evidence.addcmul_(rv, size, value=weight)
        sign = evidence.sign_()  # 1 where active, -1 where not
        target = torch.addcmul(x, x, sign).mul_(0.5)
        u.add_(target, alpha=relaxation).sub_(pu, alpha=relaxation)
        if partner is not None:
            v.add_(size.mul_(sign).add_(rv), alpha=relaxation / 2).sub_(pv, alpha=relaxation)
            v.div_(v.norm(dim=1, keepdim=True).clamp_min_(TINY))
        if head is not None:
            h = h + relaxation * (target + (rh - rh * sign) / 2 - ph)
            scale = h.norm(dim=1, keepdim=True).clamp_min(TINY)
            u, h, target = u.div_(scale), h / scale, target / scale
    return Iterate(u, h, v, target)


def search_evened(
    iterate: Iterate, labels: Int[Tensor, " k"], basis: Float[Tensor, "m b"], *, steps: int, **options: float | Tensor
) -> Iterate:
    """`search` with rows evened out: each start's h is that of its label; options as there."""
    order = labels.argsort()
    evened = Evened.of(labels[order], iterate.h[order], basis)
    return search(iterate[order], basis, steps=steps, evened=evened, **options)[order.argsort()]


@dataclass(frozen=True)
class Exact:
    """Outcome of the exact step for each mask: t, d, the sine to span(U) and the next larger one.

    `mask` is what t itself implies, `settled` whether that was the mask it came from. `lever` is |t / S|, by which
    noise in the gradient turns t out of span(U).
    """

    t: Float[Tensor, "k b"]
    d: Float[Tensor, "k outputs"]
    sine: Float[Tensor, " k"]
    second: Float[Tensor, " k"]
    mask: Bool[Tensor, "k m"]
    settled: Bool[Tensor, " k"]
    lever: Float[Tensor, " k"]

    def solved(self, index: Tensor) -> Solved:
        return Solved(self.t[index], self.d[index], self.mask[index])

    def replaced(self, index: Int[Tensor, " j"], other: "Exact") -> "Exact":
        """The same with the masks `index` as in `other`."""
        return Exact(*(getattr(self, f.name).index_copy(0, index, getattr(other, f.name)) for f in fields(self)))

    def __getitem__(self, index: Tensor) -> "Exact":
        return Exact(*(getattr(self, f.name)[index] for f in fields(self)))


def exact_step(spaces: Spaces, mask: Bool[Tensor, "k m"], *, rounds: int = 4) -> Exact:
    """For a fixed mask the best (t, d) is a generalised eigenpair: the smallest of (EᵀE - (UᵀE)ᵀ(UᵀE), EᵀE).

    Here E = D ∘ W_outᵀ Z, Z a basis of the possible d. Masks are renewed from the solution until they settle, at most
    `rounds` times. The largest entry of d, the label's, is negative.
    """
    exact = _exact_once(spaces, mask)
    for _ in range(rounds - 1):
        left = (~exact.settled).nonzero()[:, 0]
        if not len(left):
            break
        exact = exact.replaced(left, _exact_once(spaces, exact.mask[left]))
    return exact


def _exact_once(spaces: Spaces, mask: Bool[Tensor, "k m"]) -> Exact:
    heads = spaces.head_space
    gram, t_all = _normal_equations(spaces.basis, heads, mask)
    values, d = _smallest(gram, t_all)
    t = torch.einsum("kcb,kc->kb", t_all, d)
    u, h = t @ spaces.basis.T, d @ heads.T
    new = (2 * u - h) * h > 0
    masked = h * mask
    sine = (masked - u).norm(dim=1) / masked.norm(dim=1).clamp_min(TINY)  # the eigenvalue is known to rounding only
    d = d @ spaces.contrasts.T
    norm = t.norm(dim=1, keepdim=True).clamp_min(TINY) * _sign(d)[:, None]
    second = values[:, 1].clamp_min(0).sqrt() if values.shape[1] > 1 else torch.ones_like(sine)
    t, d = t / norm, d / norm
    return Exact(t, d, sine, second, new, (new == mask).all(1), (t / spaces.singular).norm(dim=1))


def _sign(d: Float[Tensor, "k outputs"]) -> Float[Tensor, " k"]:
    """Orientation that makes the largest entry of d, the label's, negative."""
    return -torch.sign(d.gather(1, d.abs().argmax(1, keepdim=True))[:, 0])


def _normal_equations(
    basis: Float[Tensor, "m b"], heads: Float[Tensor, "m c"], mask: Bool[Tensor, "k m"]
) -> tuple[Float[Tensor, "k c c"], Float[Tensor, "k c b"]]:
    """EᵀE and (UᵀE)ᵀ for E = D ∘ heads: few classes by products of all masks at once, many one mask after the other."""
    c = heads.shape[1]
    if c > 32:
        pairs = [(heads[on].T @ heads[on], heads[on].T @ basis[on]) for on in mask]
        gram, t = zip(*pairs, strict=True)
        return torch.stack(gram), torch.stack(t)
    weight = mask.to(basis.dtype)
    gram = (weight @ (heads[:, :, None] * heads[:, None, :]).reshape(len(heads), c * c)).reshape(-1, c, c)
    masked = weight[:, None, :] * heads.T
    return gram, (masked.reshape(-1, len(heads)) @ basis).reshape(len(mask), c, -1)


def _smallest(
    gram: Float[Tensor, "k c c"], t: Float[Tensor, "k c b"]
) -> tuple[Float[Tensor, "k two"], Float[Tensor, "k c"]]:
    """The two smallest eigenvalues of gram - t tᵀ against gram, and the first eigenvector."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    factor = torch.linalg.cholesky(gram + (500 * torch.finfo(gram.dtype).eps * ridge + TINY) * eye)
    half = torch.linalg.solve_triangular(factor, gram - t @ t.transpose(1, 2), upper=False)
    full = torch.linalg.solve_triangular(factor, half.transpose(1, 2), upper=False)
    values, vectors = torch.linalg.eigh((full + full.transpose(1, 2)) / 2)
    d = torch.linalg.solve_triangular(factor.transpose(1, 2), vectors[:, :, :1], upper=True)[:, :, 0]
    return values[:, :2], d


def distinct(mask: Bool[Tensor, "k m"], order: Float[Tensor, " k"]) -> Int[Tensor, " j"]:
    """One index for each different mask, smallest `order` first (masks are compared by a random linear hash)."""
    weights = torch.rand(mask.shape[1], generator=Generator().manual_seed(0), dtype=torch.float64)
    code = mask.double() @ weights.to(mask.device)
    ranked = torch.argsort(order)
    _, inverse = torch.unique(code[ranked], return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(code), device=mask.device)
    first = first.scatter_reduce(0, inverse, torch.arange(len(code), device=mask.device), "amin")
    return ranked[first.sort()[0]]


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
    rounds: int = 10,
    steps: int = 50,
) -> Solved:
    """Exact steps on every target near span(U); near misses go on from the h that the step found (second stage).

    The steps that settle the masks run in the precision of `iterate`; only what fits there is solved in full precision.
    """
    rough, found = spaces.to(iterate.u.dtype), Solved.none(spaces)
    for stage in range(rounds + 1):
        distance = misfit(iterate.target, rough.basis)
        iterate, distance = iterate[distance < tolerances.near], distance[distance < tolerances.near]
        if not len(distance):
            break
        iterate = iterate[distinct(iterate.target != 0, distance)]
        exact = exact_step(rough, iterate.target != 0)
        one = distinct(exact.mask, exact.sine)
        iterate, exact = iterate[one], exact[one]
        again = exact.sine < 0.3
        close = (exact.settled & (exact.sine < tolerances.rough)).nonzero()[:, 0]
        if len(close):
            fine = exact_step(spaces, exact.mask[close])
            good = accepted(fine, tolerances)
            found = found.join(fine.solved(good), room=spaces.rank)
            again[close[good]] = False
        if stage == rounds or not again.any():
            break
        iterate = iterate[again]
        h = normalise(exact.d[again] @ rough.head)
        h = h * torch.sign((h * iterate.h).sum(1, keepdim=True))
        iterate = search(replace(iterate, h=h), rough.basis, steps=steps, head=head)
    return found


def accepted(exact: Exact, tolerances: Tolerances) -> Bool[Tensor, " k"]:
    """A mask that settled, whose t fits to rounding, and no second t for the same mask (equal masks merge samples)."""
    limit = (10 * tolerances.noise * exact.lever).clamp(1e-7, 1e-3)
    apart = exact.second > tolerances.gap * exact.sine.clamp_min(1e-8)
    return exact.settled & (exact.sine < limit) & apart
