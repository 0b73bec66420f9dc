"""Parts of samples put together again, by the gradient of a layer that reads all parts of a sample at once.

Such a layer reads their sum, or mean, or all of them side by side. Of each sample, by its dLoss/d(outputs) c there,

    dL/dW = sum_i c_i (y_i1 + ... + y_ir)ᵀ        or        sum_i c_i [y_i1 ... y_ir]ᵀ

and so every part of a sample has the same coefficients c, and each part of the second kind has them in one place only.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spear.models.activations import RELU
from spear.models.layers import Layer

FITS = 1e-6  # of a gradient: what may be left of it beside the parts
ONE = 1e-4  # relative distance of the coefficients of two parts that are of one sample


@dataclass(frozen=True)
class Assembly:
    """Which parts make each sample, `index` (b, rows); in the sample's order, or in none."""

    index: Int[Tensor, "b rows"]
    ordered: bool


def assemble(
    layer: Layer, parts: Float[Tensor, "p n"], others: Iterable[Layer], received: Mapping[str, Tensor]
) -> Assembly | None:
    """The parts that make each sample, by any of the other layers' gradients; `None` where none tells."""
    with torch.no_grad():
        linear = layer.linear
        bias = 0 if linear.bias is None else linear.bias.to(parts)
        z = parts @ linear.weight.to(parts).mT + bias
        Y = layer.after.then_of((layer.activation or RELU).value(z))
    for other in others:
        if other.name == layer.name or other.missing(received) or torch.linalg.matrix_rank(Y) != len(Y):
            continue
        J = other.gradient(f"{other.name}.weight", received).to(Y)
        places = {Y.shape[1]: 1, layer.rows * Y.shape[1]: layer.rows}.get(J.shape[1])
        if places is not None:
            found = _grouped(Y, J.unflatten(1, (places, Y.shape[1])).movedim(1, 0), layer.rows)
            if found is not None:
                return found
    return None


def _grouped(Y: Float[Tensor, "p m"], J: Float[Tensor, "places k m"], rows: int) -> Assembly | None:
    """Parts of equal coefficients, `rows` of each kind, where these are all that the gradient holds."""
    C = torch.linalg.lstsq(Y.mT[None], J.mT).solution  # (places, p, k)
    if not float((J - C.mT @ Y).norm()) < FITS * float(J.norm()):
        return None
    sizes = C.norm(dim=2)
    place = sizes.argmax(0)
    own = C[place, torch.arange(len(Y), device=Y.device)]
    alike = torch.cdist(own, own) < ONE * own.norm(dim=1)
    if not bool((alike.sum(1) == rows).all() and torch.equal(alike, alike.mT)):
        return None
    index = torch.unique(alike.nonzero()[:, 1].reshape(-1, rows), dim=0)
    if len(index) * rows != len(Y):
        return None
    if len(J) == 1:
        return Assembly(index, ordered=False)
    order = place[index].argsort(dim=1)
    whole = torch.equal(place[index].gather(1, order), torch.arange(rows, device=Y.device).expand_as(order))
    return Assembly(index.gather(1, order), ordered=True) if whole else None
