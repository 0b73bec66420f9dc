"""Whole batches of networks that normalise in training mode, from every layer of the update."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spear.certificate import TWO_CLASSES
from spear.network.curves.search import CurveSearch
from spear.network.recovery import Judged, Reached, nothing, number
from spear.network.spaces import possible_errors
from spear.network.starts import shown_factor
from spear.normalisation.batch_search import MARGIN, BatchSearch
from spear.normalisation.columns import Columns
from spear.normalisation.descent import Known, Multiple, descend
from spear.normalisation.judge import judge
from spear.normalisation.last_layer import ROUGHEST, Search, anew, searched, solved
from spear.normalisation.partial import from_gradient, inputs_alone
from spear.normalisation.problem import Norm, NormalisedView
from spear.normalisation.replay import Run, corrected
from spear.normalisation.sample_search import SampleSearch
from spear.normalisation.statistics import Deviation, deviation, from_buffers
from spear.published.lowrank import MIN_GAP, LowRank
from spear.reconstruction import Reconstruction, Refusal, Terms, larger

SMALL, LARGE = 0.1, 10.0  # factors of an update between which its samples are found without knowing it
MULTIPLES = 3  # tries of factors, each from the samples that the one before led to


def recover(view: NormalisedView, terms: Terms) -> Reconstruction:
    """Recover the whole batch behind the gradients of a network that normalises, or drops units, as it trains.

    Nothing is returned that the update does not support. Of a multiple of the gradient, as clipping its norm leaves it,
    the samples tell the factor, where they are found before it is known. Where BatchNorm follows the first layer, the
    inputs come with the mean that the running mean tells; `Reconstruction.difference_bound` says of which the
    differences are certain.

    Raises `Refusal` where no search can begin, `ValueError` for a gradient that is zero.
    """
    rank = view.network.factors(view.network.last).rank + view.mixes
    result, rough = _of_multiple(view, terms, 1.0), shown_factor(view.network, rank)
    told = any(norm is not None and norm.variance is not None for norm in view.afters)
    if not len(result.inputs) and told and rank > 1:
        result = larger(result, _of_multiple(_over_all(view, rank), terms, 1.0))
    if len(result.inputs) or rough <= 0 or SMALL < rough < LARGE or terms.budget.spent(result.stats.proposals):
        return result
    return larger(result, _of_multiple(view, terms, rough))


def _over_all(view: NormalisedView, size: int) -> NormalisedView:
    """The same where running variances behind activations are over b, not over b - 1: only one leads to samples."""

    def of(norm: Norm | None) -> Norm | None:
        if norm is None or norm.variance is None:
            return norm
        more = size / (size - 1)
        return replace(norm, variance=more * norm.variance, variance_error=more * norm.variance_error)

    return replace(view, afters=tuple(map(of, view.afters)))


def _of_multiple(view: NormalisedView, terms: Terms, factor: float) -> Reconstruction:
    """The batch behind an update that is about a factor times its gradient; which one exactly, the samples tell."""
    words, reserve = "", TWO_CLASSES if view.network.outputs <= 2 else ""
    for _ in range(MULTIPLES):
        try:
            result = _recovered(view, terms) if factor == 1 else _recovered(view.over(factor), terms, reserve)
        except Multiple as multiple:
            factor *= multiple.factor
            words = f"; the update is {factor:.6g} times their mean"
        else:
            return replace(result, reason=result.reason + words)
    raise Refusal(f"what multiple of a gradient the update is does not come out the same twice: {factor:.6g}")


def _recovered(view: NormalisedView, terms: Terms, reserve: str = "") -> Reconstruction:
    """The same. Raises `Multiple` where the update is a factor times a gradient; `reserve` as in `judge`."""
    network = view.network
    known = known_layers(view)
    _check_reach(view, known[-1].low)
    known[-1], run = searched(view, known[-1], terms)
    size, low = known[-1].low.rank + view.mixes, known[-1].low
    reached = Reached(size, low.noise / low.largest, size - run.left, run.starts, run.rounds)
    if run.left:
        return _partly(view, known, run, reached).entries(network, terms.budget.elapsed, "network")
    try:
        inputs, targets, kept = descend(view, *solved(view, known[-1], run), known)
    except Refusal as refusal:
        none = nothing(network, f"{reached}; {refusal}", reached)
        return none.entries(network, terms.budget.elapsed, "network")
    rest = partial(_again, run=run, before=known)
    against = {"doubt": _others(run), "reserve": reserve}
    return judge(view, inputs, targets, kept, known, reached, terms.budget, again=rest, **against)


def _partly(view: NormalisedView, known: Sequence[Known], run: Search, reached: Reached) -> Judged:
    """The samples found while others are missing, as far as each by itself leads to an input; none is certified."""
    network, empty = view.network, nothing(view.network, str(reached), reached)
    if isinstance(run, BatchSearch) and run.lacking:
        return replace(empty, reason=f"{reached}; {run.lacking}")
    if isinstance(run, BatchSearch) and run.accept > ROUGHEST:
        off = f"epsilon tells the batch's deviations to {known[-1].before.usual:.0e} only"
        return replace(empty, reason=f"{reached}; {off}: too rough for samples to be told apart from what is none")
    if isinstance(run, Columns):
        return replace(empty, reason=f"{reached}; {run.spent}")
    if not reached.found:
        why = "; searched from a rough mean gradient, as no shift tells it" * view.lacks_level
        return replace(empty, reason=f"{reached}{why}")
    if not view.is_told:
        return replace(empty, reason=f"{reached}; only all samples tell what batch normalisation without a shift takes")
    if any(view.lacks_mean(k) for k in range(view.network.last)):
        return replace(empty, reason=f"{reached}; only all samples tell the statistics behind a layer's activation")
    if isinstance(run, SampleSearch):
        g = run.found.t @ run.whole.basis.mT
        inputs = from_gradient(view, network.last, g / view.scale(network.last), known[-1], reached.rank)
        inputs = inputs if not view.needs_all else torch.full_like(inputs, torch.nan)
        errors = run.found.d
    else:
        inputs, errors, _ = solved(view, known[-1], run)
    try:
        inputs = inputs_alone(view, inputs, errors, known, reached.rank)
    except Refusal as refusal:
        return replace(empty, reason=f"{reached}; {refusal}")
    sound = inputs.isfinite().all(1)
    if not bool(sound.any()):
        return replace(empty, reason=f"{reached}; none of them leads to an input without the gradients of all")
    labels = (errors[:, 0] < 0).long() if network.outputs == 1 else errors.argmin(1)
    counts = F.one_hot(labels[sound], network.classes).to(inputs)
    said = f"{reached}; found one by one: {number(int(sound.sum()), 'sample')}, none certified while others are missing"
    said += "; one image common to all is lost" * view.loses_mean
    none = torch.zeros_like(labels[sound])
    return Judged(inputs[sound], counts, none.to(inputs), none.bool(), False, said, reached)


def _others(run: Search) -> str:
    """What speaks against samples on curves, which no theorem says to be the only ones: a round that finds others; and
    against columns that their zeros do not fix."""
    if isinstance(run, Columns):
        return run.doubt
    if not isinstance(run, CurveSearch):
        return ""
    probe = CurveSearch(run.problem, run.whole, run.generator, run.drawn.prior)
    probe.until = run.until
    others = probe.strangers(run.known)
    return f"{number(others, 'other sample')} would fit the gradient as well" if others else ""


def _again(view: NormalisedView, own: Run, *, run: Search, before: Sequence[Known]) -> Float[Tensor, "b n"] | None:
    """The inputs that a view of the same batch leads to, from the samples found and their active units."""
    known = known_layers(view, before)
    try:
        again = anew(view, known[-1], run, own.active[view.network.last])
        return corrected(view, *descend(view, *solved(view, known[-1], again), known))[0]
    except Refusal:
        return None


def known_layers(view: NormalisedView, before: Sequence[Known] | None = None) -> list[Known]:
    """What is known of each hidden layer before anything is searched; of another view, told in the same way."""
    network, hidden = view.network, range(len(view.norms))
    lows = [network.factors(k, None if before is None else before[k].low.rank) for k in hidden]
    size = lows[-1].rank + view.mixes
    told = [_deviation(view, k, size, before and before[k].before) for k in hidden]
    lacks = [norm is None or norm.variance is None for norm in view.afters]
    after = [None if lacks[k] else from_buffers(view.afters[k], 2 * network.precision, size) for k in hidden]
    return [Known(*parts) for parts in zip(lows, told, after, strict=True)]


def _deviation(view: NormalisedView, k: int, size: int, before: Deviation | None) -> Deviation | None:
    network, norm, eps = view.network, view.norms[k], 2 * view.network.precision
    if norm is None or not norm.mixes:
        return None
    if before is not None and before.told:
        return replace(before, sigma=from_buffers(norm, eps, size, biased=before.biased).sigma)
    found = deviation(norm, network.weights[k], network.weight_gradients[k], eps, size)
    if k and found.told:  # what enters the layer is known without it, and then tells it
        found = replace(found, common=0.0)
    return found if before is None else replace(before, sigma=found.sigma)


def _not_searched(view: NormalisedView, k: int) -> str:
    """Beside what dropout behind layer k is not searched; nothing where it is."""
    norm, activation = view.norms[k], view.network.activations[k]
    if view.afters[k] is not None:
        return "batch normalisation"
    if k == view.network.last and view.lacks_level:
        return "batch normalisation without the gradient of a shift"
    if k < view.network.last or not view.is_curved:
        return ""
    if norm is not None and not norm.mixes:
        return "a normalisation of each sample and an activation that has not two slopes"
    return "a piecewise linear activation of more than two slopes" if norm is None and activation.is_flat else ""


def _check_reach(view: NormalisedView, low: LowRank) -> None:
    """Raises `Refusal` where the search cannot be trusted to say anything."""
    network, curved = view.network, view.is_curved
    lacking = [
        k + 1
        for k, norm in enumerate(view.norms)
        if not (norm is not None and norm.mixes) and network.biases[k] is None
    ]
    if lacking:
        layers = ", ".join(map(str, lacking))
        raise Refusal(f"no bias in layer {layers}: nothing else that is used here tells the length of an input")
    size = low.rank + view.mixes
    if low.rank == min(network.weights[network.last].shape) and low.gap < MIN_GAP:
        raise Refusal("no gap in the singular values of the last hidden layer's gradient: a batch too large, or noise")
    if view.needs_all and network.batch_size not in (None, size):
        shown = f"the gradient shows {size}: copies of a sample, or some too weak to see"
        raise Refusal(f"{network.batch_size} samples are disclosed, {shown}; behind batch normalisation all are needed")
    for k, drop in enumerate(view.drops):
        beside = _not_searched(view, k)
        if drop and beside:
            raise Refusal(f"dropout beside {beside} behind layer {k + 1}: which units it took is not searched there")
    unknowns = 2 * low.rank + MARGIN + (0 if curved else possible_errors(network, size).shape[1] + 1)
    narrow = min(len(w) for w in network.weights[:-1])
    if narrow < unknowns:
        raise Refusal(f"a batch of {size} behind a normalisation needs width {unknowns}; a layer has {narrow}")
