"""The attack: from a model and a client's update to the batch behind it. Nothing here ever sees the batch."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spear import network, theory
from spear.certificate import certify, recover_labels
from spear.chain import Problem, open_problem
from spear.federated import SharedUpdate
from spear.filtering import disaggregate
from spear.lowrank import MIN_GAP
from spear.search import Budget, Found, Progress, search
from spear.target import Target, prepare

METHODS = ("auto", "sampling", "network")
HOPELESS = 1e14  # proposals that no budget pays for: years of sampling
AFFORDABLE = 1e9  # proposals that "auto" goes on with where the network method ended without the whole batch


@dataclass(frozen=True)
class Stats:
    """What an attack cost: `seconds`, `proposals` (kernel vectors tested) and `rounds` of sampling."""

    seconds: float
    proposals: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class Reconstruction:
    """What the server recovered: k samples, in no particular order.

    `inputs` (k, *input shape) and `labels` (k,) or None; `residuals` (k,) is, per sample, the relative distance between
    its own gradient as recovered and as recomputed from input and label (infinite without labels); `certified` (k,)
    tells which samples are beyond doubt. `rank` is the batch size that the gradient shows, `complete` whether the whole
    batch, as far as the client disclosed its size, was recovered and certified, and `reason` why the attack stopped, in
    words.
    """

    inputs: Float[Tensor, "k *input_shape"]
    labels: Int[Tensor, " k"] | None
    rank: int
    residuals: Float[Tensor, " k"]
    certified: Bool[Tensor, " k"]
    complete: bool
    reason: str
    stats: Stats


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
) -> Reconstruction:
    """Recover the batch behind a client's update (SPEAR, Algorithm 1, and beyond it).

    `method` is `"sampling"`, SPEAR as published, from one linear layer that a ReLU follows; `"network"`, which uses
    every layer of a fully connected network (batches of hundreds); or `"auto"`, the strongest method whose
    preconditions hold, and the next where it ends without the whole batch. `layer` names the linear layer that is
    sampled, the default being the first whose input is the data up to reshaping. `batch_size` is read off the
    gradient's rank unless given. `time_limit` (seconds) and `max_proposals` (kernels that sampling tests, starts of
    the network method) bound each search: an exhausted budget gives an incomplete result that says so. Without either,
    a batch too large for any budget is declined at once. `false_rejection` is the chance at which the sparsity filter
    may reject a true direction. The result depends on `seed`, not on the device. `progress` is called after each round.
    `executor` computes the rounds of sampling, which otherwise run in threads: with one of a cluster, for example
    `distributed.Client(ADDRESS).get_executor()`, many machines share one large batch, and the result is the same.

    Raises `ValueError` for a method or a layer that does not exist, a layer that no ReLU follows, a model that cannot
    be traced, gradients that are missing, of another shape than the weights, not finite, of half precision or zero
    everywhere, and for a batch that is too large for the layer (b >= m, or b > n).
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
    if method == "network" and layer is not None:
        raise ValueError(f"method 'network' uses every layer: layer={layer!r} cannot be chosen")
    budget = Budget(time.monotonic(), time_limit, max_proposals)
    options = (budget, seed, progress)
    if method == "network":
        result = _network(open_problem(model, update, batch_size=batch_size, device=device), *options)
    else:
        target = prepare(model, update, layer=layer, batch_size=batch_size, device=device)
        problem = _chain(model, update, batch_size, device) if method == "auto" and layer is None else None
        result = None if problem is None else _network(problem, *options)
        if result is None or not (result.complete or _hopeless(target, budget, AFFORDABLE)):
            where = {"device": device, "executor": executor}
            result = _larger(result, _sampling(target, *options, false_rejection=false_rejection, **where))
    return replace(result, stats=replace(result.stats, seconds=time.monotonic() - budget.started))


def _chain(
    model: nn.Module, update: SharedUpdate, batch_size: int | None, device: str | torch.device | None
) -> Problem | None:
    """The model and its gradients as a chain of linear layers, where they are one."""
    try:
        return open_problem(model, update, batch_size=batch_size, device=device)
    except ValueError:
        return None


def _larger(first: Reconstruction | None, second: Reconstruction) -> Reconstruction:
    """The result with more certified samples, then with more samples; both reasons where neither has any."""
    if first is None:
        return second
    if not len(first.inputs) and not len(second.inputs):
        return replace(first, reason=f"network: {first.reason}; sampling: {second.reason}")
    return max(second, first, key=lambda r: (r.complete, int(r.certified.sum()), len(r.inputs)))


def _sampling(
    target: Target,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
    *,
    false_rejection: float,
    device: str | torch.device | None,
    executor: Executor | None,
) -> Reconstruction:
    """SPEAR's attack on one layer."""
    budget = replace(budget, started=time.monotonic())
    obstacle = _obstacle(target, budget)
    if obstacle:
        return _nothing(target, obstacle, Stats(0.0))
    found = search(target.observed, budget, false_rejection, seed, device, progress, executor)
    stats = Stats(time.monotonic() - budget.started, found.proposals, found.rounds)
    if found.matching < 1:
        reached = f"{len(found.basis)} of {target.low.rank} directions, matching coefficient {found.matching:.6f}"
        return _nothing(target, f"{found.spent}: {reached}", stats)
    return reconstruct(target, found, stats)


def _network(
    problem: Problem,
    budget: Budget,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reconstruction:
    """The attack through every layer; an image that is in the batch k times is returned k times, with its k labels."""
    limits = network.Budget(
        math.inf if budget.seconds is None else float(budget.seconds),
        network.Budget.starts if budget.proposals is None else budget.proposals,
    )

    def report(s: network.Stats) -> None:
        if progress:
            progress(Progress(s.found, s.rank, s.starts, s.seconds))

    generator = torch.Generator().manual_seed(seed)
    found = network.recover(problem, budget=limits, generator=generator, progress=report)
    sample, label = found.entries
    inputs = found.inputs[sample].unflatten(1, problem.input_shape).contiguous()
    stats = Stats(found.stats.seconds, found.stats.starts, found.stats.rounds)
    evidence = (found.residuals[sample], found.certified[sample], found.complete, found.reason, stats)
    return Reconstruction(inputs, label, found.stats.rank, *evidence)


def _obstacle(target: Target, budget: Budget) -> str:
    """Why a search would be pointless, in words; empty where it may succeed."""
    low, (m, b), name = target.low, target.observed.L.shape, target.layer.name
    if low.gap < MIN_GAP:
        return f"the gradient of {name} shows no rank: no gap among its {low.rank} singular values"
    if b >= m or b > target.observed.R.shape[1]:
        return f"a batch of rank {b} needs a layer wider than {b} with as many inputs; {name} is {m} wide"
    if _hopeless(target, budget, HOPELESS):
        expected = theory.expected_proposals(theory.half_rates(m, b))
        return f"a batch of {b} needs about {expected:.0e} proposals at width {m}: set a budget to try all the same"
    return ""


def _hopeless(target: Target, budget: Budget, most: float) -> bool:
    """Whether sampling without a budget is expected to take more than `most` proposals."""
    if budget.seconds is not None or budget.proposals is not None:
        return False
    m, b = target.observed.L.shape
    return theory.expected_proposals(theory.half_rates(m, b)) > most


def reconstruct(target: Target, found: Found, stats: Stats) -> Reconstruction:
    """The batch behind a full set of directions, with its labels and its certificate."""
    q = found.q[found.basis]
    G, X = disaggregate(target.observed, q)
    doubt = _doubt(target)
    if doubt:
        unknown = torch.full_like(X[0], float("inf"))
        return _result(target, X.mT, None, unknown, f"recovered, but not certified: {doubt}", stats, certain=False)
    with torch.no_grad():
        Z = target.layer.linear(X.mT)
    labels = recover_labels(target.layer, Z, G.mT, target.scale)
    certificate = certify(target, q, X.mT, labels)
    if not certificate.holds:
        reason = f"recovered, but not certified: {certificate.why_not()}"
    elif len(labels) < target.count:
        reason = f"{len(labels)} of {target.count} samples: the others leave no trace above rounding"
    else:
        reason = f"the whole batch of {len(labels)}: every gradient reproduced to {certificate.gradients:.0e}"
    return _result(target, X.mT, labels, certificate.samples, reason, stats, certain=certificate.holds)


def _doubt(target: Target) -> str:
    """What keeps the server from recomputing the update, in words; empty where it can."""
    name = target.layer.name
    if target.observed.d is None:
        return f"{name} has no bias, so each input is known up to a positive factor only (here: unit length)"
    if target.layer.tail is None:
        return f"the outputs depend on more than {name}, by a branch around it"
    if target.loss != "cross_entropy":
        return f"one layer shows labels under cross-entropy alone; the client's loss is {target.loss}"
    return ""


def _result(
    target: Target,
    X: Float[Tensor, "k n"],
    labels: Int[Tensor, " k"] | None,
    residuals: Float[Tensor, " k"],
    reason: str,
    stats: Stats,
    *,
    certain: bool,
) -> Reconstruction:
    inputs = X.unflatten(1, target.input_shape).contiguous()
    certified = torch.full((len(X),), certain, device=X.device)
    complete = certain and len(X) >= target.count
    return Reconstruction(inputs, labels, target.low.rank, residuals, certified, complete, reason, stats)


def _nothing(target: Target, reason: str, stats: Stats) -> Reconstruction:
    """No sample at all: an image that the zero pattern contradicts is never returned."""
    R = target.observed.R
    return _result(target, R.new_zeros(0, R.shape[1]), None, R.new_zeros(0), reason, stats, certain=False)
