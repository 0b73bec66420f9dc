"""Whole batches of networks that normalise in training mode, from every layer of the update."""

from spear.network.recovery import Reached, nothing
from spear.normalisation.batch_search import MARGIN, BatchSearch
from spear.normalisation.descent import descend
from spear.normalisation.judge import judge
from spear.normalisation.problem import NormalisedView
from spear.normalisation.spaces import open_spaces
from spear.normalisation.statistics import Deviation, deviation
from spear.published.lowrank import MIN_GAP, LowRank
from spear.reconstruction import Reconstruction, Refusal, Terms

IDLE = 12  # rounds in a row that found nothing, after which there is no hope
EXACT, ROUNDINGS, ERRORS = 1e-9, 1e4, 30  # residual that a solution may have: at least; in roundings; in errors of σ


def recover(view: NormalisedView, terms: Terms) -> Reconstruction:
    """Recover the whole batch behind the gradients of a network with BatchNorm in front of each of its ReLU.

    Nothing is returned that the update does not support. Where BatchNorm follows the first layer, the inputs come with
    the mean that the running mean tells; `Reconstruction.difference_bound` says of which the differences are certain.

    Raises `Refusal` where no search can begin, `ValueError` for a gradient that is zero.
    """
    network = view.network
    lows = [network.factors(k) for k in range(len(view.norms))]
    low = lows[-1]
    _check_reach(view, low)
    deviations = [_deviation(view, k, low.rank + 1) for k in range(len(view.norms))]
    run = _search(view, low, deviations[-1], terms)
    reached = Reached(low.rank + 1, low.noise / low.largest, len(run.found), run.starts, run.rounds)
    if run.left:
        return nothing(network, str(reached), reached).entries(network, terms.budget.elapsed, "network")
    found = run.found
    inputs = (found.s - found.s.mean(0)) @ run.spaces.rows
    errors = network.unit(run.spaces.batch) * found.d @ run.contrasts.mT
    inputs, targets = descend(view, inputs, errors, lows, deviations)
    return judge(view, inputs, targets, lows, deviations, reached, terms.budget)


def _deviation(view: NormalisedView, k: int, size: int) -> Deviation:
    network, norm = view.network, view.norms[k]
    return deviation(norm, network.weights[k], network.weight_gradients[k], 2 * network.precision, size)


def _search(view: NormalisedView, low: LowRank, known: Deviation, terms: Terms) -> BatchSearch:
    """Rounds until all samples are found, the budget is spent or they find no more."""
    network = view.network
    accept = max(EXACT, ROUNDINGS * 2 * network.precision, ERRORS * known.usual)
    spaces = open_spaces(network, view.top, network.last, low, known)
    run = BatchSearch(network, view.top, spaces, accept, terms.generator())
    while run.left:
        run.round()
        terms.report("network", len(run.found), spaces.batch, run.starts)
        if terms.budget.spent(run.starts) or run.idle >= IDLE:
            break
    return run


def _check_reach(view: NormalisedView, low: LowRank) -> None:
    """Raises `Refusal` where the search cannot be trusted to say anything."""
    network = view.network
    plain = [k + 1 for k, norm in enumerate(view.norms) if norm is None or not norm.mixes]
    if plain:
        layers = ", ".join(map(str, plain))
        raise Refusal(f"batch normalisation is attacked behind every hidden layer; not behind {layers} of this model")
    if low.rank == min(network.weights[network.last].shape) and low.gap < MIN_GAP:
        raise Refusal("no gap in the singular values of the last hidden layer's gradient: a batch too large, or noise")
    if network.batch_size not in (None, low.rank + 1):
        shown = f"the gradient shows {low.rank + 1}: copies of a sample, or some too weak to see"
        raise Refusal(f"{network.batch_size} samples are disclosed, {shown}; behind batch normalisation all are needed")
    unknowns, narrow = 2 * low.rank + network.outputs + MARGIN, min(len(w) for w in network.weights[:-1])
    if narrow < unknowns:
        raise Refusal(
            f"a batch of {low.rank + 1} behind batch normalisation needs width {unknowns}; a layer has {narrow}"
        )
