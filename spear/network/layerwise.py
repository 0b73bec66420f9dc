"""From gradient directions down to inputs: labels, one least squares a layer, and what certifies the samples."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.directions import unit_rows
from spear.models.streaming import Blocks, product
from spear.network.deflation import SPARE_ROWS
from spear.network.labels import decode
from spear.network.problem import NetworkView, Targets
from spear.published.lowrank import LowRank

ROUNDS = 4  # of softmax and activations, of masks and projections: each shrinks the error by orders, or never will
SETTLED = 1e-13  # a relative change that is rounding
ROUNDING = 1e-15  # of the largest activation: no zero is known better
WIDE = 1e3  # ratio of neighbours between zeros and activations: larger than between zeros, or between activations
UNSEEN = 0.25  # of the gradient's roundoff, relative to the largest activation: what is less may be none
ABOVE = 4  # times the most negative entry: where zeros scatter evenly, one in many batches lies beyond


def solve(deltas: Float[Tensor, "s m"], total: Float[Tensor, "m n"] | Blocks) -> Float[Tensor, "s n"]:
    """The inputs whose outer products with `deltas` sum to the gradient `total`, by least squares.

    Dependent `deltas` give values that are not finite, which no check passes.
    """
    basis, triangle = torch.linalg.qr(deltas.T)
    inside = total.after(basis) if isinstance(total, Blocks) else basis.T @ total
    return torch.linalg.solve_triangular(triangle, inside, upper=True)


def above_noise(y: Float[Tensor, "s m"]) -> Bool[Tensor, "s m"]:
    """Which recovered activations are positive: above four times the most negative entry, a measure of the noise."""
    return y > ABOVE * _scatter(y)


def _scatter(y: Float[Tensor, "s m"]) -> Float[Tensor, "s 1"]:
    """How far recovered zeros lie from zero: the most negative entry of each sample, at least rounding."""
    return torch.maximum(-y.amin(1), ROUNDING * y.amax(1))[:, None]


def above_gap(y: Float[Tensor, "s m"]) -> Bool[Tensor, "s m"]:
    """Which recovered activations are positive: above the widest gap (as a ratio) in each sample's sorted entries.

    For weak samples, whose zeros carry a trace of other samples' activations, all of one sign.
    """
    ranked, ratios = _ratios(y)
    return y > ranked.gather(1, ratios.argmax(1, keepdim=True))


def above_first_gap(y: Float[Tensor, "s m"]) -> Bool[Tensor, "s m"]:
    """Which are positive: above the first wide gap, where one activation is smaller than the others by as much again.

    Of millions of activations in a large batch one will be.
    """
    ranked, ratios = _ratios(y)
    wide = ratios > WIDE
    first = torch.where(wide.any(1), wide.int().argmax(1), ratios.argmax(1))
    return y > ranked.gather(1, first[:, None])


def _ratios(y: Float[Tensor, "s m"]) -> tuple[Float[Tensor, "s m"], Float[Tensor, "s less"]]:
    """Each sample's entries in order, what is noise raised to it, and how many times larger than one the next is."""
    ranked = y.clamp_min(_scatter(y).clamp_min(1e-300)).sort(dim=1)[0]
    return ranked, ranked[:, 1:] / ranked[:, :-1]


PositiveRule = Callable[[Tensor], Tensor]
RULES: tuple[PositiveRule, ...] = above_gap, above_first_gap, above_noise


def activations(
    problem: NetworkView, rows: Float[Tensor, "s in1"], mask: Bool[Tensor, "s m"], d: Float[Tensor, "s outputs"]
) -> tuple[Float[Tensor, "s in"], Float[Tensor, " s"]]:
    """Split rows = scale * [y; 1] of the last hidden layer into y (s, in) and scale (s,).

    Without a bias the scale follows from the softmax: for the classes other than the label, log d - beta_out is
    the logit up to a constant, and the logits are linear in y.
    """
    k = problem.last
    if problem.biases[k] is not None:
        return rows[:, :-1] / rows[:, -1:], rows[:, -1]
    outputs = (product(rows, problem.weights[k]) * mask) @ problem.weights[k + 1].T
    offset = 0 if problem.biases[k + 1] is None else problem.biases[k + 1]
    logits = d.clamp_min(1e-300).log() - offset
    other = d > 0
    outputs, logits = _centred(outputs, other), _centred(logits, other)
    scale = outputs.pow(2).sum(1) / (outputs * logits).sum(1)
    return rows / scale[:, None], scale


def _centred(x: Float[Tensor, "s outputs"], among: Bool[Tensor, "s outputs"]) -> Float[Tensor, "s outputs"]:
    """Each row less the mean of its entries that are `among`; the others 0."""
    return (x - (x * among).sum(1, keepdim=True) / among.sum(1, keepdim=True)) * among


def descend(
    problem: NetworkView,
    rows: Float[Tensor, "s in1"],
    mask: Bool[Tensor, "s m"],
    d: Float[Tensor, "s outputs"],
    *,
    rule: PositiveRule = above_gap,
    computed: bool = True,
) -> tuple[Float[Tensor, "s n"], Targets]:
    """From all samples' [y; 1] (up to scale), masks and d at the last hidden layer to inputs and labels.

    One least squares a layer: the gradient of a layer is the back-propagated vectors times its inputs. `rule` tells
    activations from rounding where their gap and the gradient do not; `computed` is that of `Targets`.
    """
    top = problem.last
    y, scale = activations(problem, rows, mask, d)
    mask = without_mistakes(problem, y, mask, d)
    errors, shift = d * scale[:, None], float("inf")
    targets = replace(decode(problem, errors, _outputs(problem, y, mask)), measured=errors)
    targets = replace(targets, computed=computed and targets.computed)
    for _ in range(ROUNDS if targets.computed else 0):
        renewed = targets.errors(_outputs(problem, y, mask))
        y_new = solve((renewed @ problem.weights[top + 1]) * mask, problem.gradient(top))[:, : y.shape[1]]
        last, shift = shift, float(((y_new - y).norm(dim=1) / y.norm(dim=1)).max())
        if shift > last / 2 or shift < SETTLED:
            break
        y, errors = y_new, renewed
    deltas = (errors @ problem.weights[top + 1]) * mask
    for k in range(top - 1, -1, -1):
        h = problem.back(k + 1, deltas)
        deltas = h * active(problem, k, y, h, rule)
        y = solve(deltas, problem.gradient(k))[:, : problem.weights[k].shape[1]]
    return y, targets


def _outputs(problem: NetworkView, y: Float[Tensor, "s in"], mask: Bool[Tensor, "s m"]) -> Float[Tensor, "s outputs"]:
    """What the loss sees of samples with these activations and this mask at the last hidden layer."""
    return problem.activate(problem.apply(problem.last + 1, problem.apply(problem.last, y) * mask))


def without_mistakes(
    problem: NetworkView, y: Float[Tensor, "s in1"], mask: Bool[Tensor, "s m"], d: Float[Tensor, "s outputs"]
) -> Bool[Tensor, "s m"]:
    """The masks at the last hidden layer, the pre-activation deciding where h_j is too small for u_j to tell 0 from it.

    Among thousands of units some h_j happens to be as small as the rounding of the directions.
    """
    h = d @ problem.weights[problem.last + 1]
    faint = h.abs() < problem.accuracy.faint * h.pow(2).mean(1, keepdim=True).sqrt()
    return torch.where(faint, problem.apply(problem.last, y) > 0, mask)


def active(
    problem: NetworkView, k: int, y: Float[Tensor, "s m"], h: Float[Tensor, "s m"], rule: PositiveRule
) -> Bool[Tensor, "s m"]:
    """Which activations of layer k are positive: those above the gap, if in each sample one is far wider than others.

    Else the gradient decides, if its rank is the batch's, by `h`, what the layers above lead back to them; or the rule.
    Where no zero came out negative, that shows no noise: what may be the gradient's rounding is no activation.
    """
    floor = UNSEEN * problem.precision * y.amax(1, keepdim=True)
    y = torch.where(y < floor, torch.minimum(y, -floor), y)
    widest, next_one = _ratios(y)[1].topk(2, dim=1).values.unbind(1)
    mask, doubt = above_gap(y), (widest < WIDE * next_one).nonzero()[:, 0]
    if not len(doubt):
        return mask
    if problem.factors(k).rank < len(y):
        return rule(y)
    guesses = [other(y[doubt]) for other in RULES]
    return mask.index_put((doubt,), nearest_mask(guesses, h[doubt], problem.factors(k).L))


def nearest_mask(
    masks: Sequence[Bool[Tensor, "s m"]], h: Float[Tensor, "s m"], span: Float[Tensor, "m r"]
) -> Bool[Tensor, "s m"]:
    """For each sample the mask whose D ∘ h lies nearest to the span, of those that the given ones lead to.

    A mask leads on to what the projection onto the span says of each entry, 0 or h_j.
    """
    best, least = masks[0], torch.full_like(h[:, 0], float("inf"))
    for mask in masks:
        for _ in range(ROUNDS):
            u = mask * h
            inside = u @ span @ span.T
            sine = ((u - inside).norm(dim=1) / u.norm(dim=1)).nan_to_num(torch.inf)  # no unit active: none
            best = torch.where((sine < least)[:, None], mask, best)
            least, mask = torch.minimum(sine, least), (2 * inside - h) * h > 0
    return best


def down(
    problem: NetworkView, lows: list[LowRank], y: Float[Tensor, "s m"], until: float = math.inf
) -> tuple[Float[Tensor, "s n"], Bool[Tensor, " s"]]:
    """From each sample's own activations at the last hidden layer's input to its input; which of them are determined.

    On its active units a sample's pre-activations are known, and they determine its place in the row space below,
    as long as more units are active than the rank. What is not done when the clock shows `until` is not determined.
    """
    determined = torch.ones(len(y), dtype=torch.bool, device=y.device)
    for k in range(problem.last - 1, -1, -1):
        rows = unit_rows(lows[k].R)
        lift = problem.lift(k, rows)
        active = above_gap(y)
        determined &= active.sum(1) >= len(rows) + SPARE_ROWS
        s = y.new_zeros(len(y), len(rows))
        for i, (on, z) in enumerate(zip(active, y, strict=True)):
            if time.monotonic() > until:
                determined[i:] = False
                break
            s[i] = torch.linalg.lstsq(lift[on], z[on], driver="gelsd").solution
        y = (s @ rows)[:, : problem.weights[k].shape[1]]
    return y, determined
