"""The closed form for one sample, and labels from the output bias gradient: what was exact before SPEAR."""

import time

import torch
from jaxtyping import Int
from torch import Tensor, nn

from spear.baselines.server import Trial, batch_size_of, prior_softmax, uncertified
from spear.federated.received import check_gradients, compute_device, input_shape
from spear.federated.update import SharedUpdate
from spear.models.tracing import linear_layers
from spear.published import theory
from spear.reconstruction import Reconstruction, Stats


def closed_form(
    model: nn.Module, update: SharedUpdate, *, layer: str | None = None, device: str | torch.device | None = None
) -> Reconstruction:
    """One sample by one division, a row of dL/dW over its entry of dL/dbeta (Phong et al. 2018; Geiping et al. 2020).

    Exact for b = 1, and for it alone (`spear.published.theory.single_sample`). `layer` names a linear layer with a
    bias, whatever follows it; the default is the first that reads the data.

    Raises `ValueError` for more than one sample, for a layer that does not exist or has no bias, and for gradients that
    do not fit the model.
    """
    started = time.monotonic()
    gradients = check_gradients(model, update)
    chosen = [x for x in linear_layers(model) if (x.name == layer if layer else x.from_data)]
    if not chosen or not {f"{chosen[0].name}.weight", f"{chosen[0].name}.bias"} <= gradients.keys():
        raise ValueError(
            f"the closed form needs the gradients of weight and bias of {layer or 'a layer that reads data'}"
        )
    name = chosen[0].name
    dW, dbeta = (gradients[f"{name}.{part}"].to(compute_device(device)) for part in ("weight", "bias"))
    x = theory.single_sample(dW, dbeta)
    shape = input_shape(name, len(x), update) if chosen[0].from_data else (len(x),)
    one = Trial(x.reshape(1, *shape), infer_labels(model, update, batch_size=1), 0.0)
    return uncertified(one, f"one division in {name}", Stats(time.monotonic() - started))


def infer_labels(model: nn.Module, update: SharedUpdate, *, batch_size: int | None = None) -> Int[Tensor, " b"]:
    """The labels of a batch, in ascending order, from the gradient of the last layer's bias.

    It is the mean of p, the softmax, less counts / b. A class of a negative entry occurs for certain; at b = 1 that is
    the label (iDLG, Zhao et al. 2020). The others join one by one where b mean(p) - b dL/dbeta exceeds their count
    most, with the model's p for normal noise in place of the batch's: nearly right before training, a guess after it
    (after Wainakh et al. 2022, label leakage from gradients).

    Raises `ValueError` where the batch size is not known, or the last layer has no bias.
    """
    gradients, count = check_gradients(model, update), batch_size_of(update, batch_size)
    last = linear_layers(model)[-1]
    if f"{last.name}.bias" not in gradients:
        raise ValueError(f"labels are inferred from the bias gradient of {last.name}, which the update does not have")
    g = gradients[f"{last.name}.bias"].double() * (count if update.reduction == "mean" else 1)
    due = count * prior_softmax(model, update).to(g) - g
    counts = (g < 0).long() if int((g < 0).sum()) <= count else torch.zeros_like(g, dtype=torch.long)
    for _ in range(count - int(counts.sum())):
        counts[(due - counts).argmax()] += 1
    return torch.arange(len(g), device=g.device).repeat_interleave(counts)
