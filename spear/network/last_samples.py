"""The last samples at the last hidden layer, where few are missing: linear programming, and a read-off at the end."""

import numpy as np
import scipy  # its parts load when they are first used
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from spear.network.exact_step import Tolerances, accepted, solve_mask
from spear.network.spaces import Solved, Spaces

ZERO = 1e-6  # of the largest entry of a vertex: the tolerance of linear programming


def settle(spaces: Spaces, mask: Bool[Tensor, "k m"], tolerances: Tolerances) -> Solved:
    """The directions that the exact step finds from candidate masks and accepts."""
    exact = solve_mask(spaces, mask)
    return Solved.none(spaces).join(exact.solved(accepted(exact, tolerances)), room=spaces.rank)


def last_one(spaces: Spaces, free: Float[Tensor, "b r"], tolerances: Tolerances) -> Solved:
    """With one sample left, s is known up to its sign and factor, hence its mask."""
    z = spaces.lift @ free[:, 0]
    return settle(spaces, torch.stack([z > 0, z < 0]), tolerances)


def vertices(
    spaces: Spaces,
    activations: Float[Tensor, "b n"],
    free: Float[Tensor, "b r"],
    tolerances: Tolerances,
    *,
    tries: int,
    generator: Generator,
) -> Solved:
    """The last samples by linear programming: their y are degenerate vertices of {a : y = Vᵀ N a >= 0, sum y = 1}.

    `activations` is V without the bias column, `free` is N. A random objective picks a vertex; its zero entries are
    solved again for full precision.
    """
    cone = (activations.T @ free).cpu().numpy()
    masks = []
    for _ in range(tries):
        objective = torch.randn(free.shape[1], generator=generator, dtype=torch.float64).numpy()
        equality = {"A_eq": cone.sum(0)[None], "b_eq": [1.0]}
        answer = scipy.optimize.linprog(
            objective, A_ub=-cone, b_ub=np.zeros(len(cone)), **equality, bounds=(None, None)
        )
        if answer.status == 0:
            masks.append(_vertex_mask(spaces, cone, free, answer.x))
    return settle(spaces, torch.stack(masks), tolerances) if masks else Solved.none(spaces)


def _vertex_mask(
    spaces: Spaces, cone: np.ndarray, free: Float[Tensor, "b r"], corner: np.ndarray
) -> Bool[Tensor, " m"]:
    y = cone @ corner
    zero = np.abs(y) < ZERO * np.abs(y).max()
    if zero.sum() >= cone.shape[1]:
        exact = np.linalg.svd(cone[zero], full_matrices=False)[2][-1]
        corner = exact * np.sign(exact @ corner)
    return spaces.lift @ (free @ torch.from_numpy(corner).to(free)) > 0
