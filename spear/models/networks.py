"""Fully connected ReLU networks: the architecture that SPEAR's theorems speak of."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn


def fcnn(
    input_shape: Sequence[int],
    width: int,
    depth: int,
    classes: int,
    *,
    bias: bool = True,
    activation: type[nn.Module] = nn.ReLU,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """A fully connected ReLU network in torch's default initialisation.

    `depth` counts linear layers `fc1`, ..., `fc{depth}` (2 = one hidden layer); all but the last are followed by a ReLU
    (or another `activation`) and have `width` outputs. `input_shape` is the shape of one sample, without the batch
    dimension; inputs are flattened. Weights depend on `seed` alone: torch's global generator is left as it was.

    Raises `ValueError` for a depth under 1, or a width, class count or input shape that is not positive.
    """
    if depth < 1:
        raise ValueError(f"a network needs a depth of at least 1 linear layer, not {depth}")
    sizes = [math.prod(input_shape), *[width] * (depth - 1), classes]
    if min(sizes) < 1:
        raise ValueError(f"input shape {tuple(input_shape)}, width {width} and classes {classes} must be positive")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for k in range(depth):
            layers[f"fc{k + 1}"] = nn.Linear(sizes[k], sizes[k + 1], bias=bias, dtype=dtype)
            if k < depth - 1:
                layers[f"{activation.__name__.lower()}{k + 1}"] = activation()
    return nn.Sequential(layers)
