"""What samples behind BatchNorm that were solved with one wrong a have in common: (t, s, d) off by (λ, τ, ς).

The right ones are (λ t + τ, λ s + ς, λ d). Newton's steps on ⟨s_k, S⁻¹ t_i⟩ = [k = i] - 1/b and on the forward pass,
d_i = p(y_i) - onehot, tell λ and ς from few samples, and τ as far as these feel it, of least norm.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from spear.federated import losses
from spear.normalisation.batch_search import BatchSearch
from spear.normalisation.spaces import Found

NEWTON, RIDGE = 20, 1e-10  # steps, and their ridge, of the mean diagonal


def common_shift(run: BatchSearch, found: Found) -> tuple[Float[Tensor, ""], Float[Tensor, " r"], Float[Tensor, " r"]]:
    """λ, τ and ς."""
    r, root = found.t.shape[1], run.spaces.singular.sqrt()
    t, s = found.t / root, found.s / root
    x = torch.zeros(2 * r + 1).to(t)
    x[0] = ((1 - 1 / run.spaces.batch) / (s * t).sum(1)).clamp_min(0).median().sqrt()
    for _ in range(NEWTON):
        pairs, to_pairs = _pairs(run, x, t, s)
        errors, to_errors = _errors(run, x, s, found.d)
        off, J = torch.cat([pairs, errors]), torch.cat([to_pairs, to_errors])
        gram = J.mT @ J
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(x)).to(x)
        x = x - torch.linalg.solve(gram + ridge, J.mT @ off)
    return x[0], root * x[1 : r + 1], root * x[r + 1 :]


def _pairs(
    run: BatchSearch, x: Float[Tensor, " u"], t: Float[Tensor, "f r"], s: Float[Tensor, "f r"]
) -> tuple[Float[Tensor, " f2"], Float[Tensor, "f2 u"]]:
    """How far ⟨s_k, S⁻¹ t_i⟩ is off for x = (λ, τ, ς), and the derivative; t, s, τ and ς over √S."""
    f, r = t.shape
    turned, placed = x[0] * t + x[1 : r + 1], x[0] * s + x[r + 1 :]
    off = placed @ turned.mT - torch.eye(f).to(t) + 1 / run.spaces.batch
    by_scale = s @ turned.mT + placed @ t.mT
    by_shifts = placed[:, None].expand(f, f, r), turned.expand(f, f, r)
    return off.flatten(), torch.cat([by_scale[:, :, None], *by_shifts], 2).flatten(0, 1)


def _errors(
    run: BatchSearch, x: Float[Tensor, " u"], s: Float[Tensor, "f r"], d: Float[Tensor, "f c"]
) -> tuple[Float[Tensor, " fc"], Float[Tensor, "fc u"]]:
    """How far λ d is from that of the forward pass, and the derivative."""
    r, problem, spaces = s.shape[1], run.problem, run.spaces
    place = spaces.scale[:, None] * spaces.place * spaces.singular.sqrt()
    y = spaces.shift + (x[0] * s + x[r + 1 :]) @ place.mT
    logits = y.clamp_min(0) @ run.head.mT + run.bias
    outputs = problem.activate(logits)
    wanted = outputs - x[0] * d @ run.contrasts.mT
    labels = (wanted[:, 0] > 0.5).long() if problem.outputs == 1 else wanted.argmax(1)
    off = (outputs - problem.one_hot(labels)) @ run.contrasts - x[0] * d
    by_shift = torch.einsum("cm,fm,mr->frc", run.head, (y > 0).to(y), place)
    by_scale = (by_shift * s[:, :, None]).sum(1, keepdim=True)
    along = torch.cat([by_scale, torch.zeros_like(by_shift), by_shift], 1)
    bent = losses.activate_along(problem.loss, logits.repeat_interleave(len(x), 0), along.flatten(0, 1))
    J = (bent @ run.contrasts).unflatten(0, along.shape[:2])
    J[:, 0] -= d
    return off.flatten(), J.mT.flatten(0, 1)
