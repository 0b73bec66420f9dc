"""A factor of its own on every tensor, as clipping or scaling each by its norm leaves it: read off, and undone.

Where phi is homogeneous of degree k, phi(c z) = c^k phi(z) for c > 0, Euler's theorem says for each hidden unit j,
whatever the batch and the loss,

    ⟨W_l[j], ∂L/∂W_l[j]⟩ + beta_l[j] ∂L/∂beta_l[j] = k ⟨W_{l+1}[:, j], ∂L/∂W_{l+1}[:, j]⟩

since both are sum_i z_ij ∂L/∂z_ij (for ReLU the balance that gradient flow keeps: Du, Hu, Lee, NeurIPS 2018). The
factors are the only ones with which all units keep it, but for one that all tensors share.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.federated.update import Lazy, SharedUpdate
from spear.models.layers import Layer
from spear.models.tracing import chain
from spear.reconstruction import Refusal

UNITS = 48  # of a layer that are looked at: each makes an equation, a layer has two unknowns
AT_ONCE = 2**20  # entries of a tensor that are held in double precision
KEPT, BROKEN = 30.0, 1e3  # times their rounding: so far equations hold, and from there they do not
APART = 1e3  # times what is left of the equations: so much is left by any other factors


def undone(model: nn.Module, update: SharedUpdate) -> tuple[SharedUpdate, str, float] | None:
    """The update without the factors, that in words, and how far off a factor may be, relative to it: one of small
    biases most. `None` where they are equal, or cannot be told.

    Nothing tells that of the last bias: its gradient is left out. Neither do biases that are zero: then none is told.
    """
    layers = _layers(model, update)
    if layers is None:
        return None
    names, equations, rounding = _balance(layers, update)
    size = equations.norm(dim=0)
    if not bool((size > 0).all()) or len(equations) <= len(names):
        return None
    rounding = float((rounding / size).max())
    _, left, V = torch.linalg.svd(equations / size, full_matrices=False)
    inverse = V[-1] / size
    inverse = inverse / inverse[0]
    told = left[-1] < KEPT * rounding and left[-2] > APART * max(float(left[-1]), rounding)
    broken = equations.sum(1).norm() > BROKEN * rounding * size.norm()
    if not (told and broken and bool((inverse > 0).all())):
        return None
    by_name, received = dict(zip(names, inverse.tolist(), strict=True)), update.gradients
    lazy = Lazy(tuple(names), lambda name: received[name] * by_name[name], rounding=rounding / float(left[-2]))
    words = "every tensor came with a factor of its own, as clipping each by its norm leaves it: undone"
    untold = [name for name in received if name not in by_name]
    words += f", but for {', '.join(untold)}, whose factor nothing tells" if untold else ""
    return replace(update, gradients=lazy), words, lazy.rounding / float(V[-1].abs().min())


def _layers(model: nn.Module, update: SharedUpdate) -> Sequence[Layer] | None:
    """The layers of a network whose activations are homogeneous, if all their gradients came; else `None`."""
    try:
        layers = chain(model, update.input_shape)
    except Refusal:
        return None
    plain = all(not layer.folded and not layer.missing(update.gradients) for layer in layers)
    homogeneous = all(layer.activation.degree is not None for layer in layers[:-1])
    return layers if len(layers) > 1 and plain and homogeneous else None


def _balance(
    layers: Sequence[Layer], update: SharedUpdate
) -> tuple[list[str], Float[Tensor, "units tensors"], Float[Tensor, " tensors"]]:
    """The tensors' names, what each adds to every unit's equation, and how large its rounding is in all of them."""
    names = [layer.own[f"{layer.name}.{kind}"] for layer in layers for kind in _kinds(layer)]
    names = names[:-1] if len(_kinds(layers[-1])) > 1 else names
    parts, rounding = [], torch.zeros(len(names), dtype=torch.float64)
    for low, high in pairwise(layers):
        m = low.linear.out_features
        units = torch.arange(0, m, max(1, m // UNITS))
        part = torch.zeros(len(units), len(names), dtype=torch.float64)
        for layer, kind in (*((low, kind) for kind in _kinds(low)), (high, "weight")):
            column = names.index(layer.own[f"{layer.name}.{kind}"])
            sums, own = _summed(layer, kind, update, units, into=layer is low)
            part[:, column] = sums if layer is low else -low.activation.degree * sums
            rounding[column] += own
        parts.append(part)
    return names, torch.cat(parts), rounding.sqrt()


def _kinds(layer: Layer) -> tuple[str, ...]:
    return ("weight",) if layer.linear.bias is None else ("weight", "bias")


def _summed(
    layer: Layer, kind: str, update: SharedUpdate, units: Tensor, *, into: bool
) -> tuple[Float[Tensor, " units"], float]:
    """The products of a tensor and its gradient, summed for each of some units that it leads `into`, or out of; and the
    variance of all their rounding."""
    g, weights = layer.gradient(f"{layer.name}.{kind}", update.gradients), getattr(layer.linear, kind).detach()
    both = (weights, g) if into else (weights.T, g.T)
    sums, squares = [], 0.0
    for some in units.split(max(1, AT_ONCE // max(1, weights.numel() // len(both[0])))):
        product = torch.mul(*(x[some.to(x.device)].reshape(len(some), -1).cpu().double() for x in both))
        sums.append(product.sum(1))
        squares += float(product.square().sum())
    return torch.cat(sums), torch.finfo(g.dtype).eps ** 2 * squares
