"""From gradient directions down to inputs: labels, one least squares a layer, and what certifies the samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.chain import Problem, Targets, passes
from spear.weighting import decode_weighted

PositiveRule = Callable[[Tensor], Tensor]


def decode(problem: Problem, errors: Float[Tensor, "s outputs"], activated: Float[Tensor, "s outputs"]) -> Targets:
    """Labels and copies of every sample from dLoss/dlogits: k a - errors / unit is a vector of k integer counts.

    Here a is `problem.activate` of the logits. One image may be in the batch several times, with different labels. The
    batch size is the given one; or the smallest that makes all counts integers which add up to it, or else to less:
    samples are missing where their gradients are below rounding. Where no whole numbers fit, labels may be smoothed, or
    each sample has a weight of its own.
    """
    rank, known = len(errors), problem.batch_size
    sizes = [known or rank] if known or problem.reduction == "sum" else range(rank, 2 * rank + 2)
    best, partial = None, None
    for size in sizes:
        spare = 8 if problem.reduction == "sum" and not known else max(size - rank, 0)
        counts, off = _counts(errors / problem.unit(size), activated, spare + 1)
        excess = float(counts.sum()) - (size if known or problem.reduction == "mean" else float(counts.sum()))
        targets = Targets(counts, problem.unit(size), off + max(excess, 0.0))
        if targets.error < 1e-4 and excess == 0:
            return targets
        partial = targets if partial is None and targets.error < 1e-4 else partial
        best = targets if best is None or targets.error < best.error else best
    if partial is not None:
        return partial
    unit = problem.unit(known or rank)
    if problem.loss == "cross_entropy":
        best = min(best, _smoothed(errors, activated, unit), key=lambda t: t.error)
    if best.error < 1e-4:
        return best
    return min(best, decode_weighted(problem, errors, activated, unit), key=lambda t: t.error)


def _smoothed(errors: Float[Tensor, "s classes"], probabilities: Float[Tensor, "s classes"], unit: float) -> Targets:
    """Single copies with label smoothing: p - errors / unit is the same small value off the label, in every sample.

    A value off the label that reaches the label's own is no label, and fewer than four values are no evidence that they
    are even (one image with two labels looks like that): the error is then infinite.
    """
    raw = probabilities - errors / unit
    label = raw.argmax(1, keepdim=True)
    off = torch.ones_like(raw).scatter(1, label, 0) > 0
    counts = torch.full_like(raw, raw[off].median().clamp_min(0))
    counts.scatter_(1, label, 1 - (raw.shape[1] - 1) * counts[:, :1])
    even = raw.shape[0] * (raw.shape[1] - 1) >= 4
    even &= bool((counts.amax(1) > counts.amin(1)).all() and (counts.argmax(1, keepdim=True) == label).all())
    return Targets(counts, unit, float((raw - counts).abs().max()) if even else float("inf"))


def _counts(
    errors: Float[Tensor, "s outputs"], activated: Float[Tensor, "s outputs"], most: int
) -> tuple[Float[Tensor, "s classes"], float]:
    """Per sample the smallest k up to `most` whose counts are integers, or nearest to that; the largest distance.

    With one output, the count of the label 1 is read off, and that of 0 is the rest.
    """
    k = torch.arange(1, most + 1, dtype=activated.dtype, device=activated.device)[:, None, None]
    raw = k * activated - errors
    counts = raw.round().clamp_min(0)
    if raw.shape[2] == 1:
        counts = counts.minimum(k)
    off = (raw - counts).abs().amax(2)
    counts = torch.cat([k - counts, counts], 2) if raw.shape[2] == 1 else counts
    off = off + (counts.sum(2) - k[:, :, 0]).abs()
    fine = off < 1e-4
    best = torch.where(fine.any(0), fine.double().argmax(0), off.argmin(0))
    sample = torch.arange(len(errors), device=errors.device)
    return counts[best, sample], float(off[best, sample].max())


def solve(deltas: Float[Tensor, "s m"], total: Float[Tensor, "m n"]) -> Float[Tensor, "s n"]:
    """The inputs whose outer products with `deltas` sum to the gradient `total`, by least squares.

    Dependent `deltas` give values that are not finite, which no check passes.
    """
    basis, triangle = torch.linalg.qr(deltas.T)
    return torch.linalg.solve_triangular(triangle, basis.T @ total, upper=True)


def activations(
    problem: Problem, rows: Float[Tensor, "s in1"], mask: Bool[Tensor, "s m"], d: Float[Tensor, "s outputs"]
):
    """Split rows = scale * [y; 1] of the last hidden layer into y (s, in) and scale (s,).

    Without a bias the scale follows from the softmax: for the classes other than the label, log d - beta_out is
    the logit up to a constant, and the logits are linear in y.
    """
    k = problem.last
    if problem.biases[k] is not None:
        return rows[:, :-1] / rows[:, -1:], rows[:, -1]
    outputs = (rows @ problem.weights[k].T * mask) @ problem.weights[k + 1].T
    offset = 0 if problem.biases[k + 1] is None else problem.biases[k + 1]
    logits = d.clamp_min(1e-300).log() - offset
    other = d > 0
    centre = lambda x: (x - (x * other).sum(1, keepdim=True) / other.sum(1, keepdim=True)) * other  # noqa: E731
    scale = centre(outputs).pow(2).sum(1) / (centre(outputs) * centre(logits)).sum(1)
    return rows / scale[:, None], scale


def descend(
    problem: Problem,
    rows: Float[Tensor, "s in1"],
    mask: Bool[Tensor, "s m"],
    d: Float[Tensor, "s outputs"],
    *,
    positive: PositiveRule,
    spans: Sequence[Float[Tensor, "_out _rank"]] | None = None,
) -> tuple[Float[Tensor, "s n"], Targets]:
    """From all samples' [y; 1] (up to scale), masks and d at the last hidden layer to inputs and labels.

    One least squares a layer: the gradient of a layer is the back-propagated vectors times its inputs.
    `positive` tells the positive activations from the rounding around zero. With `spans`, orthonormal bases of the
    column spaces of the gradients, masks are corrected until the back-propagated vectors lie in them.
    """
    top = problem.last
    y, scale = activations(problem, rows, mask, d)
    mask = without_mistakes(problem, y, mask, d)
    logits = lambda y: problem.apply(top + 1, problem.apply(top, y) * mask)  # noqa: E731
    errors, shift = d * scale[:, None], float("inf")
    targets = replace(decode(problem, errors, problem.activate(logits(y))), measured=errors)
    for _ in range(4):
        renewed = targets.errors(problem.activate(logits(y)))
        y_new = solve((renewed @ problem.weights[top + 1]) * mask, problem.augmented(top))[:, : y.shape[1]]
        last, shift = shift, float(((y_new - y).norm(dim=1) / y.norm(dim=1)).max())
        if shift > last / 2 or shift < 1e-13:
            break
        y, errors = y_new, renewed
    deltas = (errors @ problem.weights[top + 1]) * mask
    for k in range(top - 1, -1, -1):
        h = deltas @ problem.weights[k + 1]
        deltas = h * (positive(y) if spans is None else corrected(positive(y), h, spans[k]))
        y = solve(deltas, problem.augmented(k))[:, : problem.weights[k].shape[1]]
    return y, targets


def without_mistakes(
    problem: Problem, y: Float[Tensor, "s in1"], mask: Bool[Tensor, "s m"], d: Float[Tensor, "s outputs"]
) -> Bool[Tensor, "s m"]:
    """The masks at the last hidden layer, the pre-activation deciding where h_j is too small for u_j to tell 0 from it.

    Among thousands of units some h_j happens to be as small as the rounding of the directions.
    """
    h = d @ problem.weights[problem.last + 1]
    least = 1e-4 if problem.precision < 1e-12 else 0.03
    faint = h.abs() < least * h.pow(2).mean(1, keepdim=True).sqrt()
    return torch.where(faint, problem.apply(problem.last, y) > 0, mask)


def corrected(
    mask: Bool[Tensor, "s m"], h: Float[Tensor, "s m"], span: Float[Tensor, "m r"], *, rounds: int = 4
) -> Bool[Tensor, "s m"]:
    """Masks near `mask` whose D ∘ h lie nearest to the span: what its projection says of each entry, 0 or h_j."""
    best, least = mask, torch.full_like(h[:, 0], float("inf"))
    for _ in range(rounds):
        u = mask * h
        inside = u @ span @ span.T
        sine = (u - inside).norm(dim=1) / u.norm(dim=1).clamp_min(1e-300)
        best = torch.where((sine < least)[:, None], mask, best)
        least, mask = torch.minimum(sine, least), (2 * inside - h) * h > 0
    return best


def above_noise(y: Float[Tensor, "s m"]) -> Bool[Tensor, "s m"]:
    """Which recovered activations are positive: above four times the most negative entry, a measure of the noise."""
    return y > 4 * torch.maximum(-y.amin(1), 1e-15 * y.amax(1))[:, None]


def above_gap(y: Float[Tensor, "s m"]) -> Bool[Tensor, "s m"]:
    """Which recovered activations are positive: above the widest gap (as a ratio) in each sample's sorted entries.

    For weak samples, whose zeros carry a trace of other samples' activations, all of one sign.
    """
    floor = torch.maximum(-y.amin(1), 1e-15 * y.amax(1))[:, None].clamp_min(1e-300)
    ranked = y.clamp_min(floor).sort(dim=1)[0]
    below = (ranked[:, 1:] / ranked[:, :-1]).argmax(1, keepdim=True)
    return y > ranked.gather(1, below)


@dataclass(frozen=True)
class Check:
    """How well samples explain an update: relative error of the summed gradients in each layer, and of each input."""

    layers: tuple[float, ...]
    inputs: Float[Tensor, " s"]

    @property
    def worst(self) -> float:
        return max(*self.layers, float(self.inputs.max()))


def check(problem: Problem, inputs: Float[Tensor, "s n"], targets: Targets) -> tuple[Check, Float[Tensor, "s n"]]:
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
    return Check(tuple(layers), error), inputs + step[:, : inputs.shape[1]]
