"""Samples from a noisy gradient by maximum likelihood: least squares for the inputs, log-odds for the activations.

The first gradient is T^T X + noise, T the samples' back-propagated vectors times their weights in the loss. Given T the
inputs are a least-squares problem; but T depends on which hidden units are active, and near zero the inputs do not
tell. So each unit of each sample is decided by the sum of two log-likelihood ratios: its pre-activation, known up to
the inputs' present error, and its own gradient, measured in the update of its layer. Samples are rows.
"""

import math
import time
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.network.labels import bias_system
from spear.network.problem import NetworkView, Targets, forward, passes
from spear.published.lowrank import LowRank

RIDGE = 1e-12  # of the mean diagonal of normal equations: two samples of equal masks must not make them singular
SETTLED = 1e-9  # a round that moves inputs by less, relative to them, is the last
DOUBT = 0.3  # of what a round moved an input: the error that it is thought to have left
EVEN = 0.1  # of the mean: what a row's variance counts for at least, as it is only estimated
WEIGHTINGS = 3  # rounds of least squares and the rows' variances
GUESSED = 3  # times the error that the noise alone would leave: of inputs that projections found
FARTHEST = 30  # spreads from zero at which a unit's state is certain: more says no more
LIGHTEST = 0.02  # of the largest weight: what a sample weighs at least, once it was found


@dataclass(frozen=True)
class Noisy:
    """A problem whose gradients carry noise: `sigmas[k]` per entry of hidden layer k's gradient, factorised at `lows`.

    `weight` is the weight of every sample in the loss, or `None` where each sample has its own, at most `most`.
    `turned`: all gradients came with the other sign.
    """

    problem: NetworkView
    lows: tuple[LowRank, ...]
    sigmas: tuple[float, ...]
    weight: float | None
    most: float
    turned: bool = False

    @property
    def rank(self) -> int:
        """How many samples stand out of the noise."""
        return self.lows[0].rank


@dataclass(frozen=True)
class Estimate:
    """Samples as far as the noise lets them be known.

    `inputs` (s, n), `labels` (s,), `weights` (s,) in the loss; `deltas` (s, m) the first layer's back-propagated
    vectors, weights included; `error` (s,) the expected error of each input relative to its norm; `fit` the residual's
    RMS in units of the noise, which `expected_fit` = sqrt(1 - r/m) predicts; `measured` (s, m) are the vectors of
    `deltas` as the update itself has them.
    """

    inputs: Float[Tensor, "s n"]
    labels: Int[Tensor, " s"]
    weights: Float[Tensor, " s"]
    deltas: Float[Tensor, "s m"]
    error: Float[Tensor, " s"]
    measured: Float[Tensor, "s m"]
    fit: float
    expected_fit: float

    def only(self, good: Bool[Tensor, " s"]) -> "Estimate":
        """The samples that are `good`."""
        each = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x[good] for name, x in each.items() if isinstance(x, Tensor)})

    @property
    def misfit(self) -> float:
        """How many times larger the residual is than that of a right answer."""
        return self.fit / self.expected_fit

    @property
    def scale(self) -> Float[Tensor, " s"]:
        """How many times larger each measured vector is, along the sample's own, than that."""
        return (self.measured * self.deltas).sum(1) / self.deltas.pow(2).sum(1)

    @property
    def residuals(self) -> Float[Tensor, " s"]:
        """The relative distance of each sample's measured vector to its own."""
        return (self.measured - self.deltas).norm(dim=1) / self.deltas.norm(dim=1)


def refine(
    noisy: Noisy, inputs: Float[Tensor, "s n"], labels: Int[Tensor, " s"], *, rounds: int = 15, until: float = math.inf
) -> Estimate:
    """Alternate between T and the inputs until they settle, or the clock shows `until`; the round with the smallest
    residual counts."""
    n, spread, best = inputs.shape[1], None, None
    weights = sample_weights(noisy, inputs, _plain(noisy.problem, inputs, labels))
    for _ in range(rounds):
        parts = explained(noisy, inputs, labels, weights)
        deltas = _backward(noisy, parts, inputs, labels, weights, spread)
        weights = sample_weights(noisy, inputs, deltas)
        T = deltas[0] * weights[:, None]
        inverse = torch.linalg.pinv(T.T)
        fitted = inverse @ parts[0]
        size = float((parts[0] - T.T @ fitted).norm())
        if best is None or size < best[0] or noisy.weight is None:
            best = (size, deltas, weights, parts)
        new = fitted[:, :n]
        moved = (new - inputs).norm(dim=1)
        spread = torch.maximum(noisy.sigmas[0] * inverse.norm(dim=1), DOUBT * moved / n**0.5)
        inputs = new
        if bool((moved < SETTLED * new.norm(dim=1)).all()) or time.monotonic() > until:
            break
    settled = moved / inputs.norm(dim=1)
    return _conclude(noisy, labels, *best[1:], settled)


def _conclude(
    noisy: Noisy,
    labels: Int[Tensor, " s"],
    deltas: list[Float[Tensor, "s _m"]],
    weights: Float[Tensor, " s"],
    parts: list[Float[Tensor, "_m _n"]],
    settled: Float[Tensor, " s"],
) -> Estimate:
    """The inputs by least squares with each row weighted by its own noise, and the error that this leaves.

    Rounding makes noise that differs from row to row, so the rows' variances are those of the residual. To the error
    that noise makes comes `settled`, how far the last round still moved each input.
    """
    J, T = parts[0], deltas[0] * weights[:, None]
    n, share = noisy.problem.weights[0].shape[1], 1 - noisy.rank / T.shape[1]
    variance = torch.ones_like(T[0])
    for _ in range(WEIGHTINGS):
        weighting = variance.rsqrt()
        inverse = torch.linalg.pinv(T.T * weighting[:, None]) * weighting
        fitted = inverse @ J
        rest = J - T.T @ fitted
        seen = rest.pow(2).mean(1) / share
        variance = seen.clamp_min(EVEN * float(seen.mean())).clamp_min(1e-300)
    inputs = fitted[:, :n]
    each = (inverse.pow(2) * seen).sum(1).sqrt() * n**0.5 / inputs.norm(dim=1)
    measured = measure(noisy.problem, 0, J, inputs)[0]
    fit = float(rest.norm()) / J.numel() ** 0.5 / noisy.sigmas[0]
    error = torch.hypot(torch.hypot(each, weight_error(noisy, deltas, weights)), settled)
    return Estimate(inputs, labels, weights, T, error, measured, fit, share**0.5)


def explained(
    noisy: Noisy, inputs: Float[Tensor, "s n"], labels: Int[Tensor, " s"], weights: Float[Tensor, " s"]
) -> list[Float[Tensor, "_m _n"]]:
    """Every hidden layer's gradient less what samples that were not found add to it.

    What s of r samples leave of a gradient's r directions is, but for noise, of rank r - s: its strongest part is
    taken out.
    """
    problem, missing = noisy.problem, noisy.rank - len(inputs)
    gradients = [problem.augmented(k) for k in range(problem.last + 1)]
    if missing <= 0:
        return gradients
    run = passes(problem, inputs, Targets(F.one_hot(labels, problem.classes).to(inputs), 1.0, 0.0))
    parts = []
    for k, (J, low) in enumerate(zip(gradients, noisy.lows, strict=True)):
        own = (run.deltas[k] * weights[:, None] @ low.L).T @ problem.extend(k, run.inputs[k])
        U, s, V = torch.linalg.svd(low.R - own, full_matrices=False)
        parts.append(J - low.L @ (U[:, :missing] * s[:missing]) @ V[:missing])
    return parts


def measure(
    problem: NetworkView, k: int, J: Float[Tensor, "m n1"], states: Float[Tensor, "s n"]
) -> tuple[Float[Tensor, "s m"], Float[Tensor, " s"]]:
    """The samples' back-propagated vectors at layer k, weights included, as its gradient J has them: (H^T)^+ J^T.

    With them, the error of their entries in units of the gradient's noise.
    """
    inverse = torch.linalg.pinv(problem.extend(k, states).T)
    return inverse @ J.T, inverse.norm(dim=1)


def _backward(
    noisy: Noisy,
    parts: list[Float[Tensor, "_m _n"]],
    inputs: Float[Tensor, "s n"],
    labels: Int[Tensor, " s"],
    weights: Float[Tensor, " s"],
    spread: Float[Tensor, " s"] | None,
) -> list[Float[Tensor, "s _m"]]:
    """Back-propagated vectors of every layer, every hidden unit's activation decided by log-odds, top layer first.

    `spread` (s,) is the inputs' present error per entry.
    """
    problem = noisy.problem
    states, logits = forward(problem, inputs)
    before = [problem.apply(k, states[k]) for k in range(problem.last + 1)]
    if spread is None:
        spread = GUESSED * noisy.sigmas[0] / (_plain(problem, inputs, labels)[0].norm(dim=1) * weights)
    spreads = [spread[:, None] * problem.weights[0].norm(dim=1)]
    for k in range(1, problem.last + 1):
        below = spreads[-1].pow(2).mean(1, keepdim=True).sqrt()
        spreads.append(below * 0.5**0.5 * problem.weights[k].norm(dim=1))
    deltas = [problem.activate(logits) - problem.one_hot(labels)]
    for k in range(problem.last, -1, -1):
        active = deltas[0] @ problem.weights[k + 1]
        seen, size = measure(problem, k, parts[k], states[k])
        seen = seen / weights[:, None]
        doubt = 2 * noisy.sigmas[k] * size / weights  # twice the noise: the states are estimates too
        z = (before[k] / spreads[k].clamp_min(1e-300)).clamp(-FARTHEST, FARTHEST)
        prior = torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)
        gain = (seen.pow(2) - (seen - active).pow(2)) / (2 * doubt[:, None].pow(2)).clamp_min(1e-300)
        deltas.insert(0, active * (prior + gain > 0))
    return deltas


def _plain(
    problem: NetworkView, inputs: Float[Tensor, "s n"], labels: Int[Tensor, " s"]
) -> list[Float[Tensor, "s _m"]]:
    counts = F.one_hot(labels, problem.classes).to(inputs)
    return list(passes(problem, inputs, Targets(counts, 1.0, 0.0)).deltas)


def sample_weights(
    noisy: Noisy, inputs: Float[Tensor, "s n"], deltas: list[Float[Tensor, "s _m"]]
) -> Float[Tensor, " s"]:
    """The samples' weights in the loss: the common one, or least squares on the bias gradients of all layers.

    Weights and biases are needed together: x -> a x, c -> c / a leaves the weights' gradient of the first layer as it
    is, only the bias gradients, sum of c_i delta_i in every layer, tell. While samples are missing from that sum, the
    size of each measured vector has to do: it keeps the inputs at the scale that they came with.
    """
    if noisy.weight is not None:
        return inputs.new_full((len(inputs),), noisy.weight)
    if len(inputs) < noisy.rank:
        seen, _ = measure(noisy.problem, 0, noisy.problem.augmented(0), inputs)
        weights = (seen * deltas[0]).sum(1) / deltas[0].pow(2).sum(1)
    else:
        gram, right = _normal_equations(noisy.problem, deltas)
        weights = torch.linalg.solve(gram, right)
    return weights.clamp(LIGHTEST * noisy.most, noisy.most)


def common_weight(noisy: Noisy, inputs: Float[Tensor, "s n"], labels: Int[Tensor, " s"]) -> tuple[float, float]:
    """By what factor all samples weigh more than `noisy.weight`, by least squares on all bias gradients; its error."""
    deltas = _plain(noisy.problem, inputs, labels)
    D, g = bias_system(noisy.problem, [noisy.weight * d for d in deltas])
    whole = D.sum(0)
    size = whole.square().sum()
    factor = whole @ g / size
    return float(factor), float(((g - factor * whole) * whole).norm() / size)


def weight_error(
    noisy: Noisy, deltas: list[Float[Tensor, "s _m"]], weights: Float[Tensor, " s"]
) -> Float[Tensor, " s"]:
    """The relative error of weights read from the bias gradients, which is one of the inputs' scale; 0 where known."""
    if noisy.weight is not None or len(weights) < noisy.rank:
        return torch.zeros_like(weights)
    gram, _ = _normal_equations(noisy.problem, deltas)
    return noisy.sigmas[0] * torch.linalg.inv(gram).diagonal().clamp_min(0).sqrt() / weights


def _normal_equations(
    problem: NetworkView, deltas: list[Float[Tensor, "s _m"]]
) -> tuple[Float[Tensor, "s s"], Float[Tensor, " s"]]:
    """Of the least squares (sum_l D_l D_l^T) c = sum_l D_l dL/dbeta_l for the weights c."""
    D, g = bias_system(problem, deltas)
    gram = D @ D.T
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return gram + ridge, D @ g
