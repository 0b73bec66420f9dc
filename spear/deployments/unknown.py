"""Updates of which entries are not known, told or not: the others are completed."""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from spear.deployments import pruning
from spear.federated import missing
from spear.federated.update import Lazy, SharedUpdate
from spear.network.problem import NetworkView, open_network, plain
from spear.reconstruction import Reconstruction, Terms


def marked(update: SharedUpdate) -> SharedUpdate | None:
    """The update with NaN where its values show cuts at a bound, or zeros for small entries; `None` where they do not.

    A part of what arrived exactly may be marked too.
    """
    cut = missing.cuts(update.gradients)
    if not cut:
        return None
    return replace(update, known={name: ~cut.unknown(name, g) for name, g in update.gradients.items()})


def recover(
    model: nn.Module, update: SharedUpdate, batch_size: int | None, device: str | torch.device | None, terms: Terms
) -> Reconstruction:
    """The batch behind an update of which entries are NaN; certified where it explains each of the others.

    Raises `Refusal` for a model that is no chain of linear layers with ReLU, and as `open_network` does.
    """
    received = update.gradients
    numbers = replace(update, gradients=Lazy(tuple(received), lambda name: _number(received[name])))
    there = Lazy(tuple(received), lambda name: (~received[name].isnan()).double())
    options = {"batch_size": batch_size, "device": device}
    problem = plain(open_network(model, numbers, **options))
    masks = open_network(model, replace(numbers, gradients=there), **options)
    return pruning.recover(problem, terms, _kept(masks, problem, update.pruning is not None))


def _number(g: Tensor) -> Tensor:
    return torch.where(g.isnan(), 0, g)


def _kept(masks: NetworkView, problem: NetworkView, pruned: bool) -> tuple[Bool[Tensor, "_m _n"], ...]:
    """Which entries of every layer's gradient arrived; `pruned`: of those only what is not zero."""
    layers = range(problem.last + 2)
    return tuple((masks.augmented(k) != 0) & ((problem.augmented(k) != 0) | (not pruned)) for k in layers)
