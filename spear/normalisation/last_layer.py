"""The last hidden layer: which search finds its samples, and what these say of its inputs and outputs."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from spear.network.curves.fit import finish
from spear.network.curves.search import CurveSearch
from spear.network.exact_step import solve_mask
from spear.network.spaces import GONE
from spear.normalisation.batch_search import BatchSearch
from spear.normalisation.calibration import calibrated
from spear.normalisation.columns import Columns, output_errors
from spear.normalisation.curves import top
from spear.normalisation.descent import Known, check_multiple
from spear.normalisation.level import LevelSearch
from spear.normalisation.problem import NormalisedView, normalise
from spear.normalisation.sample_descent import inputs_behind
from spear.normalisation.sample_search import SampleSearch
from spear.normalisation.spaces import open_spaces
from spear.normalisation.statistics import Deviation
from spear.published.lowrank import LowRank
from spear.reconstruction import Terms

IDLE = 12  # rounds in a row that found nothing, after which there is no hope
EXACT, ROUNDINGS, ERRORS = 1e-9, 1e4, 30  # residual that a solution may have: at least; in roundings; in errors of σ
ROUGHEST, FITTING = 1e-2, 30  # residual from which σ is made better by near misses; times theirs that samples may have

Search = BatchSearch | SampleSearch | CurveSearch | Columns


def opened(view: NormalisedView, known: Known, generator: Generator) -> Search:
    """The search at the last hidden layer, before its first round."""
    if view.is_curved:
        return _on_curves(view, known, generator)
    if not view.mixes:
        return SampleSearch(view, known.low, generator)
    search, before = (LevelSearch, known.before.of_all()) if view.lacks_level else (BatchSearch, known.before)
    spaces = open_spaces(view.network, view.top, view.network.last, known.low, before)
    accept = max(EXACT, ROUNDINGS * 2 * view.network.precision, ERRORS * before.usual)
    return search(view, spaces, accept, generator)


def _on_curves(view: NormalisedView, known: Known, generator: Generator) -> CurveSearch:
    """Every unit counts there: what is not known of one is wrong in all outputs."""
    spaces, off = None, 0.0
    if view.mixes:
        even = known.before.of_all()
        spaces, off = open_spaces(view.network, view.top, view.network.last, known.low, even), even.usual
    found = top(view, known.low, spaces, generator)
    run = CurveSearch(found.network, found.layer, generator, found.prior)
    run.accept = max(run.accept, ERRORS * off)
    return run


def searched(view: NormalisedView, known: Known, terms: Terms) -> tuple[Known, Search]:
    """Rounds until all samples are found, the budget is spent or they find no more; with σ as it served for that."""
    if view.shows_zeros:
        columns = Columns.searched(view, known.low, terms)
        if view.lacks_mean(view.network.last) or not (columns.left or columns.doubt):
            return known, columns
    run = opened(view, known, terms.generator())
    run.until = terms.budget.until
    if type(run) is BatchSearch and not run.lacking and run.accept > ROUGHEST and not view.drops_units:
        rough = replace(known.before, error=torch.full_like(known.before.error, known.before.usual))
        spaces = open_spaces(view.network, view.top, view.network.last, known.low, rough)
        found = calibrated(BatchSearch(view, spaces, 0.0, terms.generator()), known.before, run.until)
        if found is not None:
            known = replace(known, before=found.deviation if not view.network.last else found.deviation.together())
            spaces = open_spaces(view.network, view.top, view.network.last, known.low, found.deviation)
            run = BatchSearch(view, spaces, FITTING * found.residual, terms.generator())
            run.until = terms.budget.until
    while run.left and not (isinstance(run, BatchSearch) and run.lacking):
        run.round()
        terms.report("network", known.low.rank + view.mixes - run.left, known.low.rank + view.mixes, run.starts)
        if terms.budget.spent(run.starts) or run.idle >= IDLE:
            break
    return known, run


def anew(view: NormalisedView, known: Known, run: Search, mask: Bool[Tensor, "b m"]) -> Search:
    """A search of another view of the same batch that has found what `run` did, from its points and active units."""
    if isinstance(run, Columns):
        return run.again(view, known.low, mask)
    new = opened(view, known, Generator().manual_seed(0))
    if isinstance(new, CurveSearch):
        z = run.whole.pre_activations(run.known.s)
        start, pieces = new.curves.coordinates_of(z), run.known.pieces
        w = finish(new.curves, start, run.known.labels, arrived=0.0, pieces=pieces)[0]
        new.known = replace(run.known, s=new.curves.samples(w))
    elif isinstance(new, SampleSearch):
        every = torch.arange(len(run.found), device=mask.device)
        new.found = solve_mask(new.whole, run.found.mask, rounds=1).solved(every)
    else:
        new.found = new.solved(mask[:, new.spaces.live])
    return new


def solved(
    view: NormalisedView, known: Known, run: Search
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b outputs"], Bool[Tensor, "b m"] | None]:
    """The inputs of the last hidden layer, less their mean behind BatchNorm, ∂L/∂logits, and the active units there
    where dropout follows; of a curved activation those that it kept."""
    network, low = view.network, known.low
    if isinstance(run, Columns):
        inputs = run.inputs
        return inputs, output_errors(view, inputs), None
    if isinstance(run, CurveSearch):
        at, s = run.points(), run.known.s
        if not (view.mixes or run.left):
            check_multiple(view, run.whole.weight(run.known) / (network.unit(len(s)) * at.size[:, 0]))
        s = s - s.mean(0) if view.mixes and not run.left else s
        rows = s @ (low.R / low.R.norm(dim=1)[:, None])
        errors = network.activate(at.logits) - network.one_hot(run.known.labels)
        kept = run.known.pieces != run.dropping.gone if run.dropping else None
        return rows[:, : network.weights[-2].shape[1]], network.unit(run.whole.samples) * errors, kept
    found = run.found
    if isinstance(run, BatchSearch):
        inputs = (found.s if run.left else found.s - found.s.mean(0)) @ run.spaces.rows
        d = found.d @ run.contrasts.mT
        return (
            inputs,
            network.unit(run.spaces.batch) * d,
            _active(view, run, low, known.before, d) if view.drops_units else None,
        )
    inputs, factor = inputs_behind(view, network.last, low, found.t @ run.whole.basis.mT)
    deviation = normalise(view.top, network.apply(network.last, inputs))[2]
    return inputs, found.d * (deviation / factor[:, None]), found.mask > GONE if view.drops_units else None


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
