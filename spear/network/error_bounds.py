"""How far the inputs of a batch can be from the truth: the theorem of `spear.certificate`, with every layer's weights.

Each layer alone may determine the batch: its F_i follow from the masks and the weights above it, or from the masks
alone. The first layer gives the inputs themselves, a deeper one its own inputs, and the weights below lead back.

Where none does, as with hundreds of classes and a batch of half the width, all together may. Let B_l take dLoss/dlogits
of sample i to its ∂L/∂z at layer l, in its linear region, and P_l project on span(G'_l). Every batch that gives all
gradients has (1 - P_l) B_l d = 0 in each layer of which G'_l X'_l has rank b, the output layer (B = 1) among them: its
∂L/∂z at the first layer is in F_i = {B_1 d : (1 - P_l) B_l d = 0 for all l > 1}, and the theorem holds as it stands.
Noise N_l moves d by e, the solution of (1 - P_l) B_l e = (1 - P_l) N_l x⁺ for all l, by least squares, each layer by
the size of its noise.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.certificate import (
    LOOSE,
    NO_ANGLE,
    input_errors,
    inverse_columns,
    norms,
    spread_of_family,
    spread_of_zeros,
)
from spear.directions import unit_rows
from spear.federated.losses import activate_along
from spear.models.streaming import product
from spear.network.curved_bounds import Levers, curved_bounds
from spear.network.problem import NetworkView, Passes, Targets
from spear.network.rest import Rest, rest_of
from spear.network.spaces import contrasts

MOST_ENTRIES = 2**22  # of the families that are held at once
INVERSE_STEPS = 16  # to the smallest singular value: then it is right to a per cent or two
RESOLVED, SINGULAR = 1e-4, 1e-13  # of a Gram matrix: eigenvalues that single, double precision resolves


def input_bounds(
    problem: NetworkView, run: Passes, targets: Targets, known: Levers | None = None
) -> Float[Tensor, " s"]:
    """A bound on each input's relative error, from the first layers that give one under which inputs are certified.

    Where an activation is curved, linear regions say nothing: `spear.network.curved_bounds`, with `known` levers.
    """
    if not all(activation.is_flat for activation in problem.activations):
        return curved_bounds(problem, run, targets, known)
    bound = run.inputs[0].new_full((len(targets),), torch.inf)
    alone, *deeper = (partial(spreads, problem, run, k) for k in range(problem.last + 1))
    for k, rule in [(0, alone), (0, partial(joint_spreads, problem, run)), *enumerate(deeper, 1)]:
        if bool((bound <= problem.accuracy.recovered).all()):
            break
        bound = torch.minimum(bound, layer_bounds(problem, run, targets, k, rule))
    return bound


def layer_bounds(
    problem: NetworkView, run: Passes, targets: Targets, k: int, rule: Callable[[], Float[Tensor, " s"]]
) -> Float[Tensor, " s"]:
    """The bounds that layer k's gradient gives, its F_i spread by the `rule`; infinite where the batch is not told."""
    G, X, shape = run.deltas[k], problem.extend(k, run.inputs[k]), problem.gradient(k).shape
    if len(G) > min(shape) or not bool(G.isfinite().all() and X.isfinite().all()):
        return G.new_full((len(G),), torch.inf)
    basis, triangle = torch.linalg.qr(G.T)
    rest = rest_of(problem, k, run, basis)
    lengths = None if problem.biases[k] is not None else softness(problem, run, targets)
    bounds = partial(input_errors, G, X, entries=entry_noise(problem, k, rest), lengths=lengths)
    if bool((bounds(torch.ones_like(G[:, 0])) > LOOSE).all()):  # whatever the F_i are
        return G.new_full((len(G),), torch.inf)
    error = bounds(rule())
    if k:
        error = error * norms(run.inputs[k]) / (norms(run.inputs[0]) * least_slopes(problem, run, k))
    else:
        step = torch.linalg.solve_triangular(triangle, rest.inside, upper=True)
        error = error + step.norm(dim=1) / norms(run.inputs[0])
    return error.nan_to_num(torch.inf, torch.inf)


def entry_noise(problem: NetworkView, k: int, rest: Rest) -> tuple[float, float]:
    """How far the entries of dL/dW of layer k may be off, and those of dL/dβ: by rounding, or by what is left."""
    rows, columns = problem.gradient(k).shape
    eps = 2 * problem.precision
    matrix, column = max(rest.size, eps * rest.whole), max(rest.last, eps * rest.whole_last)
    return matrix / (rows * columns) ** 0.5, column / rows**0.5


def spreads(problem: NetworkView, run: Passes, k: int) -> Float[Tensor, " s"]:
    """Of each F_i, by its inactive units or by the layers above: the cheaper, the other where that is not enough."""
    G, inactive = run.deltas[k], run.slopes[k] == 0
    basis = torch.linalg.qr(G.T)[0]

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


def joint_spreads(problem: NetworkView, run: Passes) -> Float[Tensor, " s"]:
    """Of each F_i that all layers leave of the first one's, as if that layer's noise alone moved it."""
    samples = torch.arange(len(run.deltas[0]), device=run.deltas[0].device)
    width = sum(delta.shape[1] for delta in run.deltas)
    weights, bases = telling_layers(problem, run)
    if 0 not in bases:
        return run.deltas[0].new_full((len(samples),), torch.inf)
    parts = samples.split(max(1, MOST_ENTRIES // (width * problem.outputs)))
    return torch.cat([_joint_spread(problem, run, weights, bases, part) for part in parts])


def telling_layers(
    problem: NetworkView, run: Passes
) -> tuple[dict[int, Float[Tensor, " s"]], dict[int, Float[Tensor, "_m b"]]]:
    """Of each layer whose gradient has the rank of the batch: each sample's noise there, inverted; basis of span(G)."""
    weights, bases = {}, {}
    for k, G in enumerate(run.deltas):
        row, column = inverse_columns(G), inverse_columns(problem.extend(k, run.inputs[k]))
        if bool(row.isfinite().all() and column.isfinite().all()):
            entry, _ = entry_noise(problem, k, rest_of(problem, k, run))
            weights[k], bases[k] = 1 / (entry * column), torch.linalg.qr(G.T)[0]
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


def least_slopes(problem: NetworkView, run: Passes, k: int) -> Float[Tensor, " s"]:
    """The smallest singular value of the linear map from each sample's input to that of layer k.

    It is 0 where fewer units are active on the way than an input has entries: an image in a narrow layer.
    """
    active = [x != 0 for x in run.slopes[:k]]
    wide = torch.stack([x.sum(1) for x in active]).amin(0) >= run.inputs[0].shape[1]
    slopes = run.inputs[0].new_zeros(len(wide))
    for i in wide.nonzero()[:, 0].tolist():
        rows = before = None
        for below, on in enumerate(x[i] for x in active):
            own = problem.weights[below][on].to(slopes) * run.slopes[below][i, on, None]
            rows, before = own if before is None else own[:, before] @ rows, on
        slopes[i] = least_singular(rows)
    return slopes


def least_singular(rows: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
    """The smallest singular value, by inverse iteration, which is a little too large; 0 where it is rounding.

    In single precision where that resolves it: a fraction of what all singular values cost.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(rows.shape[1], 2, generator=generator, dtype=torch.float64).to(rows)
    for gram, resolved in ((rows.float().mT @ rows.float(), RESOLVED), (rows.mT @ rows, SINGULAR)):
        factor, failed = torch.linalg.cholesky_ex(gram)
        end = v.to(gram)
        for _ in range(INVERSE_STEPS):
            end = torch.cholesky_solve(end / torch.linalg.vector_norm(end, dim=0), factor)
        squared = 1 / torch.linalg.vector_norm(end, dim=0).amax()
        if not int(failed) and bool(squared > resolved * torch.linalg.vector_norm(gram)):
            return squared.sqrt().to(rows)
    return torch.zeros_like(rows[0, 0])


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
