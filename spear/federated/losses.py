"""The losses that a client may have: what each compares with a label, and its slope. Both sides know them."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def logits_of(output: object) -> Float[Tensor, "b c"]:
    """The logits in what a model returns: the tensor, the one called `logits`, or the only one.

    Raises `ValueError` where which of several they are is not known.
    """
    if isinstance(output, Tensor):
        return output
    output = output._asdict() if hasattr(output, "_asdict") else output  # a named tuple
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    if isinstance(named.get("logits"), Tensor):
        return named["logits"]
    parts = output if isinstance(output, Sequence) else named.values()
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) != 1:
        raise ValueError(f"the model returns {len(tensors)} tensors, none of them called logits: a loss reads one")
    return tensors[0]


def activate(loss: str, outputs: Float[Tensor, "*s c"]) -> Float[Tensor, "*s c"]:
    """What the loss compares with the one-hot label: softmax, sigmoid, or the outputs themselves."""
    if loss == "squared_error":
        return outputs
    return outputs.softmax(-1) if loss == "cross_entropy" else outputs.sigmoid()


def activate_along(loss: str, outputs: Float[Tensor, "s c"], direction: Float[Tensor, "s c"]) -> Float[Tensor, "s c"]:
    """The derivative of `activate` along a direction of the outputs."""
    if loss == "squared_error":
        return direction
    p = activate(loss, outputs)
    return (
        p * (direction - (p * direction).sum(1, keepdim=True)) if loss == "cross_entropy" else p * (1 - p) * direction
    )


def one_hot(labels: Int[Tensor, " s"], like: Float[Tensor, "*b c"]) -> Float[Tensor, "s c"]:
    """The outputs that a loss wants for these labels, as many as `like` has: where there is one, it is the label."""
    outputs = like.shape[-1]
    return F.one_hot(labels, max(outputs, 2))[:, -outputs:].to(like)


def slope(loss: str, outputs: int, reduction: str) -> float:
    """dLoss/dlogits of one sample over (`activate` - `one_hot`): but in cross-entropy, a mean is over outputs too."""
    one = 2.0 if loss == "squared_error" else 1.0
    return one if reduction == "sum" or loss == "cross_entropy" else one / outputs
