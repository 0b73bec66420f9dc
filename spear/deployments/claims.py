"""What a client says that it did to its update, held against what the update shows: its word alone stops no attack."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from spear.federated.received import PRECISIONS, check_gradients, rounding_unit
from spear.federated.update import Lazy, SharedUpdate
from spear.published.lowrank import decompose


def words(update: SharedUpdate) -> str:
    """What the client claims; empty where it claims nothing. Noise that was read off the update is no claim."""
    known = isinstance(update.gradients, Lazy) and update.gradients.noise == update.noise
    noise = f"noise of {update.noise:g} per entry" if update.noise and not known else ""
    bits = "" if update.bits is None else f"rounding to {update.bits} bits"
    pruning = "" if update.pruning is None else f"{update.pruning} pruning"
    return ", ".join(claim for claim in (noise, bits, pruning) if claim)


def without(update: SharedUpdate) -> SharedUpdate:
    """The same update, nothing claimed."""
    return replace(update, noise=None, bits=None, pruning=None)


def contradicted(model: nn.Module, update: SharedUpdate) -> bool:
    """Whether the update is a gradient without noise, rounding or gaps, whatever the client claims.

    Each of these raises the rank of a gradient to all that its rows and columns allow; a batch leaves it below, where
    it is smaller than the layer. Raises as `check_gradients` does.
    """
    if not words(update) or update.has_unknown or update.local_steps > 1:
        return False
    if any(g.dtype not in PRECISIONS for g in update.gradients.values()):
        return False
    matrices = [g for g in check_gradients(model, update).values() if g.ndim == 2 and g.any()]
    if not matrices:
        return False
    live = _live(max(matrices, key=lambda g: min(g.shape)))
    return decompose(live.double(), eps=rounding_unit(model, update)).rank < min(live.shape)


def _live(matrix: Tensor) -> Tensor:
    """The rows and columns that are not zero throughout: units that no sample activates, pixels that are always 0."""
    seen = matrix != 0
    return matrix[seen.any(1)][:, torch.where(seen.any(0))[0]]
