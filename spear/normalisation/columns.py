"""Behind ReLU and in front of BatchNorm, whatever its statistics: the last hidden layer's own gradient.

∂L/∂W = Gᵀ [X | 1] with G zero where a unit is not active, whatever follows. `spear.descent.layer` finds the columns of
G by these zeros and the signs of the pre-activations, hence X: and the batch tells its own μ and σ. Of a unit that is
active in every sample BatchNorm makes Gᵀ 1 zero, which is sparse and no column: such rows are left out.

**Theorem** (`spear.certificate`, F_i what vanishes on the inactive units of sample i). Where the rows of G' on these
have rank b - 1 for every sample, no other batch of b samples with these activation patterns gives this gradient.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.descent.layer import find_columns
from spear.network.problem import join
from spear.normalisation.problem import NormalisedView, normalise
from spear.published.certificate import LEAST_SPARE, spare_zeros
from spear.published.greedy import disaggregate
from spear.published.lowrank import LowRank, decompose
from spear.published.one_layer import INDEPENDENT
from spear.published.view import Observed, seen
from spear.reconstruction import Refusal, Terms

ROUNDINGS = 100  # of a row of the gradient, under which its bias entry has vanished


@dataclass(frozen=True)
class Columns:
    """Directions `q` (f, b) of the columns of G, as many as were found, and how: all of them where none is `left`."""

    observed: Observed
    q: Float[Tensor, "f b"]
    left: int = 0
    starts: int = 0
    rounds: int = 0
    spent: str = ""

    @classmethod
    def searched(cls, view: NormalisedView, low: LowRank, terms: Terms) -> "Columns":
        """By the zeros and the signs of one layer."""
        observed = _observed(view, low)[0]
        found = find_columns(observed, terms)
        q = found.q[found.basis]
        return cls(observed, q, low.rank - len(q), found.proposals, found.rounds, found.spent)

    def again(self, view: NormalisedView, low: LowRank, mask: Bool[Tensor, "b m"]) -> "Columns":
        """Of another view of the same batch, from its active units."""
        observed, rows = _observed(view, low)
        vanishing = [torch.linalg.svd(observed.L[~one], full_matrices=False)[2][-1] for one in mask[:, rows]]
        return Columns(observed, torch.stack(vanishing))

    @property
    def inputs(self) -> Float[Tensor, "b n"]:
        """X of the batch, of all columns.

        Raises `Refusal` where these are not independent.
        """
        if not bool(torch.linalg.svdvals(self.q)[-1] > INDEPENDENT):
            raise Refusal("the columns found are not independent")
        return disaggregate(self.observed, self.q)[1].mT

    @property
    def doubt(self) -> str:
        """Why the zeros do not tell the columns, in words; empty where they do."""
        spare = spare_zeros(self.observed, self.q)
        return "" if spare >= LEAST_SPARE else f"a column has {spare} zeros to spare, {LEAST_SPARE} are needed"


def _observed(view: NormalisedView, low: LowRank) -> tuple[Observed, Bool[Tensor, " units"]]:
    """The rows of the layer whose bias gradient does not vanish, and which these are."""
    network, k = view.network, view.network.last
    J, eps = network.augmented(k), 2 * network.precision
    rows = J[:, -1].abs() > ROUNDINGS * eps * J.norm(dim=1)
    if int(rows.sum()) < low.rank:
        raise Refusal("too few units of the last hidden layer are active in some samples, but not in all")
    part = decompose(J[rows], low.rank, eps=eps)
    return seen(part, network.affine(k)[rows] @ part.R.mT, network.weights[k].shape[1], eps), rows


def output_errors(view: NormalisedView, inputs: Float[Tensor, "b n"]) -> Float[Tensor, "b outputs"]:
    """∂L/∂logits of a batch from its inputs of the last hidden layer, by the output layer's gradient.

    Their sum is that of the output bias, or, as BatchNorm gives no more than b - 1 dimensions beside its shift η, what
    ∂L/∂η tells.
    """
    network, k = view.network, view.network.last
    norm, W, total = view.afters[k], network.weights[k + 1], network.bias_gradients[k + 1]
    if total is None:
        total = torch.linalg.pinv(W.mT) @ norm.shift_gradient
    v = normalise(norm, network.activations[k].value(network.apply(k, inputs)))[0]
    extended, wanted = join(v, v.new_ones(len(v))), join(network.weight_gradients[k + 1], total)
    return torch.linalg.pinv(extended.mT) @ wanted.mT
