"""The sign of a noisy update, and how it is said what the update is a multiple of.

Where samples lie is found without it. Held against what the update says of them, each has the direction of its own
back-propagated vector, or the opposite one: the update is then after - before.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spear.deployments.likelihood import Estimate, Noisy, measure
from spear.network.projection import each_class

CLEARLY = 0.02  # relative difference of a weight from the one that was told, from which it is another


def turned_to(noisy: Noisy, inputs: Float[Tensor, "s n"]) -> Noisy:
    """The problem with the sign of all gradients under which samples point where their own gradients do."""
    if not len(inputs):
        return noisy
    seen, _ = measure(noisy.problem, 0, noisy.problem.augmented(0), inputs)
    cosine = torch.stack([F.cosine_similarity(seen, own) for own in each_class(noisy.problem, inputs)])
    return _turned(noisy) if float((-cosine).amax(0).median()) > float(cosine.amax(0).median()) else noisy


def _turned(noisy: Noisy) -> Noisy:
    problem = noisy.problem
    weights = tuple(-g for g in problem.weight_gradients)
    biases = tuple(None if g is None else -g for g in problem.bias_gradients)
    lows = tuple(replace(low, R=-low.R) for low in noisy.lows)
    problem = replace(problem, weight_gradients=weights, bias_gradients=biases)
    return replace(noisy, problem=problem, lows=lows, turned=not noisy.turned)


def multiple(noisy: Noisy, estimate: Estimate | None) -> str:
    """What the update is a multiple of, where that is not the mean, or sum, of its samples; in words."""
    problem = noisy.problem
    if noisy.weight is None or estimate is None:
        return ""
    factor = noisy.weight / problem.unit(problem.batch_size or noisy.rank)
    if abs(factor - 1) < CLEARLY:
        return f"; the update has the opposite sign of their {problem.reduction}: that of after - before" * noisy.turned
    return f"; the update is {-factor if noisy.turned else factor:.4g} times their {problem.reduction}"
