"""Whole batches of networks that normalise in training mode, from every layer of the update."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.network.recovery import Reached, nothing
from spear.normalisation.batch_search import MARGIN, BatchSearch
from spear.normalisation.descent import descend
from spear.normalisation.judge import judge
from spear.normalisation.problem import NormalisedView, normalise
from spear.normalisation.sample_descent import inputs_behind
from spear.normalisation.sample_search import SampleSearch
from spear.normalisation.spaces import open_spaces
from spear.normalisation.statistics import Deviation, deviation
from spear.published.lowrank import MIN_GAP, LowRank
from spear.reconstruction import Reconstruction, Refusal, Terms

IDLE = 12  # rounds in a row that found nothing, after which there is no hope
EXACT, ROUNDINGS, ERRORS = 1e-9, 1e4, 30  # residual that a solution may have: at least; in roundings; in errors of σ


def recover(view: NormalisedView, terms: Terms) -> Reconstruction:
    """Recover the whole batch behind the gradients of a network that normalises in front of its ReLU.

    Nothing is returned that the update does not support. Where BatchNorm follows the first layer, the inputs come with
    the mean that the running mean tells; `Reconstruction.difference_bound` says of which the differences are certain.

    Raises `Refusal` where no search can begin, `ValueError` for a gradient that is zero.
    """
    network = view.network
    lows = [network.factors(k) for k in range(len(view.norms))]
    _check_reach(view, lows[-1])
    size = lows[-1].rank + view.mixes
    deviations = [_deviation(view, k, size) if norm and norm.mixes else None for k, norm in enumerate(view.norms)]
    run = _search(view, lows[-1], deviations[-1], terms)
    reached = Reached(size, lows[-1].noise / lows[-1].largest, size - run.left, run.starts, run.rounds)
    if run.left:
        return nothing(network, str(reached), reached).entries(network, terms.budget.elapsed, "network")
    inputs, targets, kept = descend(view, *_solved(view, lows[-1], deviations[-1], run), lows, deviations)
    return judge(view, inputs, targets, kept, lows, deviations, reached, terms.budget)


def _solved(
    view: NormalisedView, low: LowRank, known: Deviation | None, run: BatchSearch | SampleSearch
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b outputs"], Bool[Tensor, "b m"] | None]:
    """The inputs of the last hidden layer, less their mean behind BatchNorm, ∂L/∂logits, and the active units there
    where dropout follows."""
    network, found = view.network, run.found
    if isinstance(run, BatchSearch):
        inputs = (found.s - found.s.mean(0)) @ run.spaces.rows
        d = found.d @ run.contrasts.mT
        return (
            inputs,
            network.unit(run.spaces.batch) * d,
            _active(view, run, low, known, d) if view.drops_units else None,
        )
    inputs, factor = inputs_behind(view, network.last, low, found.t @ run.whole.basis.mT)
    deviation = normalise(view.top, network.apply(network.last, inputs))[2]
    return inputs, found.d * (deviation / factor[:, None]), found.mask if view.drops_units else None


def _active(
    view: NormalisedView, run: BatchSearch, low: LowRank, known: Deviation, d: Float[Tensor, "b outputs"]
) -> Bool[Tensor, "b m"]:
    """Which units of the last hidden layer are active: as found, and of those that the search left out, by what is
    nearer to their gradient, 0 or h_j."""
    k, live = view.network.last, run.spaces.live
    rough = replace(known, error=torch.full_like(known.error, known.usual))
    spaces = open_spaces(view.network, view.top, k, low, rough)
    mask = torch.ones(len(d), len(live), dtype=torch.bool, device=d.device)
    h = d @ view.network.weights[k + 1][:, spaces.live] / (1 - view.drops[k])
    mask[:, spaces.live] = (2 * spaces.gradients(run.found.t, run.found.s) - h) * h > 0
    mask[:, live] = run.found.mask
    return mask


def _deviation(view: NormalisedView, k: int, size: int) -> Deviation:
    network, norm = view.network, view.norms[k]
    return deviation(norm, network.weights[k], network.weight_gradients[k], 2 * network.precision, size)


def _search(view: NormalisedView, low: LowRank, known: Deviation | None, terms: Terms) -> BatchSearch | SampleSearch:
    """Rounds until all samples are found, the budget is spent or they find no more."""
    network = view.network
    if known is None:
        run = SampleSearch(view, low, terms.generator())
    else:
        accept = max(EXACT, ROUNDINGS * 2 * network.precision, ERRORS * known.usual)
        spaces = open_spaces(network, view.top, network.last, low, known)
        run = BatchSearch(view, spaces, accept, terms.generator())
    run.until = terms.budget.until
    while run.left:
        run.round()
        terms.report("network", len(run.found), len(run.found) + run.left, run.starts)
        if terms.budget.spent(run.starts) or run.idle >= IDLE:
            break
    return run


def _check_reach(view: NormalisedView, low: LowRank) -> None:
    """Raises `Refusal` where the search cannot be trusted to say anything."""
    network, kinds = view.network, {None if norm is None else norm.mixes for norm in view.norms}
    if kinds > {True}:
        raise Refusal("normalisation is attacked where one kind of it stands behind every hidden layer")
    lacking = [k + 1 for k, norm in enumerate(view.norms) if not view.mixes and network.biases[k] is None]
    if lacking:
        layers = ", ".join(map(str, lacking))
        raise Refusal(f"no bias in layer {layers}: nothing else that is used here tells the length of an input")
    size = low.rank + view.mixes
    if low.rank == min(network.weights[network.last].shape) and low.gap < MIN_GAP:
        raise Refusal("no gap in the singular values of the last hidden layer's gradient: a batch too large, or noise")
    if view.mixes and network.batch_size not in (None, size):
        shown = f"the gradient shows {size}: copies of a sample, or some too weak to see"
        raise Refusal(f"{network.batch_size} samples are disclosed, {shown}; behind batch normalisation all are needed")
    unknowns, narrow = 2 * low.rank + network.outputs + MARGIN, min(len(w) for w in network.weights[:-1])
    if narrow < unknowns:
        raise Refusal(f"a batch of {size} behind a normalisation needs width {unknowns}; a layer has {narrow}")
