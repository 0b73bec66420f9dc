"""Newton's method on a whole batch where activations are curved: all inputs at once, from what they leave unexplained.

U = G X + N at the first layer. To first order N = dG X + G dX; with P the projection on span(G), E the differences of
the inputs, x⁺ the columns of X⁺ and J_i the derivative of delta_i (`spear.network.curved_bounds`), for each sample

    (1 - P) J_i dx_i = (1 - P) N x⁺_i        dx_i = c + E v        c = n - n_1 x_i        n = (G⁺N)_i
"""

import torch
from jaxtyping import Float
from torch import Tensor

from spear.network.curved_bounds import Levers, levers, probes
from spear.network.derivatives import differences, turned
from spear.network.problem import NetworkView, Passes, Targets, passes

STEPS = 4  # each squares the error, or is the last
ENOUGH = 10  # times what `Accuracy.explained` allows: no step is needed under it
SMALL = 1e-3  # a change, relative to the inputs, after which their derivatives are the same
SETTLED = 0.5  # share of what was left that a step must not leave again


def correct(
    problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Targets
) -> tuple[Float[Tensor, "s n"], Levers | None]:
    """The inputs that leave least of the first layer's gradient, of those that Newton's steps lead to.

    Also the levers of the last step, for the bounds, if it was one that changes them no more.
    """
    if all(activation.is_flat for activation in problem.activations):
        return inputs, None
    run, enough = passes(problem, inputs, targets), ENOUGH * problem.accuracy.explained * problem.augmented(0).norm()
    left, known = _rest(problem, run).norm(), None
    for _ in range(STEPS):
        if not left > enough:
            break
        change, levers = step(problem, run, targets)
        new = passes(problem, inputs + change, targets)
        after = _rest(problem, new).norm()
        if not after < left:
            break
        known = levers if float(change.norm()) < SMALL * float(inputs.norm()) else None
        slow, inputs, run, left = after > SETTLED * left, inputs + change, new, after
        if slow:
            break
    return inputs, known


def _rest(problem: NetworkView, run: Passes) -> Float[Tensor, "m n1"]:
    """What the batch leaves of the first layer's gradient."""
    return torch.addmm(problem.augmented(0), run.deltas[0].T, problem.extend(0, run.inputs[0]), alpha=-1)


def step(problem: NetworkView, run: Passes, targets: Targets) -> tuple[Float[Tensor, "s n"], Levers]:
    """The change of all inputs; of a batch that is not isolated, values that mean nothing."""
    x, rest = run.inputs[0], _rest(problem, run)
    basis, triangle = torch.linalg.qr(run.deltas[0].T)
    n = torch.linalg.solve_triangular(triangle, basis.T @ rest, upper=True)
    change = n[:, :-1] - n[:, -1:] * x
    wanted = (rest @ torch.linalg.pinv(problem.extend(0, x))).T
    wanted = wanted - (wanted @ basis) @ basis.T
    moves, parts = [], []
    for index, free, own in turned(problem, run, targets, basis, *probes(x), change):
        gram, right = free @ free.mT, free @ (wanted[index] - own[:, -1])[:, :, None]
        moves.append(torch.linalg.solve_ex(gram, right)[0][:, :, 0])
        parts.append(levers(gram, own[:, :-1]))
    return change + torch.cat(moves) @ differences(x).T, Levers.joined(parts)
