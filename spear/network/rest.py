"""What a batch leaves of a layer's gradient: measured by blocks of rows, never held."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spear.models.streaming import pieces
from spear.network.problem import NetworkView, Passes


@dataclass(frozen=True)
class Rest:
    """The Frobenius norms of J - sum_i delta_i [input_i; 1]ᵀ and of J, of the last columns of both; `inside` a basis.

    `inside` is basisᵀ times the rest, for the basis that was given.
    """

    size: float
    whole: float
    last: float
    whole_last: float
    inside: Float[Tensor, "b n1"]


def rest_of(problem: NetworkView, k: int, run: Passes, basis: Float[Tensor, "m b"] | None = None) -> Rest:
    """What the passes of a batch leave of layer k's gradient."""
    J, deltas, inputs = problem.gradient(k), run.deltas[k], problem.extend(k, run.inputs[k])
    basis = deltas.new_empty(len(deltas.mT), 0) if basis is None else basis
    parts = list(pieces(*J.weight.shape))
    inside = basis.new_zeros(basis.shape[1], J.shape[1])
    sizes = basis.new_empty(len(parts), 4)  # first: results between blocks would scatter the heap
    for place, (part, block) in enumerate(J):
        left = torch.addmm(block, deltas[:, part].mT, inputs, alpha=-1)
        inside.addmm_(basis[part].mT, left)
        for column, x in enumerate((left, block, left[:, -1], block[:, -1])):
            torch.linalg.vector_norm(x, out=sizes[place, column])
    return Rest(*sizes.norm(dim=0).tolist(), inside)
