"""What was recovered, given back as the model's own input: in its order, its units and its shape."""

from dataclasses import replace

import torch
from torch import nn

from spear.federated.assembly import assemble
from spear.federated.update import SharedUpdate
from spear.models.layers import Layer, Path
from spear.models.tracing import doubts, each_layer, one_output
from spear.reconstruction import Reconstruction

ZERO = 1e-6  # of a sample's largest entry: less than that is zero


def as_given(model: nn.Module, update: SharedUpdate, layer: str | None, result: Reconstruction) -> Reconstruction:
    """The result with the samples as the model takes them, where what enters the attacked layer determines them.

    What is not certain of the samples, though it is of what enters the layer, is not certified. An incomplete result
    names what the model does otherwise in training mode.
    """
    if len(result.inputs):
        name = layer or result.features_of
        chosen = (x for x in each_layer(model, update.input_shape) if (x.name == name if name else x.from_data))
        found = next(chosen, None)
        if found is not None and found.path is not None:
            if tuple(result.inputs.shape[1:]) == update.input_shape and found.rows > 1:
                pass  # samples already, by another layer than the one that reads their parts
            elif found.rows > 1:
                result = _together(model, update, result, found)
            else:
                result = _undone(result, found, update.input_shape)
        elif found is not None:
            result = replace(result, features_of=found.name)
    if update.loss == "cross_entropy" and one_output(model, update.input_shape):
        result = replace(result, reason=f"{result.reason}; the model has one output: binary cross-entropy was assumed")
    if not result.complete and (off := doubts(model, update.input_shape)):
        other = f"the model has {off}, off here: a client that had it on sent the gradient of another function"
        return replace(result, reason=f"{result.reason}; {other}")
    return result


def _together(model: nn.Module, update: SharedUpdate, result: Reconstruction, found: Layer) -> Reconstruction:
    """Parts put together to samples, where another layer's gradient tells which belong together."""
    layers = each_layer(model, update.input_shape)
    whole = assemble(found, result.inputs.flatten(1), layers, update.gradients)
    if whole is None:
        return _as_entered(result, found)
    each = result.certified[whole.index].all(1)
    if not whole.ordered:
        order = whole.index.flatten()
        told = {name: getattr(result, name)[order] for name in ("inputs", "residuals", "certified", "error_bound")}
        words = f"{found.rows} after one another are of one sample, in an order that nothing shows"
        return _as_entered(replace(result, **told, reason=f"{result.reason}; {words}"), found)
    inputs = result.inputs[whole.index].flatten(1)
    told = {name: getattr(result, name)[whole.index].amax(1) for name in ("residuals", "error_bound")}
    reason = f"{result.reason}; the {found.rows} parts of each sample that {found.name} reads were put together"
    result = replace(result, inputs=inputs, rank=len(inputs), certified=each, reason=reason, **told)
    if found.path.change.is_plain and update.input_shape is not None:
        result = replace(result, inputs=inputs.unflatten(1, update.input_shape))
    return _undone(result, found, update.input_shape)


def _as_entered(result: Reconstruction, found: Layer) -> Reconstruction:
    """Parts of samples, as they enter a layer that reads them by parts."""
    change = found.path.change
    plain = bool((change.factor == 1).all()) and not bool(change.shift.any())
    words = f"each is one of the {found.rows} parts of a sample that {found.name} reads"
    words += "" if plain else ", as it enters"
    return replace(result, reason=f"{result.reason}; {words}")


def _undone(result: Reconstruction, found: Layer, shape: tuple[int, ...] | None) -> Reconstruction:
    """Samples in the model's own order and units."""
    path, entered = found.path, result.inputs.flatten(1)
    said = []
    if not path.change.is_plain:
        result = _in_units(result, path, shape)
        if path.guessed and not path.change.keeps_order:
            said.append(f"a sample is taken to have the shape {tuple(result.inputs.shape[1:])}")
    certified = result.certified & (result.error_bound <= result.limit)
    if not torch.equal(certified, result.certified):
        said.append(f"what enters {found.name} is certain, the sample less so")
    if path.off:
        size = entered.abs()
        dropped = (size <= ZERO * size.amax(1, keepdim=True)).any(1)
        certified = certified & ~dropped
        said += [f"{path.off} stands before {found.name}: zeros may be what it dropped"] * bool(dropped.any())
    complete = result.complete and bool(certified.all())
    return replace(result, certified=certified, complete=complete, reason="; ".join([result.reason, *said]))


def _in_units(result: Reconstruction, path: Path, shape: tuple[int, ...] | None) -> Reconstruction:
    """The samples behind what enters a layer, and how far off they may be."""
    entered = result.inputs.flatten(1)
    shape = shape or (entered.shape[1:] if path.change.keeps_order else path.shape)
    growth = path.change.growth(entered)
    errors = None if result.expected_error is None else result.expected_error * growth
    inputs = path.change.back(entered).unflatten(1, shape).contiguous()
    bound = (result.error_bound + path.change.error) * growth
    apart = result.difference_bound
    if apart is not None:
        apart = apart * path.change.stretch(entered - entered.mean(0))
    return replace(result, inputs=inputs, error_bound=bound, expected_error=errors, difference_bound=apart)
