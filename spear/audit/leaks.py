"""What a model gives away by all layers together, and by batch normalisation's buffers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from spear.blocks.view import MARGIN as LEAST_SPARE
from spear.models import tracing
from spear.models.layers import Block, Layer, Shape
from spear.models.normalised import Between, normalised_chain
from spear.normalisation.batch_search import MARGIN
from spear.reconstruction import Refusal

TOGETHER = "together with all other layers"


def jointly(model: nn.Module, shape: Shape) -> dict[str, dict[str, Any]]:
    """What each linear layer gives away with the others, where by itself it gives nothing.

    That is so behind other activations than ReLU, and in a network that normalises, or drops units in training. By the
    layer's name: the words, and the largest batch. In a network of any other form, what feed-forward blocks give away.
    """
    try:
        chain = normalised_chain(model, shape)
        return _activated(tracing.chain(model, shape)) if chain is None else _normalised(*chain)
    except Refusal:
        return _blocks(tracing.blocks(model, shape))


def _blocks(blocks: Mapping[str, Block]) -> dict[str, dict[str, Any]]:
    """Of layers that an elementwise activation and another layer follow, where no ReLU alone gives as much away."""
    found = {}
    for name, block in blocks.items():
        layer, second = next(part for part in block.begins if part.name == name), block.second.linear
        if layer.rows > 1 or not layer.relu:
            narrow = min(layer.linear.in_features, second.out_features) - 1
            room = min(narrow, (second.in_features + 1 - LEAST_SPARE) // 2)
            alone = "the samples themselves" if layer.from_data else "the features that enter it"
            words = f"each of the {layer.rows} tokens of a sample that enter it" if layer.rows > 1 else alone
            others = " and ".join(part.name for part in (*block.begins, block.second) if part is not layer)
            told = {"jointly": f"{words}, together with {others}", "limit": room // layer.rows}
            found[name] = told | {"rows": layer.rows}
    return found


def _activated(layers: list[Layer]) -> dict[str, dict[str, Any]]:
    limit = min(*(layer.linear.out_features - 1 for layer in layers[:-1]), layers[0].linear.in_features)
    whole = ["the samples themselves", *["the features that enter it"] * (len(layers) - 2)]
    return {
        layer.name: {"jointly": f"{words}, {TOGETHER}", "limit": limit}
        for layer, words in zip(layers[:-1], whole, strict=True)
        if not layer.relu
    }


def _normalised(layers: list[Layer], between: list[Between]) -> dict[str, dict[str, Any]]:
    mixes = between[-1].norm is not None and between[-1].norm.kind == "batch"
    narrow = min(layer.linear.out_features for layer in layers[:-1])
    curved = between[-1].after is not None or not layers[-2].activation.is_relu
    spare = narrow - MARGIN - layers[-1].linear.out_features * (not curved)
    limit = max(0, min(spare // 2, layers[0].linear.in_features) + mixes)
    first = between[0].norm is not None and between[0].norm.kind == "batch"
    whole = "the samples, up to one image common to all" if first else "the samples themselves"
    found = [whole, *["the features that enter it"] * (len(between) - 1)]
    return {
        layer.name: {"jointly": f"{words}, {TOGETHER}", "limit": limit}
        for layer, words in zip(layers[:-1], found, strict=True)
    }


def statistics(model: nn.Module, shape: Shape) -> tuple[str, ...]:
    """What the buffers of each batch normalisation give away where a client sends them, in words.

    After one step they are known multiples of the batch's own mean and variance.
    """
    said, names, behind = [], [name for name, _ in model.named_modules()], _behind_activations(model, shape)
    layers = tracing.linear_layers(model, shape)
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            continue
        before = [layer for layer in layers if layer.name in names[: names.index(name)]]
        words = f"{name}: mean and variance of {module.num_features} features over the client's batch"
        alone = len(before) == 1 and f"{name}.running_mean" not in behind
        if alone and before[0].from_data and before[0].linear.in_features <= module.num_features:
            words += ", and with them the mean sample"
        said.append(words)
    return tuple(said)


def _behind_activations(model: nn.Module, shape: Shape) -> set[str]:
    """The means that a client sends of activations, not of what enters them."""
    try:
        chain = normalised_chain(model, shape)
    except Refusal:
        return set()
    return {one.after.mean_name for one in chain[1] if one.after is not None} if chain else set()
