"""The attack: from a model and a client's update to the batch behind it. Nothing here ever sees the batch."""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.deployments import noise, pruning
from spear.deployments.local_training import retrace
from spear.deployments.noise import approximate, denoise
from spear.deployments.pruning import complete
from spear.descent import dictionary
from spear.descent.layer import search
from spear.federated.update import SharedUpdate, is_perturbed
from spear.network import recovery, whole_batch
from spear.network.problem import NetworkView, open_network
from spear.network.recovery import entries, limits
from spear.published.algorithm import find_columns
from spear.published.greedy import Candidates
from spear.published.guided import find_columns_guided
from spear.published.one_layer import AFFORDABLE, attack_layer, hopeless
from spear.published.view import LayerView, open_layer
from spear.reconstruction import Budget, Progress, Reconstruction, larger

METHODS = ("auto", "sampling", "guided", "dictionary", "layer", "network")
Search = Callable[..., Candidates]
COARSE = 1e-6  # rounding of a gradient, relative to it, that is noise: of weights in single precision a step apart


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
    `"guided"`, sampling where guesses of the batch point, `approximate` images or none (`spear.published.guided`);
    `"dictionary"`, its gradient as sparse vectors in a subspace; `"layer"`, its weights and gradient coupled (batches
    of up to a third of its width). Of a fully connected network: `"network"`, every layer (batches of hundreds).
    `"auto"` is the strongest method whose preconditions hold, and the next where it ends without the whole batch.
    `layer` names the one linear layer, the default being the first whose input is the data up to reshaping. Of one
    layer alone (a private head: the update holds that layer's gradient only, and `model` ends with its ReLU or goes on
    with weights that are not the client's), inputs come without labels, and up to their length (`certify_layer`).
    `batch_size` is read off the gradient's rank unless given; nothing is certified where neither it nor the update
    says it (`spear.certificate`). `time_limit` (seconds) bounds the searches of all methods
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
    sampling = partial(find_columns, false_rejection=false_rejection, device=device, executor=executor)
    guided = partial(find_columns_guided, approximate=approximate, **sampling.keywords)
    searches = {"sampling": sampling, "guided": guided, "dictionary": dictionary.search, "layer": search}
    if method in ("auto", "network") and layer is None and update.local_steps > 1:
        result = retrace(model, update, budget, seed, device)
    elif method in ("auto", "network") and layer is None and is_perturbed(update):
        result = denoise(model, update, batch_size, budget, seed, device)
    elif method in ("auto", "network") and layer is None and update.pruning is not None:
        result = complete(open_network(model, update, batch_size=batch_size, device=device), budget, seed)
    elif method == "network":
        problem = open_network(model, update, batch_size=batch_size, device=device)
        result = _every_layer(problem, update, budget, seed, progress)
    else:
        target = open_layer(model, update, layer=layer, batch_size=batch_size, device=device)
        if method == "auto":
            problem = _chain(model, update, batch_size, device) if layer is None else None
            result = None if problem is None else _every_layer(problem, update, budget, seed, progress)
            result = _strongest(target, result, searches, budget, seed, progress)
        else:
            result = attack_layer(target, searches[method], method, budget, seed, progress)
    return replace(result, stats=replace(result.stats, seconds=time.monotonic() - budget.started))


def _strongest(
    target: LayerView,
    result: Reconstruction | None,
    searches: dict[str, Search],
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """Method after method until one recovers the whole batch: every layer's `result`, one layer coupled, sampling."""
    for method in ("layer", "sampling"):
        if result is not None and (len(result.inputs) >= result.rank or result.expected_error is not None):
            break
        if result is not None and budget.spent(0):
            return replace(result, reason=f"{result.reason}; {budget.spent(0)}")
        if method == "sampling" and result is not None and hopeless(target, budget, AFFORDABLE):
            break
        following = attack_layer(target, searches[method], method, budget, seed, progress)
        result = following if result is None else larger(result, following)
    return result


def _every_layer(
    problem: NetworkView,
    update: SharedUpdate,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """What every layer gives exactly; where that is nothing, what comes out of noise that was not disclosed."""
    exact = _network(problem, budget, seed, progress)
    if len(exact.inputs):
        return exact
    if pruning.is_pruned(problem):
        return complete(problem, budget, seed)
    noisy = noise.open_noisy(problem, sigma=None, weighted=update.clip is not None)
    seen = problem.precision > COARSE or noise.is_visible(noisy)
    found = approximate(noisy, budget, seed) if seen else exact
    # Samples that the layers merge leave fewer directions, and pass for noise: then the estimate's errors mean nothing.
    return found if len(found.inputs) >= (problem.batch_size or 1) else exact


def _chain(
    model: nn.Module, update: SharedUpdate, batch_size: int | None, device: str | torch.device | None
) -> NetworkView | None:
    """The model and its gradients as a chain of linear layers, where they are one."""
    try:
        return open_network(model, update, batch_size=batch_size, device=device)
    except ValueError:
        return None


def _network(
    problem: NetworkView,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """The attack through every layer; an image that is in the batch k times is returned k times, with its k labels."""

    def report(s: recovery.Stats) -> None:
        if progress:
            progress(Progress(s.found, s.rank, s.starts, s.seconds))

    generator = torch.Generator().manual_seed(seed)
    return entries(whole_batch.recover(problem, budget=limits(budget), generator=generator, progress=report), problem)
