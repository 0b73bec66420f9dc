"""The update that a command is given: a file of gradients, weights before and after, or none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from spear.federated import control as variates
from spear.federated.update import SharedUpdate, difference
from spear.models.tensors import read_tensors


def refuse_both(file: Path | None, before: Path | None, after: Path | None, rate: float | None) -> None:
    """Refuse more than one update, or one without all that its form needs."""
    weights = [before is not None, after is not None]
    if file is not None and any(weights):
        raise ValueError("give UPDATE, or --before, --after and --learning-rate, not both")
    if any(weights) and not (all(weights) and rate is not None):
        raise ValueError("the difference of two sets of weights needs --before, --after and --learning-rate")


def without_control(update: SharedUpdate, file: Path | None) -> SharedUpdate:
    """The update without the control variates in a file, where there is one."""
    return update if file is None else variates.without_control(update, read_tensors(file)[0])


def shaped(update: SharedUpdate, shape: tuple[int, ...] | None) -> SharedUpdate:
    """The update with the shape of a sample, where the caller says one. Raises `ValueError` where it says another."""
    if shape is not None and update.input_shape not in (None, shape):
        raise ValueError(f"the update says that a sample has the shape {update.input_shape}, not {shape}")
    return update if shape is None else replace(update, input_shape=shape)


def update(
    model: nn.Module,
    file: Path | None,
    before: Path | None,
    after: Path | None,
    told: dict[str, Any],
    control: Path | None,
) -> SharedUpdate | None:
    """The update, with what the client `told` of its training; None where clients are to be simulated."""
    if file is not None:
        return without_control(SharedUpdate.load(file).disclosing(**told), control)
    if before is not None and after is not None:
        (old, _), (new, _) = read_tensors(before), read_tensors(after)
        change = difference(model, old, new, learning_rate=told["learning_rate"]).disclosing(**told)
        return without_control(change, control)
    if control is not None or any(value is not None for value in told.values()):
        raise ValueError("what a client disclosed needs its update: UPDATE, or --before and --after")
    return None
