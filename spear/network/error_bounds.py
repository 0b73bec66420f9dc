"""How far the inputs of a batch can be from the truth: the theorem of `spear.certificate`, with every layer's weights.

Each layer alone may determine its columns of ∂L/∂z: its F_i follow from the masks and the weights above it, or from the
masks alone. The weights below lead back from these columns to the first layer's, whose gradient then gives the inputs.
An error of a column grows on the way by no more than the largest slopes and singular values.

Where none does, as with hundreds of classes and a batch of half the width, all together may. Let B_l take dLoss/dlogits
of sample i to its ∂L/∂z at layer l, in its linear region, and P_l project on span(G'_l). Every batch that gives all
gradients has (1 - P_l) B_l d = 0 in each layer of which G'_l X'_l has rank b, the output layer (B = 1) among them: its
∂L/∂z at the first layer is in F_i = {B_1 d : (1 - P_l) B_l d = 0 for all l > 1}, and the theorem holds as it stands.
Noise N_l moves d by e, the solution of (1 - P_l) B_l e = (1 - P_l) N_l x⁺ for all l, by least squares, each layer by
the size of its noise.
"""

import math
import operator
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.certificate import (
    LOOSE,
    NO_ANGLE,
    column_errors,
    input_errors,
    inverse_columns,
    norms,
    spread_of_family,
    spread_of_zeros,
)
from spear.directions import TINY, unit_rows
from spear.federated.losses import activate_along
from spear.models.streaming import product
from spear.network.curved_bounds import Levers, curved_bounds
from spear.network.problem import NetworkView, Passes, Targets
from spear.network.rest import Rest, rest_of
from spear.network.spaces import contrasts

MOST_ENTRIES = 2**22  # of the families that are held at once


def input_bounds(
    problem: NetworkView, run: Passes, targets: Targets, known: Levers | None = None
) -> Float[Tensor, " s"]:
    """A bound on each input's relative error, from the first layers that give one under which inputs are certified.

    Where an activation is curved, linear regions say nothing: `spear.network.curved_bounds`, with `known` levers.
    """
    if not all(activation.is_flat for activation in problem.activations):
        return curved_bounds(problem, run, targets, known)
    held = Held(problem, run)
    bound = run.inputs[0].new_full((len(targets),), torch.inf)
    alone, *deeper = (partial(spreads, held, k) for k in range(problem.last + 1))
    for k, rule in [(0, alone), (0, partial(joint_spreads, held)), *enumerate(deeper, 1)]:
        if bool((bound <= problem.accuracy.recovered).all()):
            break
        bound = torch.minimum(bound, layer_bounds(held, targets, k, rule))
    return bound


class Held:
    """The passes of a batch held against the update: what several rules ask of a layer, computed once."""

    def __init__(self, problem: NetworkView, run: Passes) -> None:
        self.problem, self.run = problem, run
        # Of the columns of ∂L/∂z at layer k, an orthonormal basis and a triangle.
        self.factors = factors = cache(lambda k: tuple(torch.linalg.qr(run.deltas[k].T)))
        # What the batch leaves of layer k's gradient; of the first, inside the span of its columns, too.
        self.rest = cache(lambda k: rest_of(problem, k, run, None if k else factors(0)[0]))
        # The norms of the columns of the inverse of layer k's inputs.
        self.column = cache(lambda k: inverse_columns(problem.extend(k, run.inputs[k])))

    def entry_noise(self, k: int) -> tuple[float, float]:
        """How far the entries of dL/dW of layer k may be off, and those of dL/dβ."""
        return entry_noise(self.problem, k, self.rest(k))


def layer_bounds(held: Held, targets: Targets, k: int, rule: Callable[[], Float[Tensor, " s"]]) -> Float[Tensor, " s"]:
    """The bounds where layer k's gradient tells the columns of ∂L/∂z, its F_i spread by the `rule`, and the first one's
    then the inputs; infinite where the batch is not told."""
    problem, run = held.problem, held.run
    first, (G, X) = run.deltas[0], (run.deltas[k], problem.extend(k, run.inputs[k]))
    if len(G) > min(len(first.T), *problem.gradient(k).shape) or not bool(G.isfinite().all() and X.isfinite().all()):
        return first.new_full((len(first),), torch.inf)
    (_, triangle), rest = held.factors(0), held.rest(0)
    entry, _ = held.entry_noise(k)
    lengths = None
    if problem.biases[0] is None:
        own = entry * held.column(k) * G.shape[1] ** 0.5 / torch.linalg.vector_norm(G, dim=1)
        lengths = softness(problem, run, targets) * own
    bounds = input_errors(first, problem.extend(0, run.inputs[0]), entries=held.entry_noise(0), lengths=lengths)
    moved = partial(column_errors, held.column(k), entry=entry * most_back(problem, run, k))
    if bool((bounds(moved(torch.ones_like(first[:, 0]))) > LOOSE).all()):  # whatever the F_i are
        return first.new_full((len(first),), torch.inf)
    step = torch.linalg.solve_triangular(triangle, rest.inside, upper=True)
    error = bounds(moved(rule())) + step.norm(dim=1) / norms(run.inputs[0])
    return error.nan_to_num(torch.inf, torch.inf)


def most_back(problem: NetworkView, run: Passes, k: int) -> float:
    """How many times longer a vector of ∂L/∂z can be at the first layer than at layer k: at most so many."""
    steepest = [float(slopes.abs().amax()) for slopes in run.slopes[:k]]
    return math.prod(map(operator.mul, steepest, map(largest_singular, problem.weights[1 : k + 1])), start=1.0)


def largest_singular(W: Float[Tensor, "m n"]) -> float:
    """A bound on the largest singular value, hardly too large: that of all singular values' eighth powers."""
    size = float(torch.linalg.vector_norm(W))
    unit = (W / max(size, TINY)).float()
    gram = unit @ unit.mT if W.shape[0] < W.shape[1] else unit.mT @ unit
    return size * float(torch.linalg.matrix_norm(gram @ gram)) ** 0.25


def entry_noise(problem: NetworkView, k: int, rest: Rest) -> tuple[float, float]:
    """How far the entries of dL/dW of layer k may be off, and those of dL/dβ: by rounding, or by what is left."""
    rows, columns = problem.gradient(k).shape
    eps = 2 * problem.precision
    matrix, column = max(rest.size, eps * rest.whole), max(rest.last, eps * rest.whole_last)
    return matrix / (rows * columns) ** 0.5, column / rows**0.5


def spreads(held: Held, k: int) -> Float[Tensor, " s"]:
    """Of each F_i, by its inactive units or by the layers above: the cheaper, the other where that is not enough."""
    problem, run = held.problem, held.run
    G, inactive, (basis, _) = run.deltas[k], run.slopes[k] == 0, held.factors(k)

    def by_layers(index: Int[Tensor, " i"]) -> Float[Tensor, " i"]:
        parts = index.split(max(1, MOST_ENTRIES // (G.shape[1] * problem.outputs)))
        return torch.cat([spread_of_family(basis, G[part], family(problem, run, k, part)) for part in parts])

    def by_zeros(index: Int[Tensor, " i"]) -> Float[Tensor, " i"]:
        return spread_of_zeros(basis, G[index], inactive[index])

    led = sum(w.numel() for w in problem.weights[k + 1 :]) * problem.outputs + G.shape[1] * problem.outputs**2
    first, second = (by_zeros, by_layers) if G.shape[1] * len(G) ** 2 < led else (by_layers, by_zeros)
    spread = first(torch.arange(len(G), device=G.device))
    unknown = spread.isinf().nonzero()[:, 0]
    if len(unknown):
        spread[unknown] = second(unknown)
    return spread


def family(problem: NetworkView, run: Passes, k: int, index: Int[Tensor, " s"]) -> Float[Tensor, "s r m"]:
    """The rows of (D_k W_{k+1}ᵀ ... W_outᵀ)ᵀ for the masks of the samples `index`: they span ∂L/∂z at layer k."""
    *_, (_, rows) = chain(problem, run, k, index)
    return rows


def chain(
    problem: NetworkView, run: Passes, k: int, index: Int[Tensor, " s"]
) -> Iterator[tuple[int, Float[Tensor, "s r _m"]]]:
    """The families of each hidden layer from the last down to k, with its number."""
    rows = possible(problem, run).T.expand(len(index), -1, -1)
    for above in range(problem.last, k - 1, -1):
        rows = problem.back(above + 1, rows) * run.slopes[above][index][:, None, :]
        yield above, rows


def possible(problem: NetworkView, run: Passes) -> Float[Tensor, "outputs r"]:
    """Orthonormal basis of the possible dLoss/dlogits."""
    return contrasts(problem.outputs, problem.loss, run.deltas[0])


def joint_spreads(held: Held) -> Float[Tensor, " s"]:
    """Of each F_i that all layers leave of the first one's, as if that layer's noise alone moved it."""
    problem, run = held.problem, held.run
    samples = torch.arange(len(run.deltas[0]), device=run.deltas[0].device)
    width = sum(delta.shape[1] for delta in run.deltas)
    weights, bases = telling_layers(held)
    if 0 not in bases:
        return run.deltas[0].new_full((len(samples),), torch.inf)
    parts = samples.split(max(1, MOST_ENTRIES // (width * problem.outputs)))
    return torch.cat([_joint_spread(problem, run, weights, bases, part) for part in parts])


def telling_layers(held: Held) -> tuple[dict[int, Float[Tensor, " s"]], dict[int, Float[Tensor, "_m b"]]]:
    """Of each layer whose gradient has the rank of the batch: each sample's noise there, inverted; basis of span(G)."""
    weights, bases = {}, {}
    for k in range(len(held.run.deltas)):
        (basis, triangle), column = held.factors(k), held.column(k)
        row = inverse_columns(triangle.mT)
        if bool(row.isfinite().all() and column.isfinite().all()):
            weights[k], bases[k] = 1 / (held.entry_noise(k)[0] * column), basis
    return weights, bases


def _joint_spread(
    problem: NetworkView,
    run: Passes,
    weights: dict[int, Float[Tensor, " s"]],
    bases: dict[int, Float[Tensor, "_m b"]],
    index: Int[Tensor, " i"],
) -> Float[Tensor, " i"]:
    """With A = sum_l w_l² B_lᵀ (1 - P_l) B_l, w_l relative to the first layer's: sqrt(1 + tr(B_1 A⁻¹ B_1ᵀ)).

    Of the trace, without what lies along the sample's own d and g_i.
    """
    Z, first, out = possible(problem, run), None, problem.last + 1
    own = unit_rows(run.deltas[out][index] @ Z)
    A = Z.new_zeros(len(index), Z.shape[1], Z.shape[1])
    for k, rows in [(out, Z.T[None]), *chain(problem, run, 0, index)]:
        if k in bases:
            beside = rows @ bases[k]
            gram = rows @ rows.mT - beside @ beside.mT
            A += gram * (weights[k][index] / weights[0][index])[:, None, None] ** 2
        first = rows
    values, vectors = torch.linalg.eigh(A + _outer(own) * A.diagonal(dim1=1, dim2=2).sum(1)[:, None, None])
    g = unit_rows(run.deltas[0][index])
    moved = (vectors.mT - (vectors.mT @ own[:, :, None]) * own[:, None, :]) @ first
    moved = (moved - (moved @ g[:, :, None]) * g[:, None, :]).pow(2).sum(2)
    seen = values > NO_ANGLE * values[:, -1:]
    hidden = moved > NO_ANGLE * first.pow(2).sum((1, 2))[:, None]
    spread = (1 + torch.where(seen, moved / values, 0.0).sum(1)).sqrt()
    return torch.where((hidden & ~seen).any(1), torch.inf, spread)


def _outer(x: Float[Tensor, "s r"]) -> Float[Tensor, "s r r"]:
    return x[:, :, None] * x[:, None, :]


def softness(problem: NetworkView, run: Passes, targets: Targets) -> Float[Tensor, " s"]:
    """Relative error of an input's length over that of its dLoss/dlogits, where no bias but the softmax tells it.

    With x = x'/a and p - e = a (p' - e), the length follows from p(x'/a) - e = a (p' - e); the slope of the difference
    is -(s + p' - e) in a, s the slope of p along x'.
    """
    along, own = softened(problem, run, targets)
    return own.norm(dim=1) / (along + own).norm(dim=1).clamp_min(1e-300)


def softened(
    problem: NetworkView, run: Passes, targets: Targets
) -> tuple[Float[Tensor, "s outputs"], Float[Tensor, "s outputs"]]:
    """The slope of p - e of each sample along its input, and p - e."""
    x = run.inputs[0]
    for k in range(problem.last + 1):
        x = product(x, problem.weights[k]) * run.slopes[k]
    logits = problem.apply(problem.last + 1, run.inputs[-1])
    along = activate_along(problem.loss, logits, x @ problem.weights[-1].T)
    return along, targets.errors(problem.activate(logits)) / (targets.unit * targets.copies[:, None])
