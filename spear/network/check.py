"""The batch held against the update in every layer: what certifies its samples."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from spear.certificate import BY_BIASES, TWO_CLASSES, Certificate, length_by_labels, length_by_reader
from spear.models.streaming import Blocks, product
from spear.network.curved_bounds import Levers
from spear.network.error_bounds import input_bounds, softened
from spear.network.labels import WHOLE_NUMBERS, measured, reweighed
from spear.network.problem import NetworkView, Passes, Targets, forward, passes
from spear.network.recovery import Judged, Reached, number
from spear.network.rest import rest_of

WHOLE = "every layer's gradient is the sum of the recovered samples'"
AS_MEASURED = "not certified: the softmax of such large logits multiplies their rounding"
FITS = 4  # of dLoss/dlogits and inputs, in turn, where no labels tell the former
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
    basis, triangle = torch.linalg.qr(run.deltas[0].T)
    first = rest_of(problem, 0, run, basis)
    others = [rest_of(problem, k, run) for k in range(1, len(run.inputs))]
    layers = [rest.size / rest.whole if rest.whole else math.inf for rest in (first, *others)]
    step = torch.linalg.solve_triangular(triangle, first.inside, upper=True)
    eye = torch.eye(len(triangle), dtype=inputs.dtype, device=inputs.device)
    inverse = torch.linalg.solve_triangular(triangle, eye, upper=True)  # its rows are as long as the pseudo-inverse's
    noise = inverse.norm(dim=1) * first.size / len(basis) ** 0.5
    error = (step.norm(dim=1) + noise) / problem.extend(0, inputs).norm(dim=1)
    logits = problem.apply(problem.last + 1, run.inputs[-1])
    if not targets.whole:  # an input's scale is its weight's: only the bias column tells, by how far its 1 is off
        error = error + step[:, -1].abs() + noise
    error = torch.where(targets.agree(problem.activate(logits)), error, float("inf"))
    return Misfit(tuple(layers), error), inputs + step[:, : inputs.shape[1]]


def judge(
    problem: NetworkView,
    inputs: Float[Tensor, "s n"],
    targets: Targets,
    reached: Reached,
    known: Levers | None = None,
) -> Judged:
    """The whole batch held against the update, after corrections that rounding allows; `known` as in `input_bounds`."""
    least, most = float(targets.copies.min()), float(targets.copies.max())
    if least == most > 1 and len(targets) == problem.batch_size:  # one of each, times a factor
        targets = replace(targets, whole=False)
    if not targets.whole:
        targets = reweighed(problem, inputs, targets)
    for _ in range(FITS if targets.free and bool(inputs.isfinite().all()) else 0):
        targets = measured(problem, inputs, targets)
        inputs = best_check(problem, inputs, targets)[1]
    final, inputs = best_check(problem, inputs, targets)
    of_any = replace(problem, loss="squared_error") if targets.free else problem  # of which any dLoss/dlogits may be
    run = passes(problem, inputs, targets)
    bound = input_bounds(of_any, run, targets, known)
    reserve = open_by_labels(problem, run, targets, final)
    if reserve and bool((open_lengths(problem, run) <= problem.accuracy.recovered).all()):
        reserve = ""
    evidence = certificate(problem, final, targets, bound, reserve=reserve)
    return conclude(problem, evidence, inputs, targets, final, reached, WHOLE)


def open_by_labels(problem: NetworkView, run: Passes, targets: Targets, final: Misfit) -> str:
    """Why the labels leave open how long inputs are, in words; empty where they tell it, or nothing but they could."""
    if problem.biases[0] is None:
        return ""
    error = final.inputs.clamp_min(max(*final.layers, 2 * problem.precision))
    along, own = softened(problem, run, targets)
    told = not targets.free and length_by_labels(own, along, error, whole=targets.whole) <= problem.accuracy.recovered
    return "" if told else f"not certified: {BY_BIASES}"


def open_lengths(problem: NetworkView, run: Passes) -> Float[Tensor, " s"]:
    """By what share each input can be longer or shorter where no loss tells it: infinite behind biases that are zero.

    Then x / 2 with twice its dLoss/dlogits leaves the same in every weight's gradient, twice as much in the biases'.
    """
    least, moved = torch.full_like(run.inputs[0][:, 0], math.inf), run.inputs[0]
    for k in range(problem.last + 1):
        moved = product(moved, problem.weights[k]) * run.slopes[k]  # of the next layer's inputs by the length of x
        J = Blocks(problem.weight_gradients[k + 1], None, problem.weights[-1])
        shares, _ = length_by_reader(run.inputs[k + 1], moved, J, 2 * problem.precision)
        least = torch.minimum(least, shares)
    return least


def certificate(
    problem: NetworkView,
    final: Misfit,
    targets: Targets,
    bound: Float[Tensor, " s"],
    doubt: str = "",
    reserve: str = "",
) -> Certificate:
    """The evidence for a batch that is to explain every layer's gradient, whose inputs' errors are under `bound`.

    `doubt` and `reserve` are what is held against it beforehand.
    """
    off = f"labels do not come out as whole numbers (off by {targets.error:.1e})"
    if targets.error >= WHOLE_NUMBERS and not targets.free:
        doubt = f"{off}: neither hard nor evenly smoothed labels of equal weight"
    reserve = reserve if targets.computed or targets.free else AS_MEASURED
    if targets.free and (problem.biases[0] is None or not all(phi.is_flat for phi in problem.activations)):
        reserve = "not certified: without labels nothing is certain but behind biases and slopes of a few values"
    if not targets.whole and problem.outputs <= 2:
        reserve = TWO_CLASSES
    return Certificate(
        copies=targets.copies.round().long() if targets.whole else torch.ones_like(bound).long(),
        disclosed=problem.batch_size,
        residual=max(final.layers),
        limit=problem.accuracy.layer,
        error_bound=torch.where(final.inputs.isfinite(), bound, torch.inf),
        allowed=problem.accuracy.recovered,
        doubt=doubt,
        reserve=reserve,
    )


def conclude(
    problem: NetworkView,
    evidence: Certificate,
    inputs: Float[Tensor, "s n"],
    targets: Targets,
    final: Misfit,
    reached: Reached,
    whole: str,
) -> Judged:
    """What the evidence supports, certified or not; an image that it does not support is never returned."""
    sound = evidence.supported.nonzero()[:, 0]
    complete = evidence.holds and len(sound) == reached.rank
    reason = whole if complete else evidence.why_not() or weak(reached, len(sound), problem.batch_size)
    numbers = None
    if targets.free:
        others = f"another loss than {problem.loss}, soft labels, or numbers to compare with"
        reason += f"; no labels: none explains the gradients: {others}"
    if targets.free and problem.loss == "squared_error":
        unit = problem.unit(problem.batch_size or len(targets))
        numbers = (forward(problem, inputs)[1] - targets.measured / unit)[sound]
        reason += "; targets are the numbers, if the error is squared and all weigh alike"
    weights = None if targets.whole else targets.copies[sound] * abs(targets.unit) / problem.unit(1)
    counts = claimed(problem, (targets.counts if targets.whole else (targets.counts > 0).to(inputs))[sound])
    said = reason + multiple(problem, targets), reached
    judged = final.inputs[sound], evidence.certified[sound], complete, *said, weights, evidence.error_bound[sound]
    return Judged(inputs[sound], counts, *judged, labelled=not targets.free, targets=numbers)


def claimed(problem: NetworkView, counts: Float[Tensor, "s classes"]) -> Float[Tensor, "s classes"]:
    """The copies that the update shows, if the client's count bears them out; else each image once with each label."""
    whole = counts.round().long()
    if bool(((counts - whole).abs() > WHOLE_NUMBERS).any()):  # smoothed labels
        return counts
    borne = int(whole.sum()) == problem.batch_size and math.gcd(*whole.flatten().tolist()) == 1
    return counts if borne else (whole > 0).to(counts)


def multiple(problem: NetworkView, targets: Targets) -> str:
    """By how much the update is more than the mean, or the sum, of these samples, each once; in words."""
    size, same = problem.batch_size or len(targets), problem.accuracy.weight
    factor = targets.copies * targets.unit / problem.unit(size)
    least, most = float(factor.min()), float(factor.max())
    if most - least > same * abs(most):
        return (
            "" if targets.whole else f"; their weights in the loss differ, from {least:.3g} to {most:.3g} of the mean's"
        )
    if abs(most - 1) < same:
        return ""
    if abs(most + 1) < same:
        return f"; the update has the opposite sign of their {problem.reduction}: that of after - before"
    return f"; the update is {most:.6g} times their {problem.reduction}"


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


def weak(reached: Reached, found: int, size: int | None) -> str:
    """Why not the whole batch was found: the others' gradients are weak, or lie under the noise floor altogether."""
    visible, hidden = reached.rank - found, max((size or 0) - reached.rank, 0)
    said = [f"{found} of {size or reached.rank} samples were found"]
    if visible:
        said.append(f"too weak for a certificate: {visible} of {reached.rank} gradient directions")
    if hidden:
        floor = f"{reached.noise:.0e} of the strongest direction"
        said.append(f"under the noise floor, {floor}: {number(hidden, 'sample')}")
    return "; ".join(said)
