"""What ReLU leaves behind: the zero pattern of G, firing rates of real networks, and the filter's threshold.

Symbols: Z = W X + beta 1^T (m x b) are the pre-activations of a layer of width m on a batch of b samples, D = 1[Z > 0]
its mask, G = dL/dZ (m x b). G vanishes wherever D does (SPEAR, section on ReLU-induced sparsity).
"""

from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are first used
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spear.directions import zero_entries
from spear.models.watching import linear_layer, watched

FALSE_REJECTION = 1e-9  # chance at which the filter may reject a true direction: never in a life of attacks


@dataclass(frozen=True)
class FiringRates:
    """How often a layer's neurons fire: shares of samples (`per_neuron`) and of neurons (`per_sample`), in 0 to 1."""

    per_neuron: Float[Tensor, " m"]
    per_sample: Float[Tensor, " b"]


def zero_pattern(G: Float[Tensor, "*batch m b"], *, tolerance: float) -> Bool[Tensor, "*batch m b"]:
    """True where an entry of G is zero: at most `tolerance` times the largest magnitude in its column.

    A column of zeros is all True. Raises `ValueError` unless 0 <= tolerance < 1.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"a tolerance relative to the column's largest entry lies in [0, 1), not {tolerance}")
    return zero_entries(G, tolerance, dim=-2)


def zero_counts(G: Float[Tensor, "*batch m b"], *, tolerance: float) -> Int[Tensor, "*batch b"]:
    """zeta_i: the number of zeros in each column of G. `tolerance` and errors as in `zero_pattern`."""
    return zero_pattern(G, tolerance=tolerance).sum(-2)


def activation_mask(model: nn.Module, layer: str, inputs: Float[Tensor, "b *input_shape"]) -> Bool[Tensor, "m b"]:
    """The mask D = 1[Z > 0] of the linear layer named `layer`, one column per sample, read by a forward hook.

    Raises `ValueError` for a name that is not a linear layer of the model, and for a layer that the forward pass does
    not use exactly once on one vector per sample.
    """
    with torch.no_grad(), watched(linear_layer(model, layer)) as seen:
        model(inputs)
    if len(seen) != 1 or seen[0][1].ndim != 2:
        raise ValueError(f"the model uses {layer!r} {len(seen)} times; a mask needs one use, one vector per sample")
    return (seen[0][1] > 0).T


def firing_rates(model: nn.Module, layer: str, inputs: Float[Tensor, "b *input_shape"]) -> FiringRates:
    """The firing rates of a linear layer on `inputs`, per neuron and per sample. Raises as `activation_mask` does."""
    D = activation_mask(model, layer, inputs).double()
    return FiringRates(per_neuron=D.mean(1), per_sample=D.mean(0))


def threshold(width: int, *, false_rejection: float = FALSE_REJECTION, zero_rate: float = 0.5) -> int:
    """The sparsity filter's threshold: the largest t with P(Bin(width, zero_rate) < t) <= false_rejection.

    A true direction q_i, whose column of G has zeros at rate `zero_rate` independently, has fewer than t zeros with
    probability at most `false_rejection` (SPEAR, sparsity filtering). With symmetric random weights, and that is how
    networks are initialised, the zeros of one sample are Bin(width, 1/2) exactly, whatever the data.

    Raises `ValueError` for a width under 1 or a rate outside its range.
    """
    if width < 1:
        raise ValueError(f"a layer has a width of at least 1, not {width}")
    _check_rate("zero rate", zero_rate)
    return _largest(scipy.stats.binom.pmf(np.arange(width + 1), width, zero_rate), false_rejection)


def threshold_from_rates(rates: Float[Tensor, " m"], *, false_rejection: float = FALSE_REJECTION) -> int:
    """The threshold where neuron j fires at its own rate, independently of the others: a Poisson-binomial tail.

    `rates` are firing rates per neuron. Neurons of a trained network depend on one another, and there this threshold
    is too high: use `threshold_from_counts`. Raises `ValueError` for no rates or a rate outside [0, 1].
    """
    if rates.numel() == 0 or bool(((rates < 0) | (rates > 1) | rates.isnan()).any()):
        raise ValueError("firing rates per neuron are numbers in [0, 1], at least one")
    pmf = np.ones(1)
    for fire in rates.double().tolist():  # add one neuron: every term is positive, so the far tail keeps its digits
        pmf = np.append(pmf * fire, 0.0) + np.append(0.0, pmf * (1 - fire))
    return _largest(pmf, false_rejection)


def threshold_from_counts(
    counts: Int[Tensor, " samples"], width: int, *, false_rejection: float = FALSE_REJECTION
) -> int:
    """The threshold for zeros per sample as counted on other data of the same kind, however neurons depend.

    Fits a beta-binomial by the mean and variance of `counts` (zeros of the layer, one number per sample), or a binomial
    of the same mean where the counts vary no more than that. Raises `ValueError` for fewer than two counts, or counts
    outside 0 to `width`.
    """
    if len(counts) < 2 or int(counts.min()) < 0 or int(counts.max()) > width:
        raise ValueError(f"need at least two counts between 0 and the width {width}")
    mean, variance = float(counts.double().mean()), float(counts.double().var())
    rate = mean / width
    binomial = width * rate * (1 - rate)
    if variance <= binomial or binomial == 0:
        return threshold(width, false_rejection=false_rejection, zero_rate=rate)
    # variance = binomial * (1 + (width - 1) rho), rho = 1 / (a + b + 1), rate = a / (a + b)
    rho = min((variance / binomial - 1) / (width - 1), 1 - 1e-9)
    total = 1 / rho - 1
    pmf = scipy.stats.betabinom.pmf(np.arange(width + 1), width, rate * total, (1 - rate) * total)
    return _largest(pmf, false_rejection)


def _largest(pmf: np.ndarray, false_rejection: float) -> int:
    """The largest t <= m with P(N < t) <= false_rejection, for a law of N on 0 to m."""
    _check_rate("false-rejection rate", false_rejection)
    below = np.cumsum(pmf[:-1]).clip(max=1)  # below[t - 1] = P(N < t), which rounding may push past 1
    with_ties = false_rejection * (1 + 1e-12)  # which rounding of the sums would break
    return int(np.searchsorted(below, with_ties, side="right"))


def _check_rate(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"a {name} lies in [0, 1], not {value}")
