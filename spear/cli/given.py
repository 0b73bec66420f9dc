"""The update that `spear audit` is given: a file of gradients, weights before and after, or none."""

from pathlib import Path
from typing import Any

from torch import nn

from spear.federated.update import SharedUpdate, difference
from spear.models.tensors import read_tensors


def refuse_both(file: Path | None, before: Path | None, after: Path | None, rate: float | None) -> None:
    """Refuse more than one update, or one without all that its form needs."""
    weights = [before is not None, after is not None]
    if file is not None and any(weights):
        raise ValueError("give UPDATE, or --before, --after and --learning-rate, not both")
    if any(weights) and not (all(weights) and rate is not None):
        raise ValueError("the difference of two sets of weights needs --before, --after and --learning-rate")


def update(
    model: nn.Module, file: Path | None, before: Path | None, after: Path | None, told: dict[str, Any]
) -> SharedUpdate | None:
    """The update, with what the client `told` of its training; None where clients are to be simulated."""
    if file is not None:
        return SharedUpdate.load(file).disclosing(**told)
    if before is not None and after is not None:
        (old, _), (new, _) = read_tensors(before), read_tensors(after)
        return difference(model, old, new, learning_rate=told["learning_rate"]).disclosing(**told)
    if any(value is not None for value in told.values()):
        raise ValueError("what a client disclosed needs its update: UPDATE, or --before and --after")
    return None
