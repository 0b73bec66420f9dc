"""How each sample's ∂L/∂z at the first layer turns with its input, through every layer above."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from spear.federated.losses import activate_along
from spear.network.problem import NetworkView, Passes, Targets

MOST_ENTRIES = 2**23  # of derivatives that are held at once


class Derivatives:
    """The derivative of each sample's ∂L/∂z of the first layer along changes of that layer's pre-activations."""

    def __init__(self, problem: NetworkView, run: Passes, targets: Targets, bends: list[Tensor]) -> None:
        self.problem, self.run, self.targets, self.bends = problem, run, targets, bends
        self.logits = problem.apply(problem.last + 1, run.inputs[-1])

    @classmethod
    def of(cls, problem: NetworkView, run: Passes, targets: Targets) -> "Derivatives":
        """Of the batch whose passes are given: each hidden layer's vector before its slope, times phi''."""
        bends = []
        for k, activation in enumerate(problem.activations):
            bends.append((run.deltas[k + 1] @ problem.weights[k + 1]) * activation.at(run.z[k])[2])
        return cls(problem, run, targets, bends)

    def along(self, dz: Float[Tensor, "s q m"], index: Tensor) -> Float[Tensor, "s q m"]:
        """Of the samples `index`, for q changes each: forward with the slopes, back with slopes and bends."""
        problem, changes = self.problem, [dz]
        slopes = [slope[index][:, None] for slope in self.run.slopes]
        for k in range(problem.last):
            changes.append((changes[-1] * slopes[k]) @ problem.weights[k + 1].T)
        moved = (changes[-1] * slopes[-1]) @ problem.weights[-1].T
        logits = self.logits[index][:, None].expand_as(moved)
        along = activate_along(problem.loss, logits.flatten(0, 1), moved.flatten(0, 1)).unflatten(0, moved.shape[:2])
        back = self.targets.unit * self.targets.copies[index][:, None, None] * along
        for k in range(problem.last, -1, -1):
            back = (back @ problem.weights[k + 1]) * slopes[k] + self.bends[k][index][:, None] * changes[k]
        return back


def differences(x: Float[Tensor, "s n"]) -> Float[Tensor, "n q"]:
    """An orthonormal basis of the differences of inputs."""
    return torch.linalg.qr((x[1:] - x[:1]).T)[0]


def turned(
    problem: NetworkView, run: Passes, targets: Targets, basis: Float[Tensor, "m s"], *others: Float[Tensor, "s n"]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Part by part of the samples, (1 - P) J_i E and (1 - P) J_i of each sample's `others`."""
    E, W = differences(run.inputs[0]), problem.weights[0]
    common, derived = E.T @ W.T, Derivatives.of(problem, run, targets)
    parts = torch.arange(len(basis.T), device=basis.device).split(max(1, MOST_ENTRIES // max(1, common.numel())))
    for index in parts:
        own = torch.stack([x[index] @ W.T for x in others], 1)
        moved = derived.along(torch.cat([common.expand(len(index), -1, -1), own], 1), index)
        moved = moved - (moved @ basis) @ basis.T
        yield index, moved[:, : E.shape[1]], moved[:, E.shape[1] :]
