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
from spear.network.problem import view_of
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

    def norms(those: Iterable[Normaliser | None]) -> tuple[Norm | None, ...]:
        made = (_norm(model, update, gradients, layer, norm) for layer, norm in zip(layers, those, strict=False))
        return tuple(norm and norm.to(device) for norm in made)

    afters = norms(one.after for one in found)
    mixed = [norm is not None and norm.kind == "batch" for norm in [*behind[1:], None]]
    afters = tuple(
        norm and (replace(norm, shift_gradient=torch.zeros_like(norm.shift)) if mixes else norm)
        for norm, mixes in zip(afters, mixed, strict=True)  # the next one takes a shift off again
    )
    for layer, norm in zip(layers, afters, strict=False):
        if norm is not None and norm.mean is None:
            why = (
                "where the buffers do not tell them, its mean and deviation are two unknowns of each unit: not searched"
            )
            raise Refusal(f"batch normalisation behind the activation of {layer.name}: {why}")
    return NormalisedView(network, norms(behind), tuple(one.drop for one in found), afters)


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
