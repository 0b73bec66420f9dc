"""Samples of unequal weight in the loss: what clipping leaves, or an average over clients of unequal size.

A sample of weight c and input x leaves c delta [x; 1]ᵀ in the first gradient: x -> a x, c -> c / a changes only the
bias column, and what that does to the softmax. So weights and inputs are told apart by the biases, and only by them.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from spear.chain import Problem, Targets, passes

AGREE = 1e-6  # relative difference at which a weight read at the top and one read from all biases are the same


def decode_weighted(
    problem: Problem, errors: Float[Tensor, "s outputs"], activated: Float[Tensor, "s outputs"], unit: float
) -> Targets:
    """One label and one weight for each sample: dLoss/dlogits is weight (a - e), and that fits a single label.

    The counts are weights in units of `unit`. The error is infinite where two labels fit or none, and where unequal
    weights cannot be told from something else. With two classes any dLoss/dlogits fits some weight, and two images
    whose masks are equal are one with their mean, exactly; so too, nearly, where a network is sure of all but two
    classes: hence each sample of a batch of known size must be there. And layers without a bias do not tell the
    scale of an input from its weight.
    """
    told = problem.batch_size == len(errors) and all(b is not None for b in problem.biases)
    if not told or problem.outputs < (3 if problem.loss == "cross_entropy" else 2):
        return Targets(errors.new_zeros(len(errors), problem.classes), unit, float("inf"), whole=False)
    labels = problem.one_hot(torch.arange(problem.classes, device=errors.device))
    own = activated[:, None] - labels
    weight = (own * errors[:, None]).sum(2) / own.pow(2).sum(2).clamp_min(1e-300)
    off = (errors[:, None] - weight[:, :, None] * own).norm(dim=2) / errors.norm(dim=1, keepdim=True).clamp_min(1e-300)
    off = torch.where(weight > 0, off, float("inf"))
    ranked, order = off.sort(dim=1)
    unique = ranked[:, 1] > 1e3 * ranked[:, 0].clamp_min(1e-9)
    best = order[:, :1]
    counts = torch.zeros_like(weight).scatter(1, best, weight.gather(1, best) / unit)
    error = torch.where(unique, ranked[:, 0], float("inf"))
    return Targets(counts, unit, float(error.max()), whole=False)


def bias_system(
    problem: Problem, deltas: tuple[Float[Tensor, "s _m"], ...] | list[Float[Tensor, "s _m"]]
) -> tuple[Float[Tensor, "s rows"], Float[Tensor, " rows"]]:
    """D and g of Dᵀ c = g, the bias gradients of all layers side by side: g_l = sum of c_i delta_{l,i}."""
    pairs = [(d, g) for d, g in zip(deltas, problem.bias_gradients, strict=True) if g is not None]
    return torch.cat([d for d, _ in pairs], 1), torch.cat([g for _, g in pairs])


def reweighed(problem: Problem, inputs: Float[Tensor, "s n"], targets: Targets) -> Targets:
    """Weights anew, by least squares on the bias gradients of all layers: (sum D_l D_lᵀ) c = sum D_l dL/dbeta_l.

    Weights that do not agree with the old ones, or are not positive, make the error infinite.
    """
    single = (targets.counts > 0).to(inputs)
    D, g = bias_system(problem, passes(problem, inputs, Targets(single, targets.unit, 0.0)).deltas)
    if not bool(D.isfinite().all()):
        return replace(targets, error=float("inf"))
    copies = torch.linalg.lstsq(D.T, g[:, None]).solution[:, 0]
    limit = AGREE if problem.precision < 1e-12 else 1e-2
    agree = (copies > 0) & ((copies / targets.copies - 1).abs() < limit)
    error = targets.error if bool(agree.all()) else float("inf")
    return replace(targets, counts=single * copies[:, None], error=error)
