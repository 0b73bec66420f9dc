"""Several local steps, one update: the first mini-batch comes out, its step is simulated, and so on.

Whatever the learning rate, the rows of the first layer's change span all samples, and those of the second layer's hold
ReLU(z) of every sample at every visit. So the samples of step t solve the projection problem at the weights of step t,
to rounding; the others only nearly (`spear.deployments.step_samples`). One epoch gives all samples; the later ones
verify them. In single precision the rounding of the weights is noise of known size: samples then carry an expected
error, no certificate. Vectors are rows.
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear.accuracy import Accuracy
from spear.certificate import SAFETY, Certificate, norms
from spear.deployments.simulation import State, Training, rounding
from spear.deployments.step_samples import Step, open_unexplained
from spear.federated.update import SharedUpdate
from spear.network.check import Misfit, open_by_labels
from spear.network.layerwise import solve
from spear.network.problem import NetworkView, Targets, forward, open_network, passes, plain
from spear.reconstruction import Reconstruction, Refusal, Terms

FITS = 3  # a residual that many times larger than what rounding leaves is none
CLOSE = 3e-3  # of an input: how far it may be moved to switch a unit
OUTLYING = 4  # times the median residual of a unit
EXPLAINED = 0.1  # of a layer's change: more than that unexplained, and nothing is returned
ROUNDS = 20  # of simulation and correction
EXACT = Accuracy.of_dtype(torch.float64)  # in single precision, the weights' rounding at every step hides more


@dataclass(frozen=True)
class Samples:
    """Samples with labels, and `members`: which of them each step of the first epoch took."""

    inputs: Float[Tensor, "s n"]
    labels: Int[Tensor, " s"]
    members: tuple[Int[Tensor, " _k"], ...] = ()

    def and_step(self, inputs: Float[Tensor, "k n"], labels: Int[Tensor, " k"]) -> "Samples":
        """These, and those that the next step took."""
        new = torch.arange(len(self.inputs), len(self.inputs) + len(inputs), device=inputs.device)
        both = torch.cat([self.inputs, inputs]), torch.cat([self.labels, labels])
        return Samples(*both, (*self.members, new))


def retrace(
    model: nn.Module, update: SharedUpdate, batch_size: int | None, device: str | torch.device | None, terms: Terms
) -> Reconstruction:
    """A client's samples from several local steps; `batch_size` is the number of its samples, if not disclosed.

    Raises `Refusal` for a model that is no chain of linear layers, and for training that cannot be simulated.
    """
    training = Training.of(update if batch_size is None else replace(update, count=batch_size))
    problem = plain(open_network(model, replace(update, local_steps=1, learning_rate=None), device=device))
    return recover(problem, training, terms)


def recover(problem: NetworkView, training: Training, terms: Terms) -> Reconstruction:
    """The client's samples from the change of its weights, `problem.weight_gradients`, by local training.

    Certified where simulating the whole training from them gives the update in every layer. Where that leaves no more
    than the rounding of the weights, `residuals` are the inputs' expected relative errors.
    """
    empty = problem.weights[0][:0]
    samples = Samples(empty, torch.zeros(0, dtype=torch.long, device=empty.device))
    retraced, generator = Retraced(problem, training, terms), terms.generator()
    try:
        whole = rest = open_unexplained(problem, training)
    except Refusal as refusal:
        return retraced.unverified(samples, str(refusal), 0)
    state, pool, starts = State(problem), empty, 0
    while len(samples.inputs) < training.count:
        number = len(samples.members)
        size = training.sizes[number]
        step = Step(state.problem, size, training.scale(number) * problem.unit(size), terms.budget, starts)
        new, pool, used = step.find(whole, rest, samples.inputs, pool, generator)
        labels, starts = whole.labels(state.problem, new), starts + used
        samples = samples.and_step(new, labels)
        terms.report("local training", len(samples.inputs), training.count, starts)
        if len(new) < size:
            late = terms.budget.spent(starts)
            found = f"{len(new)} of {size} samples of step {number + 1} found"
            reason = f"{found}, the rest cannot be retraced{': ' if late else ''}{late}"
            return retraced.unverified(samples, reason, starts)
        rest, (state, _) = rest.without(step, new), state.after(new, labels, training)
    return _verified(retraced, samples, starts)


def _verified(retraced: "Retraced", samples: Samples, starts: int) -> Reconstruction:
    """The samples, corrected by what the simulated training leaves over; in the first epoch's order, or another."""
    problem, training, until = retraced.problem, retraced.training, retraced.terms.budget.until
    best = _refined(problem, training, samples, list(samples.members) * training.epochs, until)
    several = len(samples.members) > 1 and training.epochs > 1
    if best[1].misfit > FITS and several and time.monotonic() < until:
        other = _refined(problem, training, samples, _membership(problem, training, samples), until)
        best = min(best, other, key=lambda pair: pair[1].misfit)
    return retraced.verified(replace(samples, inputs=best[0]), best[1], starts)


def _refined(
    problem: NetworkView, training: Training, samples: Samples, order: list[Int[Tensor, " _k"]], until: float
) -> tuple[Float[Tensor, "s n"], "Comparison"]:
    """The inputs that explain the update best, of those that corrections lead to before the clock (`time.monotonic`)
    shows `until`, with their evidence."""
    trial, best = samples.inputs, None
    for _ in range(ROUNDS):
        if best is not None and time.monotonic() >= until:
            break
        seen, corrected = _compare(problem, training, trial, samples.labels, order)
        better = best is None or seen.misfit < best[1].misfit
        if not better and best[1].misfit < FITS:
            break
        best, trial = (trial, seen) if better else best, corrected
    return best


def _membership(problem: NetworkView, training: Training, samples: Samples) -> list[Int[Tensor, " _k"]]:
    """Which samples each step took: in later epochs those whose activations lie nearest to the second layer's rows."""
    rest, state, order, members = open_unexplained(problem, training), State(problem), [], samples.members
    for step, size in enumerate(training.sizes):
        sines = rest.sines(state.problem, samples.inputs)[0]
        order.append(members[step] if step < len(members) else sines.argsort()[:size])
        state, _ = state.after(samples.inputs[order[-1]], samples.labels[order[-1]], training)
    return order


@dataclass(frozen=True)
class Comparison:
    """Simulated against received change: relative residual of each `layer`, the largest in units of the weights'
    rounding (`misfit`), and the `error` that is left in each input, relative to it."""

    layers: tuple[float, ...]
    misfit: float
    error: Float[Tensor, " s"]


def _compare(
    problem: NetworkView,
    training: Training,
    inputs: Float[Tensor, "s n"],
    labels: Int[Tensor, " s"],
    order: list[Int[Tensor, " _k"]],
) -> tuple[Comparison, Float[Tensor, "s n"]]:
    """How well these samples explain the update, and the inputs corrected by what they leave of the first layer's."""
    state, T = State(problem), inputs.new_zeros(len(inputs), len(problem.weights[0]))
    visits = []
    for step, index in enumerate(order):
        visits.append((state.problem, index))
        state, deltas = state.after(inputs[index], labels[index], training)
        T[index] += training.scale(step) * deltas
    every = range(problem.last + 2)
    rests = [problem.augmented(k) - problem.affine(k) + state.problem.affine(k) for k in every]
    layers = tuple(float(rest.norm() / problem.augmented(k).norm()) for k, rest in enumerate(rests))
    noise = [rounding(problem.affine(k), 2 * problem.precision, len(training.sizes)) for k in every]
    misfit = max(float(rest.pow(2).mean().sqrt()) / sigma for rest, sigma in zip(rests, noise, strict=True))
    inverse = solve(T, torch.eye(T.shape[1], dtype=T.dtype, device=T.device))
    step = inverse @ rests[0]
    left = inverse.norm(dim=1) * rests[0].norm() / T.shape[1] ** 0.5
    error = (step.norm(dim=1) + left) / problem.extend(0, inputs).norm(dim=1)
    nudged = _nudged(problem, inputs, rests, visits) if misfit > FITS else None
    return Comparison(layers, misfit, error), inputs + step[:, : inputs.shape[1]] if nudged is None else nudged


def _nudged(
    problem: NetworkView,
    inputs: Float[Tensor, "s n"],
    rests: list[Float[Tensor, "_m _n"]],
    visits: list[tuple[NetworkView, Int[Tensor, " _k"]]],
) -> Float[Tensor, "s n"] | None:
    """The inputs, in each layer that of one sample moved by a hair so that a unit switches; `None` where none should.

    A unit that is on in a visit when it should be off, or the reverse, leaves a multiple of that sample's activations
    in its row of the residual, which stands out, and is near zero for it. `visits` are each step's weights and samples.
    """
    states, moved = forward(problem, inputs)[0], None
    for k in range(problem.last + 1):
        size, y = rests[k].norm(dim=1), problem.extend(k, states[k])
        unit = int(size.argmax())
        if size[unit] < OUTLYING * size.median():
            continue
        moves = torch.full_like(inputs, float("inf"))
        for now, index in visits:
            move = _switch(now, inputs[index], k, unit)
            least = move.norm(dim=1) < moves[index].norm(dim=1)
            moves[index[least]] = move[least]
        share = (torch.linalg.pinv(y.T) @ rests[k][unit]).abs() * y.norm(dim=1)
        share[~(moves.norm(dim=1) < CLOSE * inputs.norm(dim=1))] = 0
        if share.any():
            moved = inputs.clone() if moved is None else moved
            moved[share.argmax()] += moves[share.argmax()]
    return moved


def _switch(problem: NetworkView, inputs: Float[Tensor, "s n"], k: int, unit: int) -> Float[Tensor, "s n"]:
    """The shortest way for each input to the other side of the zero of a unit of hidden layer k, twice as far."""
    states, _ = forward(problem, inputs)
    slope = problem.weights[k][unit].expand(len(inputs), -1)
    for below in range(k - 1, -1, -1):
        slope = (slope * (states[below + 1] > 0)) @ problem.weights[below]
    return -2 * slope * (problem.apply(k, states[k])[:, unit] / slope.pow(2).sum(1))[:, None]


@dataclass(frozen=True)
class Retraced:
    """Makes results of samples that were retraced."""

    problem: NetworkView
    training: Training
    terms: Terms

    def verified(self, samples: Samples, seen: Comparison, starts: int) -> Reconstruction:
        """Samples with the evidence for them; none where they leave much of the update unexplained."""
        count, size = len(samples.inputs), self.problem.extend(0, samples.inputs).norm(dim=1) / norms(samples.inputs)
        bound, once = SAFETY * size * seen.error, torch.ones_like(samples.labels)
        told = self.training.count + self.training.dropped
        reserve = self._open_lengths(samples, seen)
        evidence = Certificate(once, told, max(seen.layers), EXACT.layer, bound, EXACT.recovered, reserve=reserve)
        reason = "simulating the local training gives the update in every layer"
        if not evidence.holds:
            left = f"{max(seen.layers):.1e} of a layer's change, {seen.misfit:.1f} times the weights' rounding"
            off = f"expected relative error {float(seen.error.max()):.1e} at worst"
            reason = f"simulating the local training from {count} samples leaves {left}: {off}"
            if reserve and bool(evidence.explained.all()):
                reason = f"{reason}; {reserve}"
            if self.training.dropped:
                reason += f"; {count} of {told} samples fill whole mini-batches, the others were dropped"
        if max(seen.layers) > EXPLAINED:
            nobody = replace(samples, inputs=samples.inputs[:0], labels=samples.labels[:0])
            return self.unverified(nobody, f"what was found does not explain the update: {reason}", starts)
        expected = seen.error if not evidence.holds and bool(seen.error.isfinite().all()) else None
        verdict = {"certified": evidence.certified, "complete": evidence.holds, "error_bound": bound}
        return replace(self._result(samples, seen.error, reason, starts), **verdict, expected_error=expected)

    def _open_lengths(self, samples: Samples, seen: Comparison) -> str:
        """Why the labels leave open how long inputs are, in words; empty where they tell it."""
        counts = F.one_hot(samples.labels, self.problem.classes).to(samples.inputs)
        targets = Targets(counts, self.problem.unit(len(counts)), 0.0)
        run = passes(self.problem, samples.inputs, targets)
        return open_by_labels(self.problem, run, targets, Misfit(seen.layers, seen.error))

    def unverified(self, samples: Samples, reason: str, starts: int) -> Reconstruction:
        """Samples that nothing was held against."""
        return self._result(samples, torch.full_like(samples.inputs[:, 0], float("inf")), reason, starts)

    def _result(self, samples: Samples, residuals: Float[Tensor, " s"], reason: str, starts: int) -> Reconstruction:
        stats = self.terms.stats(starts, len(self.training.sizes))
        inputs, nobody = self.problem.shaped(samples.inputs), residuals < 0
        evidence = (residuals, nobody, False, reason, stats)
        return Reconstruction(inputs, samples.labels, self.training.count, *evidence, method="local training")
