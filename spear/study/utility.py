"""What a defence costs: the accuracy of a network that is trained on the updates that it lets through."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from spear.data import catalog
from spear.federated.update import SharedUpdate, as_gradient
from spear.study.clients import network

Sender = Callable[[nn.Module, Tensor, Tensor, Generator], SharedUpdate]
HELD_OUT = 0.3  # of the samples


def accuracy(
    sender: Sender,
    dataset: str,
    *,
    steps: int,
    seed: int,
    samples: int = 1000,
    batch: int = 64,
    width: int = 100,
    depth: int = 3,
    learning_rate: float = 0.3,
) -> float:
    """Share of held-out samples that are classified right after `steps` of SGD on what the client sends.

    `sender(model, inputs, labels, generator)` is the client: it makes an update of a batch, defence included. Batches
    are drawn with `seed`, the same for every sender. Raises as `spear.data.load` does.
    """
    inputs, labels = catalog.load(dataset, count=samples, seed=seed)
    model, known = network(dataset, width=width, depth=depth, seed=seed), round((1 - HELD_OUT) * samples)
    for step in range(steps):
        generator = Generator().manual_seed(seed + step)
        picked = torch.randint(known, (batch,), generator=generator)
        update = as_gradient(sender(model, inputs[picked], labels[picked], generator))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= learning_rate * update.gradients[name]
    with torch.no_grad():
        return float((model(inputs[known:]).argmax(1) == labels[known:]).double().mean())
