"""What a model gives away in training mode: by all layers together, and by batch normalisation's buffers."""

from typing import Any

from torch import nn

from spear.models import tracing
from spear.models.layers import Shape
from spear.models.normalised import normalised_chain
from spear.normalisation.batch_search import MARGIN
from spear.reconstruction import Refusal


def jointly(model: nn.Module, shape: Shape) -> dict[str, dict[str, Any]]:
    """What each linear layer of a network that normalises, or drops units in training, gives away with the others.

    By its name: the words, and the largest batch. Empty for a network of any other form.
    """
    try:
        chain = normalised_chain(model, shape)
    except Refusal:
        return {}
    if chain is None:
        return {}
    layers, between = chain
    mixes = any(one.norm is not None and one.norm.kind == "batch" for one in between)
    narrow = min(layer.linear.out_features for layer in layers[:-1])
    limit = max(0, min((narrow - layers[-1].linear.out_features - MARGIN) // 2, layers[0].linear.in_features) + mixes)
    first = between[0].norm is not None and between[0].norm.kind == "batch"
    whole = "the samples, up to one image common to all" if first else "the samples themselves"
    found = [whole, *["the features that enter it"] * (len(between) - 1)]
    return {
        layer.name: {"jointly": f"{words}, together with all other layers", "limit": limit}
        for layer, words in zip(layers[:-1], found, strict=True)
    }


def statistics(model: nn.Module, shape: Shape) -> tuple[str, ...]:
    """What the buffers of each batch normalisation give away where a client sends them, in words.

    After one step they are known multiples of the batch's own mean and variance.
    """
    said, names = [], [name for name, _ in model.named_modules()]
    layers = tracing.linear_layers(model, shape)
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            continue
        before = [layer for layer in layers if layer.name in names[: names.index(name)]]
        words = f"{name}: mean and variance of {module.num_features} features over the client's batch"
        if len(before) == 1 and before[0].from_data and before[0].linear.in_features <= module.num_features:
            words += ", and with them the mean sample"
        said.append(words)
    return tuple(said)
