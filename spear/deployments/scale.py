"""A factor that is common to a noisy update: clipping of the whole, a rate or a scale that was not told, the sign.

Where samples lie is found without it. Held against what the update says of them, each then shows it for itself; the
bias gradients of all layers, together, tell it best: for them alone the length of an input does not matter.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spear.deployments.likelihood import Estimate, Noisy, measure, refine
from spear.network.labels import bias_system
from spear.network.problem import Targets, passes
from spear.network.projection import each_class

OTHER = 0.35  # relative difference of the weight that samples show and the one expected, from which it is another
ALIKE = 0.2  # median relative difference of the weights that samples show, up to which they are one
SETTLED, ROUNDS = 1e-6, 4  # a relative change of the weight that ends its estimate, and how often it is made


def shown(noisy: Noisy, inputs: Float[Tensor, "s n"]) -> Noisy:
    """The problem with the weight that the samples show, where that is common and another than expected.

    Where the weight is negative, the signs of all gradients are changed: they are those of after - before.
    """
    if noisy.weight is None or not len(inputs):
        return noisy
    seen, _ = measure(noisy.problem, 0, noisy.problem.augmented(0), inputs)
    own = torch.stack(list(each_class(noisy.problem, inputs)))
    cosine, ratio = F.cosine_similarity(seen, own, dim=2), (seen * own).sum(2) / own.pow(2).sum(2).clamp_min(1e-300)
    best = max((1, -1), key=lambda sign: float((sign * cosine).amax(0).median()))
    weights = best * ratio.gather(0, (best * cosine).argmax(0, keepdim=True))[0]
    weight = float(weights.median())
    if not weight > 0 or float((weights / weight - 1).abs().median()) > ALIKE:
        return noisy
    turned = noisy if best > 0 else _turned(noisy)
    return turned if abs(weight / noisy.weight - 1) < OTHER else replace(turned, weight=weight, most=weight)


def _turned(noisy: Noisy) -> Noisy:
    """The same with the other sign of every gradient."""
    problem = noisy.problem
    weights = tuple(-g for g in problem.weight_gradients)
    biases = tuple(None if g is None else -g for g in problem.bias_gradients)
    lows = tuple(replace(low, R=-low.R) for low in noisy.lows)
    turned = replace(problem, weight_gradients=weights, bias_gradients=biases)
    return replace(noisy, problem=turned, lows=lows, turned=not noisy.turned)


def settled(noisy: Noisy, estimate: Estimate) -> tuple[Noisy, Estimate]:
    """Weight and samples in turn, where the weight is not the one that was expected; its error is the inputs' too."""
    if noisy.weight is None or noisy.weight == noisy.expected:
        return noisy, estimate
    for _ in range(ROUNDS):
        weight, error = _common(noisy, estimate)
        moved = abs(weight / noisy.weight - 1)
        noisy = replace(noisy, weight=weight, most=weight)
        estimate = refine(noisy, estimate.inputs, estimate.labels)
        if moved < SETTLED:
            break
    return noisy, replace(estimate, error=torch.hypot(estimate.error, torch.full_like(estimate.error, error)))


def _common(noisy: Noisy, estimate: Estimate) -> tuple[float, float]:
    """The weight by least squares on the bias gradients of all layers, and its relative error."""
    counts = F.one_hot(estimate.labels, noisy.problem.classes).to(estimate.inputs)
    D, g = bias_system(noisy.problem, passes(noisy.problem, estimate.inputs, Targets(counts, 1.0, 0.0)).deltas)
    whole = D.sum(0)
    weight = float(whole @ g / (whole @ whole))
    return weight, noisy.sigmas[0] / (float(whole.norm()) * abs(weight))


def words(told: Noisy, seen: Noisy) -> str:
    """What the update is a multiple of, where that is not the mean, or sum, of its samples."""
    what = told.problem.reduction
    if seen.weight is None or (seen.weight == told.weight and not seen.turned):
        return ""
    if seen.weight == told.weight:
        return f"; the update has the opposite sign of their {what}: that of after - before"
    return f"; the update is {(-1) ** seen.turned * seen.weight / told.weight:.4g} times their {what}"
