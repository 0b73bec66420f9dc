"""From the last hidden layer down to the inputs: activations inverted where that is sure, then least squares."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.directions import unit_rows
from spear.network.deflation import SPARE_ROWS
from spear.network.layerwise import solve
from spear.network.problem import NetworkView

NOISE = 10.0  # times the accuracy of a sample's direction: how far an activation may be off, relative to the largest
MOST_ENTRIES = 2**23  # of the systems that are held at once


def descend(
    problem: NetworkView, y: Float[Tensor, "s n"], deltas: Float[Tensor, "s m"], *, whole: bool
) -> tuple[Float[Tensor, "s n0"], Bool[Tensor, " s"]]:
    """Inputs from the inputs y of the last hidden layer, and which are determined.

    `deltas` are that layer's back-propagated vectors. On the units where phi can be inverted, a sample's
    pre-activations below are known; they determine its place in the row space there. With the `whole` batch at hand,
    each layer's gradient then gives all inputs of it at once.
    """
    sure = torch.ones(len(y), dtype=torch.bool, device=y.device)
    for k in range(problem.last - 1, -1, -1):
        z, determined = pre_activations(problem, y, k)
        sure &= determined
        deltas = (deltas @ problem.weights[k + 1]) * problem.activations[k].slope(z)
        y = solve(deltas, problem.augmented(k))[:, : problem.weights[k].shape[1]] if whole else _inputs(problem, z, k)
    return y, sure & y.isfinite().all(1)


def pre_activations(
    problem: NetworkView, y: Float[Tensor, "s m"], k: int
) -> tuple[Float[Tensor, "s m"], Bool[Tensor, " s"]]:
    """Layer k's pre-activations from its activations, in the row space of its gradient; which are determined."""
    activation, lift = problem.activations[k], _lift(problem, k)[0]
    z, known = activation.inverse(y, NOISE * problem.accuracy.certain * float(y.abs().max()))
    weight = activation.slope(z) * known
    parts = zip(*(x.split(max(1, MOST_ENTRIES // lift.numel())) for x in (weight, weight * z)), strict=True)
    systems = [torch.linalg.lstsq(w[:, :, None] * lift, wz[:, :, None]).solution[:, :, 0] for w, wz in parts]
    return torch.cat(systems) @ lift.T, known.sum(1) >= lift.shape[1] + SPARE_ROWS


def _lift(problem: NetworkView, k: int) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n1"]]:
    """[W | beta] Vᵀ, and V."""
    rows = unit_rows(problem.factors(k).R)
    return problem.affine(k) @ rows.T, rows


def _inputs(problem: NetworkView, z: Float[Tensor, "s m"], k: int) -> Float[Tensor, "s n"]:
    """The inputs of layer k with these pre-activations, in the row space of its gradient."""
    lift, rows = _lift(problem, k)
    extended = torch.linalg.lstsq(lift, z.T).solution.T @ rows
    return extended[:, :-1] / extended[:, -1:]
