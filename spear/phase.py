"""Phase retrieval at the last hidden layer: each sample's gradient is 0 or h_j in every entry, and h is nearly known.

    [dL/dW | dL/dbeta] = sum_i delta_i [y_i; 1]ᵀ = U S V      delta_i = U t_i = D_i ∘ h_i      [y_i; 1] = Vᵀ s_i

with ⟨s_k, t_i / S⟩ = [k = i], so that solved t_i confine the remaining s_k. h_i = W_outᵀ d_i lies in a space of
C - 1 dimensions (d_i = p_i - e_c sums to zero), and in a fresh network it is known to a few per cent once the class
is guessed. Vectors are rows: u, h, v are (starts, m), t (samples, b), d (samples, outputs).
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linprog
from torch import Generator, Tensor

TINY = 1e-30


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


@dataclass(frozen=True)
class Iterate:
    """A batch of starts: u towards span(U), h the guessed back-propagated vector, v the pre-activations' partner."""

    u: Float[Tensor, "k m"]
    h: Float[Tensor, "k m"]
    v: Float[Tensor, "k m"]
    target: Float[Tensor, "k m"]

    def __getitem__(self, index: Tensor) -> "Iterate":
        return Iterate(self.u[index], self.h[index], self.v[index], self.target[index])


def normalise(x: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
    return x / x.norm(dim=1, keepdim=True).clamp_min(TINY)


def project(x: Float[Tensor, "k m"], basis: Float[Tensor, "m r"]) -> Float[Tensor, "k m"]:
    return (x @ basis) @ basis.T


def search(
    iterate: Iterate,
    basis: Float[Tensor, "m b"],
    *,
    steps: int,
    partner: Float[Tensor, "m r"] | None = None,
    weight: float = 1.0,
    head: Float[Tensor, "m free"] | None = None,
    relaxation: float = 0.5,
    until: float = math.inf,
) -> Iterate:
    """Relaxed reflections on all starts at once (relax-reflect-relax): u in span(U) whose entries are 0 or h_j.

    With `partner`, an orthonormal basis of the possible pre-activations, v > 0 exactly where u = h_j, with `weight` on
    that evidence. With `head`, an orthonormal basis of the possible h, h moves too; without it h stays. Norms of h and
    v are kept at 1. The returned `target` is u's last value among {0, h_j}. Steps end early when the clock
    (`time.perf_counter`) shows `until`.
    """
    u, h, v, target = iterate.u.clone(), iterate.h, iterate.v.clone(), iterate.target
    for _ in range(steps):
        if time.perf_counter() > until:
            break
        pu = project(u, basis)
        ru = torch.lerp(u, pu, 2.0)
        if head is None:
            x, evidence = h, ru.mul(2).sub_(h).mul_(h)
        else:
            ph = project(h, head)
            rh = torch.lerp(h, ph, 2.0)
            x, evidence = (ru + rh) / 2, ru * ru - (ru - rh) ** 2 / 2
        if partner is not None:
            pv = project(v, partner)
            rv = torch.lerp(v, pv, 2.0)
            evidence.addcmul_(rv, rv.abs(), value=weight)
        active = evidence > 0
        target = x * active
        u.add_(target, alpha=relaxation).sub_(pu, alpha=relaxation)
        if partner is not None:
            v.add_(rv * (active == (rv > 0)), alpha=relaxation).sub_(pv, alpha=relaxation)
            v.div_(v.norm(dim=1, keepdim=True).clamp_min_(TINY))
        if head is not None:
            h = h + relaxation * (torch.where(active, x, rh) - ph)
            scale = h.norm(dim=1, keepdim=True).clamp_min(TINY)
            u, h, target = u.div_(scale), h / scale, target / scale
    return Iterate(u, h, v, target)


def search_evened(
    iterate: Iterate,
    labels: Int[Tensor, " k"],
    basis: Float[Tensor, "m b"],
    *,
    steps: int,
    power: float = 0.35,
    until: float = math.inf,
) -> Iterate:
    """`search` with row j weighted by |h_j|^-power, class by class: in a crowded span, small h_j weigh too little.

    Without it, starts end at vectors that fit the large entries alone.
    """
    ends, order = [], []
    for label in labels.unique():
        index = (labels == label).nonzero()[:, 0]
        part = iterate[index]
        size = part.h[0].abs()
        weight = size.clamp_min(0.1 * size.median()) ** -power
        weight = weight / ((weight * part.h[0]).norm() / part.h[0].norm())
        scaled = Iterate(part.u * weight, part.h * weight, part.v, part.target * weight)
        end = search(scaled, torch.linalg.qr(weight[:, None] * basis)[0], steps=steps, until=until)
        ends.append(Iterate(end.u / weight, part.h, part.v, end.target / weight))
        order.append(index)
    back = torch.cat(order).argsort()
    return Iterate(*(torch.cat([getattr(e, f) for e in ends])[back] for f in ("u", "h", "v", "target")))


def misfit(target: Float[Tensor, "k m"], basis: Float[Tensor, "m b"]) -> Float[Tensor, " k"]:
    """Squared sine between each target and span(U); 1 for a target that vanished."""
    energy = target.pow(2).sum(1)
    return torch.where(energy > 1e-3, 1 - (target @ basis).pow(2).sum(1) / energy.clamp_min(TINY), 1.0)


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


def exact_step(spaces: Spaces, mask: Bool[Tensor, "k m"], *, rounds: int = 4) -> Exact:
    """For a fixed mask the best (t, d) is a generalised eigenpair: the smallest of (EᵀE - (UᵀE)ᵀ(UᵀE), EᵀE).

    Here E = D ∘ W_outᵀ Z, Z a basis of the possible d. The mask is renewed from the solution until it settles, at most
    `rounds` times. The largest entry of d, the label's, is negative.
    """
    heads = spaces.head_space
    for _ in range(rounds):
        gram, t_all = _normal_equations(spaces.basis, heads, mask)
        values, d = _smallest(gram, t_all)
        t = torch.einsum("kcb,kc->kb", t_all, d)
        u, h = t @ spaces.basis.T, d @ heads.T
        new = (2 * u - h) * h > 0
        settled = (new == mask).all(1)
        mask = new
        if settled.all():
            break
    d = d @ spaces.contrasts.T
    norm = t.norm(dim=1, keepdim=True).clamp_min(TINY) * _sign(d)[:, None]
    sines = values.clamp_min(0).sqrt()
    second = sines[:, 1] if sines.shape[1] > 1 else torch.ones_like(sines[:, 0])
    t, d = t / norm, d / norm
    return Exact(t, d, sines[:, 0], second, mask, settled, (t / spaces.singular).norm(dim=1))


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
    factor = torch.linalg.cholesky(gram + (1e-13 * ridge + TINY) * eye)
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

    `noise` is the size of the noise in the gradient, in its unit: the exact step accepts what that explains.
    """

    near: float = 0.03
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
    """Exact steps on every target near span(U); near misses go on from the h that the step found (second stage)."""
    basis, found = spaces.basis.to(iterate.u.dtype), Solved.none(spaces)
    for stage in range(rounds + 1):
        distance = misfit(iterate.target, basis)
        iterate, distance = iterate[distance < tolerances.near], distance[distance < tolerances.near]
        if not len(distance):
            break
        iterate = iterate[distinct(iterate.target != 0, distance)]
        exact = exact_step(spaces, iterate.target != 0)
        good = accepted(exact, tolerances)
        found = found.join(exact.solved(good), room=spaces.rank)
        again = ~good & (exact.sine < 0.3)
        if stage == rounds or not again.any():
            break
        iterate = iterate[again]
        h = normalise(exact.d[again] @ spaces.head).to(basis.dtype)
        h = h * torch.sign((h * iterate.h).sum(1, keepdim=True))
        iterate = search(replace(iterate, h=h), basis, steps=steps, head=head)
    return found


def settle(spaces: Spaces, mask: Bool[Tensor, "k m"], tolerances: Tolerances) -> Solved:
    """The directions that the exact step finds from candidate masks and accepts."""
    exact = exact_step(spaces, mask)
    return Solved.none(spaces).join(exact.solved(accepted(exact, tolerances)), room=spaces.rank)


def accepted(exact: Exact, tolerances: Tolerances) -> Bool[Tensor, " k"]:
    """A mask that settled, whose t fits to rounding, and no second t for the same mask (equal masks merge samples)."""
    limit = (10 * tolerances.noise * exact.lever).clamp(1e-7, 1e-3)
    apart = exact.second > tolerances.gap * exact.sine.clamp_min(1e-8)
    return exact.settled & (exact.sine < limit) & apart


def last_one(spaces: Spaces, free: Float[Tensor, "b r"], tolerances: Tolerances) -> Solved:
    """With one sample left, s is known up to its sign and factor, hence its mask."""
    z = spaces.lift @ free[:, 0]
    return settle(spaces, torch.stack([z > 0, z < 0]), tolerances)


def vertices(
    spaces: Spaces,
    activations: Float[Tensor, "b n"],
    free: Float[Tensor, "b r"],
    tolerances: Tolerances,
    *,
    tries: int,
    generator: Generator,
) -> Solved:
    """The last samples by linear programming: their y are degenerate vertices of {a : y = Vᵀ N a >= 0, sum y = 1}.

    `activations` is V without the bias column, `free` is N. A random objective picks a vertex; its zero entries are
    solved again for full precision.
    """
    cone = (activations.T @ free).cpu().numpy()
    masks = []
    for _ in range(tries):
        objective = torch.randn(free.shape[1], generator=generator, dtype=torch.float64).numpy()
        equality = {"A_eq": cone.sum(0)[None], "b_eq": [1.0]}
        answer = linprog(objective, A_ub=-cone, b_ub=np.zeros(len(cone)), **equality, bounds=(None, None))
        if answer.status == 0:
            masks.append(_vertex_mask(spaces, cone, free, answer.x))
    return settle(spaces, torch.stack(masks), tolerances) if masks else Solved.none(spaces)


def _vertex_mask(
    spaces: Spaces, cone: np.ndarray, free: Float[Tensor, "b r"], corner: np.ndarray
) -> Bool[Tensor, " m"]:
    y = cone @ corner
    zero = np.abs(y) < 1e-6 * np.abs(y).max()
    if zero.sum() >= cone.shape[1]:
        exact = np.linalg.svd(cone[zero], full_matrices=False)[2][-1]
        corner = exact * np.sign(exact @ corner)
    return spaces.lift @ (free @ torch.from_numpy(corner).to(free)) > 0
