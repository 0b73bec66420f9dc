"""Samples of unequal weight in the loss: what clipping leaves, or an average over clients of unequal size.

A sample of weight c and input x leaves c delta [x; 1]ᵀ in the first gradient: x -> a x, c -> c / a changes only the
bias column, and what that does to the softmax. So weights and inputs are told apart by the biases, and only by them.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import least_squares
from spear.network.problem import NetworkView, Targets, forward, passes

WHOLE_NUMBERS = 1e-4  # distance of label counts from whole numbers from which they are none
ALONE = 1e3  # times the misfit of a label: that of the next, where only one can be meant
ROUNDING = 1e-9  # misfits under this are alike
TRIED = 2**24  # counts that are held against integers together, in numbers: copies beyond are not looked for
MOST_COPIES = 8  # of one image beyond the first, where neither a mean nor a batch size bounds them
EVIDENCE = 4  # values off the label that agree: fewer may do so by chance
EVEN = 1e-6  # relative difference of weights that are one


def weights_of_labels(
    problem: NetworkView, errors: Float[Tensor, "s outputs"], activated: Float[Tensor, "s outputs"]
) -> tuple[Float[Tensor, "s classes"], Float[Tensor, "s classes"]]:
    """The weight of each sample in the loss for every label, by least squares, and what is left of dLoss/dlogits,
    relative to it: infinite where no positive weight fits."""
    own = activated[:, None] - problem.one_hot(torch.arange(problem.classes, device=errors.device))
    weight = (own * errors[:, None]).sum(2) / own.pow(2).sum(2).clamp_min(1e-300)
    off = (errors[:, None] - weight[:, :, None] * own).norm(dim=2) / errors.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return weight, torch.where(weight > 0, off, float("inf"))


def decode_weighted(
    problem: NetworkView, errors: Float[Tensor, "s outputs"], activated: Float[Tensor, "s outputs"], unit: float
) -> Targets:
    """One label and one weight for each sample: dLoss/dlogits is weight (a - e), and that fits a single label.

    The counts are weights in units of `unit`. The error is infinite where two labels fit or none, and where unequal
    weights cannot be told from something else. With two classes any dLoss/dlogits fits some weight, and two images
    whose masks are equal are one with their mean, exactly; so too, nearly, where a network is sure of all but two
    classes: hence each sample of a batch of known size must be there. And layers without a bias do not tell the
    scale of an input from its weight. Where the size is not known, or there are two classes, all weights must be equal:
    the gradient is a multiple of a mean.
    """
    none = Targets(errors.new_zeros(len(errors), problem.classes), unit, float("inf"), whole=False)
    if any(b is None for b in problem.biases):
        return none
    weight, off = weights_of_labels(problem, errors, activated)
    ranked, order = off.sort(dim=1)
    unique = ranked[:, 1] > ALONE * ranked[:, 0].clamp_min(ROUNDING)
    best = order[:, :1]
    counts = torch.zeros_like(weight).scatter(1, best, weight.gather(1, best) / unit)
    error = torch.where(unique, ranked[:, 0], float("inf"))
    targets = Targets(counts, unit, float(error.max()), whole=False)
    told = problem.batch_size == len(errors) and problem.outputs >= (3 if problem.loss == "cross_entropy" else 2)
    return targets if told or _even(targets) else none


def _even(targets: Targets) -> bool:
    """Whether all samples have one weight: the update is a multiple of their mean."""
    copies = targets.copies
    return targets.error < EVEN and float(copies.max() - copies.min()) < EVEN * float(copies.max())


def bias_system(
    problem: NetworkView, deltas: tuple[Float[Tensor, "s _m"], ...] | list[Float[Tensor, "s _m"]]
) -> tuple[Float[Tensor, "s rows"], Float[Tensor, " rows"]]:
    """D and g of Dᵀ c = g, the bias gradients of all layers side by side: g_l = sum of c_i delta_{l,i}."""
    pairs = [(d, g) for d, g in zip(deltas, problem.bias_gradients, strict=True) if g is not None]
    return torch.cat([d for d, _ in pairs], 1), torch.cat([g for _, g in pairs])


def reweighed(problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Targets) -> Targets:
    """Weights anew, by least squares on the bias gradients of all layers: (sum D_l D_lᵀ) c = sum D_l dL/dbeta_l.

    Weights that are one, but for rounding, have one unknown. Such as do not agree with the old ones, or are not
    positive, make the error infinite.
    """
    single = (targets.counts > 0).to(inputs)
    D, g = bias_system(problem, passes(problem, inputs, Targets(single, targets.unit, 0.0)).deltas)
    if not bool(D.isfinite().all()):
        return replace(targets, error=float("inf"))
    mean, summed = targets.copies.mean(), D.sum(0)
    if bool(((targets.copies / mean - 1).abs() < problem.accuracy.weight).all()):
        copies = ((summed @ g) / (summed @ summed)).expand(len(D))
    else:
        copies = torch.linalg.lstsq(D.T, g[:, None]).solution[:, 0]
    agree = (copies > 0) & ((copies / targets.copies - 1).abs() < problem.accuracy.weight)
    error = targets.error if bool(agree.all()) else float("inf")
    return replace(targets, counts=single * copies[:, None], error=error)


def decode(problem: NetworkView, errors: Float[Tensor, "s outputs"], activated: Float[Tensor, "s outputs"]) -> Targets:
    """Labels and copies of every sample from dLoss/dlogits, whose sign may be reversed, as that of after - before is.

    Then `Targets.unit` is negative. Where no labels explain dLoss/dlogits, that is `free`.
    """
    targets = _decode(problem, errors, activated)
    if targets.error < WHOLE_NUMBERS:
        return targets
    turned = _decode(problem, -errors, activated)
    if turned.error < WHOLE_NUMBERS:
        return replace(turned, unit=-turned.unit)
    once = torch.zeros_like(targets.counts)
    once[:, 0] = 1
    return Targets(once, targets.unit, targets.error, errors, computed=False, free=True)


def measured(problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Targets) -> Targets:
    """With dLoss/dlogits of these inputs as the output layer's gradient shows it: G = sum_i d_i [a_i; 1]ᵀ."""
    k = problem.last + 1
    total, a = problem.augmented(k), problem.extend(k, forward(problem, inputs)[0][k])
    return replace(targets, measured=least_squares(a.mT, total.mT))


def _decode(problem: NetworkView, errors: Float[Tensor, "s outputs"], activated: Float[Tensor, "s outputs"]) -> Targets:
    """Labels and copies of every sample from dLoss/dlogits: k a - errors / unit is a vector of k integer counts.

    Here a is `problem.activate` of the logits. One image may be in the batch several times, with different labels. The
    batch size is the given one; or the rank; or the smallest that makes all counts integers which add up to it, or else
    to less: samples are missing where their gradients are below rounding. Where no whole numbers fit, labels may be
    smoothed, or each sample has a weight of its own.
    """
    rank, known = len(errors), problem.batch_size
    sizes = [known or rank] if known or problem.reduction == "sum" else range(rank, 2 * rank + 2)
    best, partial = None, None
    for size in sizes:
        spare = MOST_COPIES if problem.reduction == "sum" and not known else max(size - rank, 0)
        most = min(spare, max(MOST_COPIES, TRIED // max(1, errors.numel()))) + 1
        counts, off = _counts(errors / problem.unit(size), activated, most)
        excess = float(counts.sum()) - (size if known or problem.reduction == "mean" else float(counts.sum()))
        targets = Targets(counts, problem.unit(size), off + max(excess, 0.0))
        if targets.error < WHOLE_NUMBERS and excess == 0 and size == (known or rank):
            return targets
        partial = targets if partial is None and targets.error < WHOLE_NUMBERS else partial
        best = targets if best is None or targets.error < best.error else best
    unit = problem.unit(known or rank)
    weighted = decode_weighted(problem, errors, activated, unit)
    if partial is not None:  # equal copies of every image are the same as one of each, times a factor
        return weighted if _even(weighted) and float(partial.copies.max()) > 1 else partial
    if problem.loss == "cross_entropy":
        best = min(best, _smoothed(errors, activated, unit), key=lambda t: t.error)
    if best.error < WHOLE_NUMBERS:
        return best
    return min(best, weighted, key=lambda t: t.error)


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
    even = raw.shape[0] * (raw.shape[1] - 1) >= EVIDENCE
    even &= bool((counts.amax(1) > counts.amin(1) + 1e-3).all() and (counts.argmax(1, keepdim=True) == label).all())
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
    fine = off < WHOLE_NUMBERS
    best = torch.where(fine.any(0), fine.double().argmax(0), off.argmin(0))
    sample = torch.arange(len(errors), device=errors.device)
    return counts[best, sample], float(off[best, sample].max())
