"""The attack: from a model and a client's update to the batch behind it. Nothing here ever sees the batch."""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear import denoising, dictionary, network, pruned, seeding, sequential, theory
from spear import layer as layers
from spear.chain import Problem, open_problem
from spear.defences import as_gradient, is_perturbed
from spear.federated import SharedUpdate
from spear.likelihood import Noisy
from spear.local_steps import Training
from spear.lowrank import MIN_GAP
from spear.reconstruction import Reconstruction, Stats, nothing, reconstruct
from spear.search import Budget, Found, Progress, search
from spear.target import Target, prepare, under_noise

METHODS = ("auto", "sampling", "guided", "dictionary", "layer", "network")
DESCENTS = ("dictionary", "layer")
EXACT_GAP = 1e6  # between the batch's singular values and the noise's, under which single zeros are mistaken
PLAUSIBLE = 0.75  # matching coefficient from which a reconstruction under noise is returned, uncertified
Search = Callable[..., Found]
COARSE = 1e-6  # rounding of a gradient, relative to it, that is noise: of weights in single precision a step apart
SAME_INPUT = 1e-4  # relative distance under which two methods returned the same input
HOPELESS = 1e14  # proposals that no budget pays for: years of sampling
AFFORDABLE = 1e9  # proposals that "auto" goes on with where the network method ended without the whole batch


def attack(
    model: nn.Module,
    update: SharedUpdate,
    *,
    method: str = "auto",
    layer: str | None = None,
    batch_size: int | None = None,
    time_limit: float | int | None = None,
    max_proposals: int | None = None,
    false_rejection: float = 1e-9,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Callable[[Progress], None] | None = None,
    executor: Executor | None = None,
    approximate: Float[Tensor, "k *input_shape"] | None = None,
) -> Reconstruction:
    """Recover the batch behind a client's update (SPEAR, Algorithm 1, and beyond it).

    `method` says how much is used. Of one linear layer that a ReLU follows: `"sampling"`, SPEAR as published;
    `"guided"`, sampling where guesses of the batch point, `approximate` images or none (`spear.seeding`);
    `"dictionary"`, its gradient as sparse vectors in a subspace; `"layer"`, its weights and gradient coupled (batches
    of up to a third of its width). Of a fully connected network: `"network"`, every layer (batches of hundreds).
    `"auto"` is the strongest method whose preconditions hold, and the next where it ends without the whole batch.
    `layer` names the one linear layer, the default being the first whose input is the data up to reshaping. Of one
    layer alone (a private head: the update holds that layer's gradient only, and `model` ends with its ReLU or goes on
    with weights that are not the client's), inputs come without labels, certified by that layer (`LayerCertificate`).
    `batch_size` is read off the gradient's rank unless given. `time_limit` (seconds) bounds the searches of all methods
    together, `max_proposals` (kernels that sampling tests, starts of the others) each of them: an exhausted budget
    gives an incomplete result that says so. Without either, sampling declines a batch too large for any budget at once.
    From rounded or noisy gradients of a fully connected network, `"auto"` and `"network"` return samples with an
    `expected_error`, `"dictionary"` and `"layer"` without one; neither are certified. From several local steps (FedAvg)
    the former retrace the training. `false_rejection` is the chance at which sampling's sparsity filter may reject a
    true direction. The result depends on `seed`, not on the device. `progress` is called after each round.
    `executor` computes the rounds of sampling, which otherwise run in threads: with one of a cluster, for example
    `distributed.Client(ADDRESS).get_executor()`, many machines share one large batch, and the result is the same.

    Raises `ValueError` for a method or a layer that does not exist, `approximate` images of another size than the
    layer's inputs or for another method than `"guided"`, a layer that no ReLU follows, a model that cannot be traced,
    gradients that are missing, of another shape than the weights, not finite or zero everywhere, for a batch that is
    too large for the layer (b >= m, or b > n), and where sampling is to work on half precision.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
    if method == "network" and layer is not None:
        raise ValueError(f"method 'network' uses every layer: layer={layer!r} cannot be chosen")
    if approximate is not None and method != "guided":
        raise ValueError(f"approximate images guide the method 'guided', not {method!r}")
    budget = Budget(time.monotonic(), time_limit, max_proposals)
    sampling = partial(search, false_rejection=false_rejection, device=device, executor=executor)
    guided = partial(seeding.search, approximate=approximate, **sampling.keywords)
    searches = {"sampling": sampling, "guided": guided, "dictionary": dictionary.search, "layer": layers.search}
    if method in ("auto", "network") and layer is None and update.local_steps > 1:
        result = _retrace(model, update, budget, seed, device)
    elif method in ("auto", "network") and layer is None and is_perturbed(update):
        result = _denoise(model, update, batch_size, budget, seed, device)
    elif method in ("auto", "network") and layer is None and update.pruning is not None:
        result = _complete(open_problem(model, update, batch_size=batch_size, device=device), budget, seed)
    elif method == "network":
        problem = open_problem(model, update, batch_size=batch_size, device=device)
        result = _every_layer(problem, update, budget, seed, progress)
    else:
        target = prepare(model, update, layer=layer, batch_size=batch_size, device=device)
        if method == "auto":
            problem = _chain(model, update, batch_size, device) if layer is None else None
            result = None if problem is None else _every_layer(problem, update, budget, seed, progress)
            result = _strongest(target, result, searches, budget, seed, progress)
        else:
            result = _one_layer(target, searches[method], method, budget, seed, progress)
    return replace(result, stats=replace(result.stats, seconds=time.monotonic() - budget.started))


def _strongest(
    target: Target,
    result: Reconstruction | None,
    searches: dict[str, Search],
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """Method after method until one recovers the whole batch: every layer's `result`, one layer coupled, sampling."""
    for method in ("layer", "sampling"):
        if result is not None and (result.complete or result.expected_error is not None):
            break
        if result is not None and budget.spent(0):
            return replace(result, reason=f"{result.reason}; {budget.spent(0)}")
        if method == "sampling" and result is not None and _hopeless(target, budget, AFFORDABLE):
            break
        following = _one_layer(target, searches[method], method, budget, seed, progress)
        result = following if result is None else _larger(result, following)
    return result


def _retrace(
    model: nn.Module, update: SharedUpdate, budget: Budget, seed: int, device: str | torch.device | None
) -> Reconstruction:
    """A client's samples from several local steps."""
    training = Training.of(update)
    problem = open_problem(model, replace(update, local_steps=1, learning_rate=None), device=device)
    found = sequential.recover(problem, training, seconds=budget.left, generator=torch.Generator().manual_seed(seed))
    known = len(found.inputs) > 0 and bool(found.residuals.isfinite().all()) and not found.complete
    return replace(_entries(found, problem), expected_error=found.residuals if known else None)


def _complete(problem: Problem, budget: Budget, seed: int) -> Reconstruction:
    """What an update of which some entries were not sent gives back."""
    generator = torch.Generator().manual_seed(seed)
    return _entries(pruned.recover(problem, budget=_limits(budget), generator=generator), problem)


def _denoise(
    model: nn.Module,
    update: SharedUpdate,
    batch_size: int | None,
    budget: Budget,
    seed: int,
    device: str | torch.device | None,
) -> Reconstruction:
    """What can be read from a gradient that was rounded or had noise added: nothing certified."""
    problem = open_problem(model, as_gradient(update), batch_size=batch_size, device=device)
    noisy = denoising.open_noisy(problem, sigma=update.noise or None, weighted=update.clip is not None)
    return _approximate(noisy, budget, seed)


def _every_layer(
    problem: Problem,
    update: SharedUpdate,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """What every layer gives exactly; where that is nothing, what comes out of noise that was not disclosed."""
    exact = _network(problem, budget, seed, progress)
    if len(exact.inputs):
        return exact
    if pruned.is_pruned(problem):
        return _complete(problem, budget, seed)
    noisy = denoising.open_noisy(problem, sigma=None, weighted=update.clip is not None)
    seen = problem.precision > COARSE or denoising.is_visible(noisy)
    found = _approximate(noisy, budget, seed) if seen else exact
    return found if len(found.inputs) else exact


def _approximate(noisy: Noisy, budget: Budget, seed: int) -> Reconstruction:
    problem, generator = noisy.problem, torch.Generator().manual_seed(seed)
    starts = network.Budget.starts if budget.proposals is None else budget.proposals
    found = denoising.recover(noisy, seconds=budget.left, starts=starts, generator=generator)
    stats, estimate = Stats(0.0, found.starts, found.rounds), found.estimate
    shape = problem.input_shape
    if estimate is None:
        empty = problem.weights[0].new_zeros(0)
        return Reconstruction(
            empty.new_zeros(0, *shape), None, found.rank, empty, empty.bool(), False, found.reason, stats
        )
    inputs = estimate.inputs.unflatten(1, shape).contiguous()
    none = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    evidence = (estimate.residuals, none, False, found.reason, stats, estimate.error)
    return Reconstruction(inputs, estimate.labels, found.rank, *evidence)


def _chain(
    model: nn.Module, update: SharedUpdate, batch_size: int | None, device: str | torch.device | None
) -> Problem | None:
    """The model and its gradients as a chain of linear layers, where they are one."""
    try:
        return open_problem(model, update, batch_size=batch_size, device=device)
    except ValueError:
        return None


def _larger(first: Reconstruction, second: Reconstruction) -> Reconstruction:
    """The result with more certified samples, then with more samples, joined by what only the other has; both reasons
    where neither has any."""
    if not len(first.inputs) and not len(second.inputs):
        return replace(first, reason=f"{first.reason}; {second.reason}")
    other, best = sorted((first, second), key=lambda r: (r.complete, int(r.certified.sum()), len(r.inputs)))
    if best.complete or best.labels is None or other.labels is None or len(other.inputs) <= len(best.inputs):
        return best
    return _joined(best, other)


def _joined(sure: Reconstruction, more: Reconstruction) -> Reconstruction:
    """All samples of `sure`, and those of `more` that are none of them: with unequal weights only a part is certain."""
    known = sure.inputs.flatten(1)
    apart = torch.cdist(more.inputs.flatten(1), known) > SAME_INPUT * torch.linalg.vector_norm(known, dim=1)
    new = apart.all(1)
    inputs, labels = torch.cat([sure.inputs, more.inputs[new]]), torch.cat([sure.labels, more.labels[new]])
    residuals = torch.cat([sure.residuals, more.residuals[new]])
    certified = torch.cat([sure.certified, more.certified[new]])
    reason = f"{sure.reason}; {more.reason}"
    return replace(sure, inputs=inputs, labels=labels, residuals=residuals, certified=certified, reason=reason)


def _one_layer(
    target: Target,
    search: Search,
    method: str,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """The attack on one layer, by any search for the columns of its Q."""
    seen = under_noise(target) if method in DESCENTS and _shows_noise(target) else None
    obstacle = "" if seen else _obstacle(target, method, budget)
    if obstacle:
        return nothing(target, obstacle, Stats(0.0))
    target, goal = (seen, {"goal": PLAUSIBLE}) if seen else (target, {})
    found = search(target.observed, budget=budget, seed=seed, progress=progress, **goal)
    stats = Stats(time.monotonic() - budget.started, found.proposals, found.rounds)
    if found.matching < goal.get("goal", 1):
        live, m = len(target.observed.alive().L), len(target.observed.L)
        reached = f"{len(found.basis)} of {target.low.rank} directions, matching coefficient {found.matching:.6f}"
        reached += f"; of {m} neurons {live} tell anything, the others see no sample" if live < m else ""
        return nothing(target, f"{method}: {found.spent}: {reached}", stats)
    return reconstruct(target, found, stats)


def _shows_noise(target: Target) -> bool:
    """Whether what lies beyond the rank is more than rounding, and too much for an exact zero pattern."""
    low = target.low
    return low.gap < MIN_GAP or (low.gap < EXACT_GAP and low.noise > 100 * target.eps * low.largest)


def _network(
    problem: Problem,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """The attack through every layer; an image that is in the batch k times is returned k times, with its k labels."""

    def report(s: network.Stats) -> None:
        if progress:
            progress(Progress(s.found, s.rank, s.starts, s.seconds))

    generator = torch.Generator().manual_seed(seed)
    return _entries(network.recover(problem, budget=_limits(budget), generator=generator, progress=report), problem)


def _limits(budget: Budget) -> network.Budget:
    return network.Budget(
        budget.left,
        network.Budget.starts if budget.proposals is None else budget.proposals,
    )


def _entries(found: network.Recovery, problem: Problem) -> Reconstruction:
    """What was recovered, entry by entry of the batch."""
    sample, label = found.entries
    inputs = found.inputs[sample].unflatten(1, problem.input_shape).contiguous()
    stats = Stats(found.stats.seconds, found.stats.starts, found.stats.rounds)
    evidence = (found.residuals[sample], found.certified[sample], found.complete, found.reason, stats)
    weights = None if found.weights is None else found.weights[sample]
    return Reconstruction(inputs, label, found.stats.rank, *evidence, weights=weights)


def _obstacle(target: Target, method: str, budget: Budget) -> str:
    """Why a search would be pointless, in words; empty where it may succeed."""
    low, (m, b), name = target.low, target.observed.L.shape, target.layer.name
    if low.gap < MIN_GAP:
        return f"the gradient of {name} shows no rank: no gap among its {low.rank} singular values"
    if b >= m or b > target.observed.R.shape[1]:
        return f"a batch of rank {b} needs a layer wider than {b} with as many inputs; {name} is {m} wide"
    if method == "sampling" and _hopeless(target, budget, HOPELESS):
        expected = theory.expected_proposals(theory.half_rates(m, b))
        return f"a batch of {b} needs about {expected:.0e} proposals at width {m}: set a budget to try all the same"
    return ""


def _hopeless(target: Target, budget: Budget, most: float) -> bool:
    """Whether sampling without a budget is expected to take more than `most` proposals."""
    if budget.seconds is not None or budget.proposals is not None:
        return False
    m, b = target.observed.L.shape
    return theory.expected_proposals(theory.half_rates(m, b)) > most
