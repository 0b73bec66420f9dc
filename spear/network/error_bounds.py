"""How far the inputs of a batch can be from the truth: the theorem of `spear.certificate`, with every layer's weights.

Each layer alone may determine the batch: its F_i follow from the masks and the weights above it, or from the masks
alone. The first layer gives the inputs themselves, a deeper one its own inputs, and the weights below lead back.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.certificate import input_errors, norms, spread_of_family, spread_of_zeros
from spear.federated.losses import activate_along
from spear.models.streaming import product
from spear.network.curved_bounds import Levers, curved_bounds
from spear.network.problem import NetworkView, Passes, Targets
from spear.network.rest import rest_of

MOST_ENTRIES = 2**22  # of the families that are held at once


def input_bounds(
    problem: NetworkView, run: Passes, targets: Targets, known: Levers | None = None
) -> Float[Tensor, " s"]:
    """A bound on each input's relative error, from the first layers that give one under which inputs are certified.

    Where an activation is curved, linear regions say nothing: `spear.network.curved_bounds`, with `known` levers.
    """
    if not all(activation.is_flat for activation in problem.activations):
        return curved_bounds(problem, run, targets, known)
    bound = run.inputs[0].new_full((len(targets),), torch.inf)
    for k in range(problem.last + 1):
        if bool((bound <= problem.accuracy.recovered).all()):
            break
        bound = torch.minimum(bound, layer_bounds(problem, run, targets, k))
    return bound


def layer_bounds(problem: NetworkView, run: Passes, targets: Targets, k: int) -> Float[Tensor, " s"]:
    """The bounds that layer k's gradient gives; infinite where it does not determine the batch."""
    G, X, shape = run.deltas[k], problem.extend(k, run.inputs[k]), problem.gradient(k).shape
    if len(G) > min(shape) or not bool(G.isfinite().all() and X.isfinite().all()):
        return G.new_full((len(G),), torch.inf)
    basis, triangle = torch.linalg.qr(G.T)
    rest, eps = rest_of(problem, k, run, basis), 2 * problem.precision
    matrix, column = max(rest.size, eps * rest.whole), max(rest.last, eps * rest.whole_last)
    entries = matrix / math.prod(shape) ** 0.5, column / shape[0] ** 0.5
    lengths = None if problem.biases[k] is not None else softness(problem, run, targets)
    error = input_errors(G, X, spreads(problem, run, k), entries=entries, lengths=lengths)
    if k:
        error = error * norms(run.inputs[k]) / (norms(run.inputs[0]) * least_slopes(problem, run, k))
    else:
        step = torch.linalg.solve_triangular(triangle, rest.inside, upper=True)
        error = error + step.norm(dim=1) / norms(run.inputs[0])
    return error.nan_to_num(torch.inf, torch.inf)


def spreads(problem: NetworkView, run: Passes, k: int) -> Float[Tensor, " s"]:
    """Of each F_i, by its inactive units or by the layers above: the cheaper, the other where that is not enough."""
    G, inactive = run.deltas[k], run.slopes[k] == 0
    basis = torch.linalg.qr(G.T)[0]

    def by_layers(index: Int[Tensor, " i"]) -> Float[Tensor, " i"]:
        parts = index.split(max(1, MOST_ENTRIES // (G.shape[1] * problem.outputs)))
        return torch.cat([spread_of_family(basis, G[part], family(problem, run, k, part)) for part in parts])

    def by_zeros(index: Int[Tensor, " i"]) -> Float[Tensor, " i"]:
        return spread_of_zeros(basis, G[index], inactive[index])

    first, second = (by_zeros, by_layers) if len(G) < problem.outputs else (by_layers, by_zeros)
    spread = first(torch.arange(len(G), device=G.device))
    unknown = spread.isinf().nonzero()[:, 0]
    if len(unknown):
        spread[unknown] = second(unknown)
    return spread


def family(problem: NetworkView, run: Passes, k: int, index: Int[Tensor, " s"]) -> Float[Tensor, "s r m"]:
    """The rows of (D_k W_{k+1}ᵀ ... W_outᵀ)ᵀ for the masks of the samples `index`: they span ∂L/∂z at layer k."""
    rows = torch.eye(problem.outputs, dtype=run.deltas[k].dtype, device=index.device)
    if problem.loss == "cross_entropy":
        rows = rows[1:] - rows[:1]  # dLoss/dlogits sums to zero
    rows = rows.expand(len(index), -1, -1)
    for above in range(problem.last, k - 1, -1):
        rows = problem.back(above + 1, rows) * run.slopes[above][index][:, None, :]
    return rows


def least_slopes(problem: NetworkView, run: Passes, k: int) -> Float[Tensor, " s"]:
    """The smallest singular value of the linear map from each sample's input to that of layer k.

    It is 0 where fewer units are active on the way than an input has entries: an image in a narrow layer.
    """
    wide = torch.stack([(x != 0).sum(1) for x in run.slopes[:k]]).amin(0) >= run.inputs[0].shape[1]
    slopes, index = run.inputs[0].new_zeros(len(wide)), wide.nonzero()[:, 0]
    for part in index.split(max(1, MOST_ENTRIES // problem.weights[0].numel())) if len(index) else ():
        rows = problem.weights[0] * run.slopes[0][part, :, None]
        for below in range(1, k):
            rows = product(rows.mT, problem.weights[below]).mT * run.slopes[below][part, :, None]
        slopes[part] = torch.linalg.eigvalsh(rows.mT @ rows)[:, 0].clamp_min(0).sqrt()
    return slopes


def softness(problem: NetworkView, run: Passes, targets: Targets) -> Float[Tensor, " s"]:
    """Relative error of an input's length over that of its dLoss/dlogits, where no bias but the softmax tells it.

    With x = x'/a and p - e = a (p' - e), the length follows from p(x'/a) - e = a (p' - e); the slope of the difference
    is -(s + p' - e) in a, s the slope of p along x'.
    """
    x = run.inputs[0]
    for k in range(problem.last + 1):
        x = product(x, problem.weights[k]) * run.slopes[k]
    logits = problem.apply(problem.last + 1, run.inputs[-1])
    along = activate_along(problem.loss, logits, x @ problem.weights[-1].T)
    own = targets.errors(problem.activate(logits)) / (targets.unit * targets.copies[:, None])
    return own.norm(dim=1) / (along + own).norm(dim=1).clamp_min(1e-300)
