"""The batch held against the update in every layer: what certifies its samples."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.network.labels import reweighed
from spear.network.problem import NetworkView, Targets, passes
from spear.network.recovery import Judged, Reached, number

WHOLE = "every layer's gradient is the sum of the recovered samples'"
CORRECTIONS = 8  # of the inputs: each halves the misfit, or is the last


@dataclass(frozen=True)
class Misfit:
    """How well samples explain an update: relative error of the summed gradients in each layer, and of each input."""

    layers: tuple[float, ...]
    inputs: Float[Tensor, " s"]

    @property
    def worst(self) -> float:
        return max(*self.layers, float(self.inputs.max()))


def check(problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Targets) -> tuple[Misfit, Float[Tensor, "s n"]]:
    """Compare the samples' own gradients with the update in every layer; also returns the inputs after one correction.

    What is left of the first layer's gradient, seen through the pseudo-inverse of its back-propagated vectors, is the
    error that it allows in each input (its component in their span, and the mean effect of the rest as noise): a sample
    with a weak gradient is held to the same relative error as a strong one. Infinite for one whose own dLoss/dlogits is
    not the measured one.
    """
    run = passes(problem, inputs, targets)
    first, layers = inputs, []
    for k in range(len(run.inputs) - 1, -1, -1):
        total = problem.augmented(k)
        first = torch.addmm(total, run.deltas[k].T, problem.extend(k, run.inputs[k]), alpha=-1)
        layers.insert(0, float(first.norm() / total.norm()))
    basis, triangle = torch.linalg.qr(run.deltas[0].T)
    step = torch.linalg.solve_triangular(triangle, basis.T @ first, upper=True)
    eye = torch.eye(len(triangle), dtype=inputs.dtype, device=inputs.device)
    inverse = torch.linalg.solve_triangular(triangle, eye, upper=True)  # its rows are as long as the pseudo-inverse's
    noise = inverse.norm(dim=1) * first.norm() / len(first) ** 0.5
    error = (step.norm(dim=1) + noise) / problem.extend(0, inputs).norm(dim=1)
    logits = problem.apply(problem.last + 1, run.inputs[-1])
    if not targets.whole:  # an input's scale is its weight's: only the bias column tells, by how far its 1 is off
        error = error + step[:, -1].abs() + noise
    error = torch.where(targets.agree(problem.activate(logits)), error, float("inf"))
    return Misfit(tuple(layers), error), inputs + step[:, : inputs.shape[1]]


def judge(problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Targets, reached: Reached) -> Judged:
    """The whole batch held against the update, after corrections that rounding allows."""
    if not targets.whole:
        targets = reweighed(problem, inputs, targets)
    final, inputs = best_check(problem, inputs, targets)
    certified = certify(problem, final, targets)
    sure = certified.nonzero()[:, 0]  # an image that the evidence does not support is never returned
    weights = None if targets.whole else targets.copies[sure] * targets.unit / problem.unit(1)
    counts = (targets.counts if targets.whole else (targets.counts > 0).to(inputs))[sure]
    copies = int(counts.sum().round())
    size = problem.batch_size or (round(problem.unit(1) / targets.unit) if problem.reduction == "mean" else copies)
    good = len(sure) == reached.rank and copies == size
    reason = WHOLE if good else _why(final, targets, len(sure)) or weak(reached, len(sure), copies, size)
    return Judged(inputs[sure], counts, final.inputs[sure], certified[sure], good, reason, reached, weights)


def certify(problem: NetworkView, final: Misfit, targets: Targets) -> Bool[Tensor, " s"]:
    """Which samples of a batch that explains every layer's gradient are exact to 1e-6 (1e-3 for gradients in float32).

    Two images closer than e and with equal masks look like two copies of their mean, up to e squared: copies are held
    to that. Where the batch size is not known, pairs of such images look like one of each: then every layer is.
    """
    accuracy = problem.accuracy
    copied = targets.copies > 1.5 if targets.whole else torch.zeros_like(final.inputs, dtype=torch.bool)
    unsure = bool(copied.any()) or (problem.batch_size is None and problem.reduction == "mean")
    layer = accuracy.copied if unsure else accuracy.layer
    allowed = torch.where(copied, accuracy.copied, accuracy.recovered / 2)
    return (final.inputs < allowed) & (max(final.layers) < layer) & (targets.error < 1e-4)


def best_check(
    problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Targets
) -> tuple[Misfit, Float[Tensor, "s n"]]:
    """Correct the inputs by what the check leaves over, as long as that helps; the best check and its inputs."""
    best, corrected = check(problem, inputs, targets)
    for _ in range(CORRECTIONS):
        if best.worst < problem.accuracy.explained:
            break
        trial, following = check(problem, corrected, targets)
        before, after = max(best.layers), max(trial.layers)
        if not after < before:
            break
        slow = after > before / 2
        best, inputs, corrected = trial, corrected, following
        if slow:
            break
    return best, inputs


def _why(final: Misfit, targets: Targets, certain: int) -> str:
    """Why no sample is certain: labels that are none, or an unexplained rest; empty where some are."""
    if targets.error >= 1e-4:
        off = f"labels do not come out as whole numbers (off by {targets.error:.1e})"
        return f"{off}: neither hard nor evenly smoothed labels of equal weight"
    layer, sample = max(final.layers), float(final.inputs.max())
    rest = f"the samples' gradients leave {layer:.1e} of a layer's gradient, {sample:.1e} of an input, unexplained"
    return "" if certain else rest


def weak(reached: Reached, certain: int, copies: int, size: int) -> str:
    """Why only some samples are certain: the others' gradients are weak, or lie under the noise floor altogether."""
    visible, hidden = reached.rank - certain, max(size - copies - (reached.rank - certain), 0)
    said = [f"{copies} of {size} samples are certain"]
    if visible:
        said.append(f"too weak for a certificate: {visible} of {reached.rank} gradient directions")
    if hidden:
        floor = f"{reached.noise:.0e} of the strongest direction"
        said.append(f"under the noise floor, {floor}: {number(hidden, 'sample')}")
    return "; ".join(said)
