"""Control variates, as SCAFFOLD's clients add them to the gradient of every local step, taken off an update."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from spear.federated.update import Lazy, SharedUpdate


def without_control(update: SharedUpdate, control: Mapping[str, Tensor]) -> SharedUpdate:
    """The update of a client that had added `control`, c - c_i by parameter name, to each of its gradients.

    A server of SCAFFOLD knows c, which it sends, and c_i, which clients send back. Source: Karimireddy et al. 2020.
    Raises `ValueError` for names or shapes other than the update's, and for momentum, which adds up what was added.
    """
    received = update.gradients
    if update.momentum:
        raise ValueError("with momentum, what control variates added to several steps is not their sum")
    if other := control.keys() ^ received.keys():
        raise ValueError(f"the update and its control variates do not both have {min(other)!r}")
    for name, value in control.items():
        if value.shape != received[name].shape:
            shapes = f"{tuple(value.shape)}, its gradient {tuple(received[name].shape)}"
            raise ValueError(f"the control variate of {name} has shape {shapes}")
    factor = update.loss_scale * (1.0 if update.learning_rate is None else update.learning_rate * update.local_steps)

    def gradient(name: str) -> Tensor:
        return received[name] - factor * control[name].to(received[name])

    return replace(update, gradients=Lazy(tuple(received), gradient))
