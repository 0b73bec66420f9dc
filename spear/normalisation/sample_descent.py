"""Inputs behind a normalisation of each sample, from γ ∘ ∂L/∂y of all of them, each up to a factor of its own.

The part of γ ∘ ∂L/∂y in U is σ_i ∂L/∂z_i = U t_i. By least squares, sum_i t_i [x_i; 1]ᵀ / σ_i = S V: rows known up to a
factor, which the last entry tells.
"""

from jaxtyping import Float
from torch import Tensor

from spear.directions import least_squares
from spear.network.layerwise import solve
from spear.normalisation.problem import NormalisedView
from spear.normalisation.sample_search import columns
from spear.published.lowrank import LowRank
from spear.reconstruction import Refusal


def inputs_behind(
    view: NormalisedView, k: int, low: LowRank, g: Float[Tensor, "b m"]
) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
    """The inputs of layer k, and the factor by which each row of g is more than γ ∘ ∂L/∂y of its sample over σ.

    Raises `Refusal` where they are more than the gradient's rank.
    """
    if low.rank < len(g):
        raise Refusal(f"the gradient of layer {k + 1} has rank {low.rank}: of {len(g)} samples some enter it alike")
    t = least_squares(columns(view.norms[k], low, view.network.affine(k)), g.mT).mT[:, : low.rank]
    rows = solve(t, low.R)
    return rows[:, :-1] / rows[:, -1:], 1 / rows[:, -1]
