"""From a model and an update to what the server knows of a network that normalises, or drops units as it trains."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.federated.received import check_gradients
from spear.federated.update import SharedUpdate
from spear.models.layers import Layer
from spear.models.normalised import Normaliser, normalised_chain
from spear.network.problem import NetworkView, view_of
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
    layers, found = chain
    behind = [one.norm for one in found]
    idle = [layer.name for layer, norm in zip(layers, behind, strict=False) if norm and norm.kind == "batch"]
    network = view_of(layers, model, update, idle=idle, batch_size=batch_size, device=device).widened
    gradients = check_gradients(model, update)
    device = network.weights[0].device

    def norms(those: Iterable[Normaliser | None]) -> list[Norm | None]:
        made = (_norm(model, update, gradients, layer, norm) for layer, norm in zip(layers, those, strict=False))
        return [norm and norm.to(device) for norm in made]

    befores, afters = norms(behind), norms(one.after for one in found)
    for k, layer in enumerate(layers[:-1]):
        before, after = befores[k], afters[k]
        next_mixes = k < network.last and befores[k + 1] is not None and befores[k + 1].mixes
        if after is not None:
            told = _completed(after, network, k, _shift_behind(after, network, k, next_mixes))
            afters[k] = _check_after(layer, told, by_zeros=network.activations[k].is_relu)
        if before is not None and before.mixes:
            homogeneous = network.activations[k].is_relu and after is None
            told = _completed(before, network, k, before.shift_gradient) if homogeneous else before
            befores[k] = _check_before(layer, told, homogeneous=homogeneous)
    return NormalisedView(network, tuple(befores), tuple(one.drop for one in found), tuple(afters))


def _completed(norm: Norm, network: NetworkView, k: int, shift: Float[Tensor, " m"] | None) -> Norm:
    """With this gradient of the shift, and that of the scale as the next layer tells it where the update does not.

    W ∘ ∂L/∂W of that layer, summed over its outputs, is v · ∂L/∂v over the batch for what enters it, hence
    γ ∂L/∂γ + η ∂L/∂η of a BatchNorm that gives v; a ReLU between them, which is homogeneous, changes nothing.
    """
    scale = norm.scale_gradient
    if scale is None and (shift is not None or not bool(norm.shift.any())):
        both = (network.weights[k + 1] * network.weight_gradients[k + 1]).sum(0)
        rest = both if shift is None else both - norm.shift * shift
        scale = torch.where(norm.scale == 0, 0, rest / norm.scale)
    return replace(norm, scale_gradient=scale, shift_gradient=shift)


def _shift_behind(norm: Norm, network: NetworkView, k: int, next_mixes: bool) -> Float[Tensor, " m"] | None:
    """∂L/∂η behind an activation: nothing where a next BatchNorm takes the shift off again, else as that is sent, or as
    the next layer's bias tells."""
    bias = network.bias_gradients[k + 1]
    if next_mixes:
        return torch.zeros_like(norm.shift)
    return norm.shift_gradient if norm.shift_gradient is not None or bias is None else bias @ network.weights[k + 1]


def _check_after(layer: Layer, norm: Norm, *, by_zeros: bool) -> Norm:
    """Raises `Refusal` where BatchNorm behind the activation is not known."""
    behind = f"batch normalisation behind the activation of {layer.name}"
    if norm.mean is None and not by_zeros:
        why = "its mean, which the buffers do not tell, is an unknown of each unit: searched behind ReLU alone"
        raise Refusal(f"{behind}: {why}")
    if norm.shift_gradient is None or norm.scale_gradient is None:
        why = "neither its shift nor the next layer's bias has a gradient that tells the batch's mean one: not searched"
        raise Refusal(f"{behind}: {why}")
    return norm


def _check_before(layer: Layer, norm: Norm, *, homogeneous: bool) -> Norm:
    """Raises `Refusal` where what BatchNorm in front of an activation takes from a gradient is neither told nor
    searched."""
    searched = homogeneous and not bool(norm.shift.any())
    if norm.scale_gradient is not None and (norm.shift_gradient is not None or searched):
        return norm
    why = "without the gradients of its scale and shift, what it takes from a sample's gradient is two unknowns a unit"
    only = "searched where ReLU alone follows and the shift is zero"
    raise Refusal(f"batch normalisation behind {layer.name}: {why}: {only}")


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
