"""A gradient as U diag(S) V, and samples taken out of it: each lowers its rank by one, at one weight in the loss."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spear.published.lowrank import LowRank


@dataclass(frozen=True)
class Factors:
    """A gradient as U diag(S) V, with what samples were subtracted from it so far."""

    basis: Float[Tensor, "m r"]
    singular: Float[Tensor, " r"]
    rows: Float[Tensor, "r n1"]

    @classmethod
    def of(cls, low: LowRank) -> "Factors":
        """The same factorisation, with the singular values apart from the rows."""
        singular = low.R.norm(dim=1)
        return cls(low.L, singular, low.R / singular[:, None])

    def place(
        self, deltas: Float[Tensor, "s m"], inputs: Float[Tensor, "s n1"]
    ) -> tuple[Float[Tensor, "s r"], Float[Tensor, "s r"]]:
        """Coordinates of the samples' two sides: t of `deltas` along U, s of `inputs` along V."""
        return deltas @ self.basis, inputs @ self.rows.T

    def without(self, deltas: Float[Tensor, "s m"], inputs: Float[Tensor, "s n1"]) -> "Factors":
        """The gradient less the samples' own outer products, its rank lowered by their number."""
        left, singular, right = subtract(self.singular, *self.place(deltas, inputs))
        return Factors(self.basis @ left, singular, right @ self.rows)


def subtract(
    singular: Float[Tensor, " r"], t: Float[Tensor, "s r"], s: Float[Tensor, "s r"]
) -> tuple[Float[Tensor, "r q"], Float[Tensor, " q"], Float[Tensor, "q r"]]:
    """diag(S) less the samples' t sᵀ, factorised at the rank q = r - s that this leaves."""
    left, values, right = torch.linalg.svd(torch.diag(singular) - t.T @ s)
    rank = len(singular) - len(t)
    return left[:, :rank], values[:rank], right[:rank]


def wedderburn(singular: Float[Tensor, " r"], t: Float[Tensor, "k r"], s: Float[Tensor, "k r"]) -> Float[Tensor, " k"]:
    """The one weight at which each sample's t sᵀ lowers the rank of diag(S) by one (Wedderburn)."""
    return 1 / (s / singular * t).sum(1)
