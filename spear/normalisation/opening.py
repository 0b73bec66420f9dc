"""From a model and an update to what the server knows of a network that normalises, or drops units as it trains."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.federated.received import (
    check_count,
    check_gradients,
    check_size,
    check_width,
    coarsest,
    compute_device,
    input_shape,
    rounding_unit,
)
from spear.federated.update import Lazy, SharedUpdate
from spear.models.layers import Layer
from spear.models.normalised import Normaliser, normalised_chain
from spear.network.problem import NetworkView
from spear.normalisation.problem import Norm, NormalisedView
from spear.reconstruction import Refusal


def open_normalised(
    model: nn.Module,
    update: SharedUpdate,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> NormalisedView | None:
    """The chain behind a model, with the update's gradients and statistics: float64 on `device`, or on the CPU.

    `None` for a model that neither normalises nor drops anything.

    Raises `Refusal` for a model that is not such a chain, and `ValueError` as `spear.attack` does for gradients that do
    not fit.
    """
    chain = normalised_chain(model, update.input_shape)
    if chain is None:
        return None
    (layers, found), gradients = chain, check_gradients(model, update)
    device = compute_device(device)
    count = update.count if batch_size is None else batch_size
    check_count(count)
    check_size(count, layers[0].linear.in_features, update)
    check_width(batch_size, layers[0].linear.out_features, layers[0].name)
    behind = [*(one.norm for one in found), None]
    biased = [_has_bias(layer, norm) for layer, norm in zip(layers, behind, strict=True)]
    for layer, has in zip(layers, biased, strict=True):
        if (missing := layer.missing(gradients)) and (has or not missing.endswith("bias")):
            raise Refusal(f"the network method needs every layer's gradient; the update has none for {missing}")
    moved = lambda x: x.detach().to(device, torch.float64)  # noqa: E731
    received = lambda layer, kind: moved(layer.gradient(f"{layer.name}.{kind}", gradients))  # noqa: E731
    pairs = list(zip(layers, biased, strict=True))
    idle = {layer.own.get(f"{layer.name}.bias") for layer, has in pairs if not has}
    network = NetworkView(
        tuple(moved(layer.linear.weight) for layer in layers),
        tuple(moved(layer.linear.bias) if has else None for layer, has in pairs),
        tuple(received(layer, "weight") for layer in layers),
        tuple(received(layer, "bias") if has else None for layer, has in pairs),
        batch_size or update.count,
        update.reduction,
        rounding_unit(model, _without(update, idle)) / 2,
        input_shape(layers[0].name, layers[0].linear.in_features, update),
        "binary_cross_entropy" if update.loss == "cross_entropy" and _one_output(layers) else update.loss,
        coarsest(model, update),
    )
    norms = tuple(_norm(model, update, gradients, layer, norm) for layer, norm in zip(layers, behind, strict=True))
    return NormalisedView(network, tuple(norm and norm.to(device) for norm in norms[:-1]), tuple(x.drop for x in found))


def _without(update: SharedUpdate, names: set[str | None]) -> SharedUpdate:
    """The update without the gradients that are zero but for rounding: those of biases in front of BatchNorm."""
    g = update.gradients
    lost = (g.rounding, g.noise) if isinstance(g, Lazy) else ()
    return replace(update, gradients=Lazy(tuple(name for name in g if name not in names), g.__getitem__, *lost))


def _one_output(layers: list[Layer]) -> bool:
    return layers[-1].linear.out_features == 1


def _has_bias(layer: Layer, norm: Normaliser | None) -> bool:
    """Whether anything but buffers depends on a layer's bias: BatchNorm takes it off."""
    return layer.linear.bias is not None and (norm is None or norm.kind != "batch")


def _norm(
    model: nn.Module, update: SharedUpdate, gradients: Mapping[str, Tensor], layer: Layer, found: Normaliser | None
) -> Norm | None:
    if found is None:
        return None
    scale, shift = (
        gradients[name].double() if name in gradients else None for name in (found.scale_name, found.shift_name)
    )
    norm = Norm(found.kind, found.scale.double(), found.shift.double(), found.eps, scale, shift)
    if found.kind != "batch":
        return norm
    if scale is None or shift is None:
        why = "without the gradients of its scale and shift, what it takes from a sample's gradient is not known"
        raise Refusal(f"batch normalisation behind {layer.name}: {why}")
    bias = layer.linear.bias
    norm = replace(norm, offset=torch.zeros_like(norm.shift) if bias is None else bias.detach().double())
    told = told_statistics(found, dict(model.named_buffers()), update.buffers or {})
    return norm if told is None else replace(norm, **vars(told))


@dataclass(frozen=True)
class Told:
    """A batch's mean and variance (m,), the latter over b - 1, as running statistics tell them, with their rounding."""

    mean: Float[Tensor, " m"]
    mean_error: Float[Tensor, " m"]
    variance: Float[Tensor, " m"]
    variance_error: Float[Tensor, " m"]


def told_statistics(found: Normaliser, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Told | None:
    """The batch's statistics, where its running ones came and moved at a known rate."""
    names = found.mean_name, found.variance_name
    if not found.rate or not all(name in before and name in after for name in names):
        return None
    told = []
    for name in names:
        old, new = before[name], after[name].to(before[name].device)
        eps = max(torch.finfo(x.dtype).eps for x in (old, new) if x.is_floating_point())
        old, new = old.double(), new.double()
        kept = (1 - found.rate) * old
        told += [(new - kept) / found.rate, eps * (new.abs() + kept.abs()) / found.rate]
    return Told(*told) if bool((told[2] > -told[3]).all()) else None
