"""A client to attack: its network, its batch and the update that it sends, from the name of a data set and a seed."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear.data import catalog
from spear.federated import clients
from spear.federated.update import SharedUpdate
from spear.models import networks


class Client(NamedTuple):
    """The model, which both sides know, the client's private batch, and the update that the server receives."""

    model: nn.Module
    inputs: Float[Tensor, "b *input_shape"]
    labels: Int[Tensor, " b"]
    update: SharedUpdate


def client(
    dataset: str,
    batch: int,
    *,
    width: int,
    depth: int,
    seed: int,
    activation: type[nn.Module] = nn.ReLU,
    dtype: torch.dtype = torch.float64,
) -> Client:
    """A client that sends the gradient of `batch` samples of a data set, on the `network` of the same seed.

    Raises what `spear.data.load` and `spear.models.fcnn` raise: an unknown or absent data set, a size out of range.
    """
    inputs, labels = catalog.load(dataset, count=batch, seed=seed)
    model = network(dataset, width=width, depth=depth, seed=seed, activation=activation, dtype=dtype)
    inputs = inputs.to(dtype)
    return Client(model, inputs, labels, clients.gradient(model, inputs, labels))


def network(
    dataset: str,
    *,
    width: int,
    depth: int,
    seed: int,
    activation: type[nn.Module] = nn.ReLU,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """A fully connected network that fits a data set's samples and classes (`spear.models.fcnn`)."""
    shape, classes = catalog.shape(dataset), len(catalog.classes(dataset))
    return networks.fcnn(shape, width, depth, classes, activation=activation, seed=seed, dtype=dtype)
