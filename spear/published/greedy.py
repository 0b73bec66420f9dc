"""From candidates to the batch: a basis chosen greedily, the scales, the disaggregation, the matching coefficient.

Directions are rows here: `q` (h, b) holds h candidates for columns of the disaggregation matrix Q, each up to a factor.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.published import filtering, kernels
from spear.published.filtering import gram, merge, zero_rows
from spear.published.view import Observed

CHUNK = 256  # alternatives that are inverted at once


@dataclass(frozen=True)
class Candidates:
    """What a search ended with: candidate directions `q` (h, b), a `basis` among them (b,), lambda and the cost."""

    q: Float[Tensor, "h b"]
    basis: Int[Tensor, " k"]
    matching: float
    proposals: int
    rounds: int
    spent: str


def choose(
    observed: Observed, q: Float[Tensor, "h b"], threshold: int, *, last: int = 2
) -> tuple[Float[Tensor, "j b"], Int[Tensor, " k"], float]:
    """Candidates, the best basis among them and its lambda (0 while they do not span): both greedy stages.

    The `last` columns, one or two, are not searched but solved for, and join the candidates. The very last has the
    signs of its pre-activations to determine it, where its zeros alone may not: it need only complete the pattern.
    """
    basis = _greedy(observed, q)
    b = observed.L.shape[1]
    if b - last <= len(basis) < b:
        solved = kernels.refine(observed.L, last_columns(observed, q[basis]), tolerance=observed.tolerance)
        whole = torch.cat([q[basis], solved])
        if len(whole) == b and matching_coefficient(observed, whole) == 1:
            return whole, torch.arange(b, device=q.device), 1.0
        q = merge(observed, q, solved, threshold)
        basis = _greedy(observed, q)
    if len(basis) < b:
        return q, basis, 0.0
    basis, matching = second_stage(observed, q, basis)
    return q, basis, matching


def _greedy(observed: Observed, q: Float[Tensor, "h b"]) -> Int[Tensor, " k"]:
    zeros = filtering.zero_rows(observed.L, q, tolerance=observed.tolerance).sum(1)
    return greedy_basis(q, zeros)


def greedy_basis(q: Float[Tensor, "h b"], zeros: Int[Tensor, " h"]) -> Int[Tensor, " k"]:
    """Indices of a basis: directions by decreasing number of zeros, each taken if independent of those before it.

    k = b where the candidates span R^b, less otherwise (SPEAR, the first greedy stage).
    """
    rest, chosen = q.cpu().clone(), []  # a choice at a time: on the host
    for index in zeros.argsort(descending=True, stable=True).tolist():
        norm = torch.linalg.vector_norm(rest[index])
        if norm > 1e-6 and len(chosen) < q.shape[1]:
            unit = rest[index] / norm
            for _ in range(2):  # twice is enough, for orthogonality to rounding
                rest = rest - (rest @ unit)[:, None] * unit
            chosen.append(index)
    return torch.tensor(chosen, dtype=torch.long, device=q.device)


def recover_scales(observed: Observed, q: Float[Tensor, "b b"]) -> Float[Tensor, " b"]:
    """The factors c of the columns, Q = Qbar diag(c), from the bias gradient (SPEAR, recovering the scales).

    As dL/dbeta = G 1 and G = L Qbar diag(c), Qbar c = d. Without a bias the factors are those that give the columns of
    X unit length, with the sign under which Z > 0 agrees better with the zero pattern of G. NaN for dependent columns.
    """
    V, failed = torch.linalg.inv_ex(q)
    V = torch.where(failed == 0, V, torch.nan)
    if observed.d is not None:
        return V.mT @ observed.d
    active = ~zero_rows(observed.L, q, tolerance=observed.tolerance).mT
    agreement = ((observed.B @ V > 0) == active).to(q.dtype).mean(0)
    return torch.linalg.vector_norm(observed.R.mT @ V, dim=0) * torch.where(agreement < 0.5, -1, 1)


def disaggregate(observed: Observed, q: Float[Tensor, "b b"]) -> tuple[Float[Tensor, "m b"], Float[Tensor, "n b"]]:
    """G = L Q and X with X^T = Q^-1 R, from the directions of all columns (SPEAR, disaggregation)."""
    Q = q.mT * recover_scales(observed, q)
    return observed.L @ Q, torch.linalg.solve_ex(Q, observed.R)[0].mT


def matching_coefficient(observed: Observed, q: Float[Tensor, "*p b b"]) -> Float[Tensor, "*p"]:
    """lambda: the share of the m b entries in which Z > 0 agrees with G != 0; 1 at the truth (SPEAR).

    An entry of Z that rounding leaves without a sign agrees with both.
    Leading dimensions of `q` are alternatives, compared in one batch; a singular set of directions counts as 0.
    """
    V = torch.linalg.inv_ex(q)[0].nan_to_num(0, 0, 0)
    active = ~zero_rows(observed.L, q.flatten(0, -2), tolerance=observed.tolerance).unflatten(0, q.shape[:-1]).mT
    if observed.d is None:
        agreement = ((observed.B @ V > 0) == active).to(q.dtype).mean(-2)
        return torch.maximum(agreement, 1 - agreement).mean(-1)
    Z = observed.B @ V * torch.sign(observed.d @ V)[..., None, :]
    agree = (Z > 0) == active
    if observed.blur:
        agree |= Z.abs() <= observed.blur * Z.abs().amax(-2, keepdim=True)
    return agree.to(q.dtype).mean((-2, -1))


def second_stage(
    observed: Observed, q: Float[Tensor, "h b"], basis: Int[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], float]:
    """Swap single directions of a basis against unused candidates while lambda grows (SPEAR, the second greedy stage).

    Returns the indices of the best set and its lambda; stops at lambda = 1. Each sweep tries all b (h - b) swaps in
    batches.
    """
    best = float(matching_coefficient(observed, q[basis]))
    while best < 1 and len(q) > len(basis):
        trials = _swaps(basis, len(q))
        value = torch.cat([matching_coefficient(observed, q[part]) for part in trials.split(CHUNK)])
        if float(value.max()) <= best:
            break
        basis, best = trials[value.argmax()], float(value.max())
    return basis, best


def _swaps(basis: Int[Tensor, " b"], count: int) -> Int[Tensor, "s b"]:
    """The basis with one of its b indices replaced by one of the other `count` - b, in every way."""
    index = torch.arange(count, device=basis.device)
    unused = index[~torch.isin(index, basis)]
    place, other = torch.meshgrid(index[: len(basis)], unused, indexing="ij")
    trials = basis.repeat(place.numel(), 1)
    return trials.scatter(1, place.reshape(-1, 1), other.reshape(-1, 1))


def last_columns(observed: Observed, q: Float[Tensor, "f b"]) -> Float[Tensor, "k b"]:
    """The last one or two columns of Q, without sampling: q holds the b-1 or b-2 others.

    The columns of V = Q^-T that are missing are orthogonal to every q that is known. With one missing it is that
    direction; with two, v = N w turns in a plane, and the signs of z = B v change at no more than 2m angles. Each sign
    pattern tells which rows of G are zero, and so its kernel: those that have one are returned (unit rows), to be
    filtered like any other candidate.
    """
    N = torch.linalg.qr(q.mT, mode="complete")[0][:, len(q) :]
    w = q.new_tensor([[1.0], [-1.0]]) if N.shape[1] == 1 else _directions(observed.B @ N)
    v = w @ N.mT
    if observed.d is not None:
        v = v[v @ observed.d > 0]
    kept = [_kernels(observed, part @ observed.B.mT <= 0) for part in v.split(CHUNK)]
    return torch.cat(kept)


def _directions(C: Float[Tensor, "m 2"]) -> Float[Tensor, "k 2"]:
    """One unit vector w inside each of the arcs of the circle on which the signs of C w are constant."""
    turn = torch.atan2(-C[:, 0], C[:, 1]).remainder(math.pi).sort().values
    turn = torch.cat([turn, turn + math.pi])
    middle = (turn + torch.cat([turn[1:], turn[:1] + 2 * math.pi])) / 2
    return torch.stack([middle.cos(), middle.sin()], 1)


def _kernels(observed: Observed, zero: Bool[Tensor, "k m"]) -> Float[Tensor, "h b"]:
    """The kernel vectors of the rows of L that are set in `zero`, for the sets that have a kernel."""
    values, vectors = torch.linalg.eigh(gram(observed.L, zero))  # of all rows: the identity
    return vectors[values[:, 0] <= max(1e-12, observed.tolerance**2)][:, :, 0]
