"""Several local steps, one update: the first mini-batch comes out exactly, its step is simulated, and so on.

Whatever the learning rate, the rows of the first layer's change span all samples, and those of the second layer's hold
ReLU(z) of every sample at every visit. So the samples of step t solve the projection problem at the weights of step t,
to rounding; the others only nearly. One epoch gives all samples; the later ones verify them. Vectors are rows.
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from spear.chain import Problem, Targets, passes
from spear.federated import SharedUpdate
from spear.network import Recovery, Stats
from spear.peeling import solve
from spear.projection import Factors, ascend, distinct, exact_step, label

EXACT = 1e-7  # sine to the second layer's rows of a sample of this step, far from that of another's
ALONE = 1e-4  # the same where all other samples are known
TRIES = 40  # searches for one mini-batch


@dataclass(frozen=True)
class Training:
    """What a client disclosed of its local training: sample count, the steps' sizes, learning rate and momentum."""

    count: int
    sizes: tuple[int, ...]
    rate: float | int
    momentum: float | int

    @classmethod
    def of(cls, update: SharedUpdate) -> "Training":
        """Raises `ValueError` where the client does not disclose what a simulation needs."""
        told = {"count": update.count, "learning_rate": update.learning_rate, "mini_batch": update.mini_batch}
        hidden = [name for name, value in told.items() if value is None]
        if hidden:
            what = f"an update of {update.local_steps} local steps is not the gradient of one batch"
            raise ValueError(f"{what}, and its {' and '.join(hidden)} are not disclosed")
        epoch = [len(part) for part in torch.arange(update.count).split(update.mini_batch)]
        if update.local_steps % len(epoch):
            raise ValueError(f"{update.local_steps} local steps are no whole epochs of {len(epoch)} mini-batches")
        epochs = update.local_steps // len(epoch)
        return cls(update.count, tuple(epoch * epochs), update.learning_rate, update.momentum)

    def scale(self, step: int) -> float:
        """How much of a step's gradient is in the total change: the learning rate, and what momentum repeats of it."""
        left = len(self.sizes) - step
        return self.rate * sum(self.momentum**k for k in range(left))


@dataclass(frozen=True)
class State:
    """A client's weights after some steps, and its momentum: per layer the running sum of gradients."""

    problem: Problem
    speed: tuple[Float[Tensor, "_m _n"], ...] | None = None

    def after(
        self, inputs: Float[Tensor, "s n"], labels: Int[Tensor, " s"], training: Training
    ) -> tuple["State", Float[Tensor, "s m"]]:
        """The state after one step on these samples, and their back-propagated vectors at the first layer."""
        now = self.problem
        counts = F.one_hot(labels, now.classes).to(inputs)
        run = passes(now, inputs, Targets(counts, now.unit(len(inputs)), 0.0))
        step = [d.T @ now.extend(k, x) for k, (d, x) in enumerate(zip(run.deltas, run.inputs, strict=True))]
        if self.speed is not None:
            step = [training.momentum * v + g for v, g in zip(self.speed, step, strict=True)]
        moved = [now.affine(k) - training.rate * v for k, v in enumerate(step)]
        weights = tuple(a[:, : w.shape[1]] for a, w in zip(moved, now.weights, strict=True))
        biases = tuple(None if b is None else a[:, -1] for a, b in zip(moved, now.biases, strict=True))
        return State(replace(now, weights=weights, biases=biases), tuple(step)), run.deltas[0]


def recover(
    problem: Problem, training: Training, *, seconds: float | int = float("inf"), generator: Generator
) -> Recovery:
    """The client's samples from the change of its weights, `problem.weight_gradients`, by local training.

    Certified where simulating the whole training from them gives the update in every layer.
    """
    begin = time.perf_counter()
    search = _open(problem, training)
    if search is None:
        width = min(len(w) for w in problem.weights[:-1])
        reason = f"{training.count} samples in {len(training.sizes)} steps need layers wider than {width}"
        nobody = torch.zeros(0, dtype=torch.long, device=problem.weights[0].device)
        return _report(problem, training, problem.weights[0][:0], (nobody, None, None), reason, 0, begin)
    state, inputs, pool, starts = State(problem), problem.weights[0][:0], problem.weights[0][:0], 0
    labels, members = torch.zeros(0, dtype=torch.long, device=inputs.device), []
    while len(inputs) < training.count:
        size = training.sizes[len(members)]
        late = time.perf_counter() - begin > seconds
        new, pool, used = (inputs[:0], pool, 0) if late else search.at(state.problem, size, inputs, pool, generator)
        own = label(state.problem, new, search.first.basis)[0] if len(new) else labels[:0]
        members.append(torch.arange(len(inputs), len(inputs) + size, device=inputs.device))
        inputs, labels, starts = torch.cat([inputs, new]), torch.cat([labels, own]), starts + used
        if len(new) < size:
            reason = f"{len(new)} of {size} samples of step {len(members)} found, the rest cannot be retraced"
            return _report(problem, training, inputs, (labels, None, None), reason, starts, begin)
        state, _ = state.after(new, own, training)
    return _verified(problem, training, search, inputs, labels, members, starts, begin)


@dataclass(frozen=True)
class Search:
    """The spaces that every step's search shares: rows of the first layer's change, rows of the second layer's."""

    first: Factors
    span: Float[Tensor, "m r"]

    def sine(self, problem: Problem, inputs: Float[Tensor, "s n"]) -> Float[Tensor, " s"]:
        """Of each sample's activations at these weights to the second layer's rows."""
        y = problem.apply(0, inputs).relu()
        return (y - y @ self.span @ self.span.T).norm(dim=1) / y.norm(dim=1)

    def at(
        self,
        problem: Problem,
        size: int,
        known: Float[Tensor, "k n"],
        pool: Float[Tensor, "p n"],
        generator: Generator,
    ) -> tuple[Float[Tensor, "s n"], Float[Tensor, "q n"], int]:
        """The `size` samples of the step at these weights, at most; those near to being of it; the starts used.

        Candidates of earlier steps, `pool`, are tried first; random starts stay away from some of what is known.
        """
        lift, triangle = torch.linalg.qr(problem.affine(0) @ self.first.rows.T)
        place = lambda x: F.normalize(problem.extend(0, x) @ self.first.rows.T @ triangle.T, dim=1)  # noqa: E731
        alone = len(known) + size == len(self.first.singular)
        found, used, limit = known[:0], 0, ALONE if alone else EXACT
        for trial in range(TRIES):
            near = place(torch.cat([known, found, pool if trial % 2 else pool[:0]]))
            c = place(pool) if trial == 0 else self._starts(near, max(32, 2 * lift.shape[1]), generator)
            if not len(c):
                continue
            used += len(c)
            candidates = self._inputs(self._settle(c, lift), triangle)
            fresh = _apart(candidates, torch.cat([known, found]))
            exact = self.sine(problem, fresh) < limit
            found = torch.cat([found, fresh[exact]])
            pool = torch.cat([pool, fresh[~exact]])
            pool = _apart(pool, torch.cat([known, found]))
            if len(found) >= size:
                break
        order = self.sine(problem, found).argsort()
        return found[order[:size]], torch.cat([pool, found[order[size:]]]), used

    def _starts(self, near: Float[Tensor, "f r"], count: int, generator: Generator) -> Float[Tensor, "k r"]:
        c = torch.randn(count, len(self.first.rows), generator=generator, dtype=torch.float64).to(self.span)
        some = torch.randperm(len(near), generator=generator)[: near.shape[1] // 2].to(near.device)
        away = torch.linalg.qr(near[some].T)[0]
        return F.normalize(c - (c @ away) @ away.T, dim=1)

    def _settle(self, c: Float[Tensor, "k r"], lift: Float[Tensor, "m r"]) -> Float[Tensor, "j r"]:
        end, sine = ascend(c.float(), lift.float(), self.span.float())
        keep = distinct(end, sine, 0.9999)
        end = end[keep[sine[keep] < 0.3]].double()
        parts = [exact_step(part, lift, self.span, rounds=12) for part in end.split(32)]
        if not parts:
            return end
        c, sine = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        keep = distinct(c, sine, 1 - 1e-9)
        return c[keep[sine[keep] < 0.05]]

    def _inputs(self, c: Float[Tensor, "k r"], triangle: Float[Tensor, "r r"]) -> Float[Tensor, "k n"]:
        rows = torch.linalg.solve_triangular(triangle, c.T, upper=True).T @ self.first.rows
        return (rows / rows[:, -1:])[rows[:, -1].abs() > 1e-6][:, :-1]


def _apart(new: Float[Tensor, "s n"], known: Float[Tensor, "k n"]) -> Float[Tensor, "j n"]:
    """Those of `new` that are no copies of `known` ones, nor of each other."""
    both = torch.cat([known, new])
    close = torch.cdist(both, both) < 1e-4 * both.norm(dim=1)
    return new[~close.tril(-1).any(1)[len(known) :]]


def _open(problem: Problem, training: Training) -> Search | None:
    """The spaces, up to the rounding of the weights; `None` where they are too large for the projections."""
    if problem.last == 0 or problem.biases[0] is None:
        return None
    first, second = (_factors(problem, k, len(training.sizes)) for k in (0, 1))
    span = torch.linalg.qr(second.rows[:, : len(problem.weights[0])].T)[0]
    if span.shape[1] + len(first.singular) > len(span) - 5:
        return None
    return Search(first, span)


def _factors(problem: Problem, k: int, steps: int) -> Factors:
    """The change of layer k above what rounding the weights after each step leaves."""
    J, weights = problem.augmented(k), problem.weights[k]
    U, s, V = torch.linalg.svd(J, full_matrices=False)
    rounding = problem.precision * float(weights.pow(2).mean().sqrt()) * (steps + 1) ** 0.5
    edge = max(4 * rounding * (J.shape[0] ** 0.5 + J.shape[1] ** 0.5), 1e-14 * float(s[0]))
    rank = int((s > edge).sum())
    return Factors(U[:, :rank], s[:rank], V[:rank])


def _verified(
    problem: Problem,
    training: Training,
    search: Search,
    inputs: Float[Tensor, "s n"],
    labels: Int[Tensor, " s"],
    members: list[Int[Tensor, " _k"]],
    starts: int,
    begin: float,
) -> Recovery:
    """The samples, corrected by what the simulated training leaves over; in the first epoch's order, or another."""
    epochs = len(training.sizes) // len(members)
    best = None
    for order in (members * epochs, None):
        if order is None:
            order = _membership(problem, training, search, inputs, labels, members)
        trial = inputs
        for _ in range(4):
            seen, corrected = _compare(problem, training, trial, labels, order)
            if best is None or max(seen[0]) < max(best[1][0]):
                best = trial, seen
            trial = corrected
        if max(best[1][0]) < 1e-9 or epochs == 1:
            break
    return _report(problem, training, best[0], (labels, *best[1]), "", starts, begin)


def _membership(
    problem: Problem,
    training: Training,
    search: Search,
    inputs: Float[Tensor, "s n"],
    labels: Int[Tensor, " s"],
    members: list[Int[Tensor, " _k"]],
) -> list[Int[Tensor, " _k"]]:
    """Which samples each step took: in later epochs those whose activations lie nearest to the second layer's rows."""
    state, order = State(problem), []
    for step, size in enumerate(training.sizes):
        sines = search.sine(state.problem, inputs)
        order.append(members[step] if step < len(members) else sines.argsort()[:size])
        state, _ = state.after(inputs[order[-1]], labels[order[-1]], training)
    return order


def _compare(
    problem: Problem,
    training: Training,
    inputs: Float[Tensor, "s n"],
    labels: Int[Tensor, " s"],
    order: list[Int[Tensor, " _k"]],
) -> tuple[tuple[tuple[float, ...], Float[Tensor, " s"]], Float[Tensor, "s n"]]:
    """Simulated against received change: relative residual of each layer, error of each input; corrected inputs."""
    state, T = State(problem), inputs.new_zeros(len(inputs), len(problem.weights[0]))
    for step, index in enumerate(order):
        state, deltas = state.after(inputs[index], labels[index], training)
        T[index] += training.scale(step) * deltas
    rests = [problem.augmented(k) - problem.affine(k) + state.problem.affine(k) for k in range(problem.last + 2)]
    layers = tuple(float(rest.norm() / problem.augmented(k).norm()) for k, rest in enumerate(rests))
    inverse = solve(T, torch.eye(T.shape[1], dtype=T.dtype, device=T.device))
    step = inverse @ rests[0]
    noise = inverse.norm(dim=1) * rests[0].norm() / T.shape[1] ** 0.5
    error = (step.norm(dim=1) + noise) / problem.extend(0, inputs).norm(dim=1)
    return (layers, error), inputs + step[:, : inputs.shape[1]]


def _report(
    problem: Problem,
    training: Training,
    inputs: Float[Tensor, "s n"],
    evidence: tuple[Int[Tensor, " s"], tuple[float, ...] | None, Float[Tensor, " s"] | None],
    reason: str,
    starts: int,
    begin: float,
) -> Recovery:
    stats = Stats(training.count, 0.0, 0.0, len(inputs), starts, len(training.sizes), time.perf_counter() - begin)
    labels, layers, error = evidence
    counts = F.one_hot(labels, problem.classes).to(inputs)
    if layers is None:
        unknown = torch.full_like(inputs[:, 0], float("inf"))
        return Recovery(inputs, counts, unknown, unknown < 0, False, reason, stats)
    certified = (error < 5e-7) & (max(layers) < 1e-9)
    worst = f"{max(layers):.1e} of a layer's change, {float(error.max()):.1e} of an input, unexplained"
    good = bool(certified.all())
    reason = "simulating the local training gives the update in every layer" if good else f"the samples leave {worst}"
    return Recovery(inputs, counts, error, certified, good, reason, replace(stats, layers=layers))
