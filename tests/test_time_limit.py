"""A time limit holds for the tidying up too: on a clock that only moves when it is looked at."""

import time
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from network_problems import case
from problems import batch, make

from spear import attack, inversion, models
from spear.deployments import completion, local_training
from spear.deployments.likelihood import refine
from spear.deployments.opening import open_noisy
from spear.deployments.simulation import Training
from spear.descent import layer
from spear.descent.coupling import uncoupled
from spear.federated import defences, gradient
from spear.network import layerwise, whole_batch
from spear.network.problem import forward, open_network
from spear.reconstruction import Budget

PAST = -1.0  # on any clock


@dataclass
class Clock:
    """Seconds that pass with each look."""

    step: float
    now: float = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noisy(update):
    return defences.noisy(update, 0.1, relative=True, generator=_generator())


def _pruned(update):
    return defences.pruned_random(update, 0.5, generator=_generator())


def _holes(update):
    known = {name: torch.rand(g.shape, generator=_generator()) < 0.97 for name, g in update.gradients.items()}
    return replace(update, known={name: mask for name, mask in known.items() if mask.ndim == 2})


@pytest.mark.parametrize("change", [_noisy, _pruned, _holes, lambda update: update])
@pytest.mark.parametrize("method", ["auto", "network"])
@pytest.mark.parametrize("step", [0.05, 0.7])
def test_no_method_looks_at_the_clock_long_after_the_limit(monkeypatch, change, method, step):
    """Each look costs `step`: what goes on after the limit of 3 s is a few looks."""
    inputs, labels = batch(20, 90)
    model = models.fcnn((90,), 110, 3, 10)
    update = change(gradient(model, inputs, labels))
    clock = Clock(step)
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(inversion, "Budget", partial(Budget, started=0.0))
    attack(model, update, method=method, time_limit=3)
    assert clock.now < 3 + 2 + 6 * step


@pytest.mark.parametrize("seconds", [0, 1.0, 20, 1000])
def test_tidying_up_has_half_of_the_grace(seconds):
    budget = Budget(seconds, started=5.0)
    assert budget.until < budget.latest <= budget.until + max(0.1 * seconds, 2) / 2
    assert Budget().latest == float("inf")


def test_a_refinement_that_is_late_is_one_round():
    inputs, labels = batch(6, 80)
    model = models.fcnn((80,), 100, 3, 10)
    update = _noisy(gradient(model, inputs, labels))
    noisy = open_noisy(open_network(model, update), update).noisy()
    start = inputs + 0.05
    one, late = refine(noisy, start, labels, rounds=1), refine(noisy, start, labels, until=PAST)
    torch.testing.assert_close(late.inputs, one.inputs)
    assert not torch.allclose(refine(noisy, start, labels).inputs, one.inputs)


@pytest.mark.parametrize("done", [0, 1, 4])
def test_going_down_ends_with_the_samples_that_there_was_time_for(monkeypatch, done):
    problem = case((50, 90, 90, 10), 6).problem
    truth = case((50, 90, 90, 10), 6).inputs
    lows = [problem.factors(k) for k in range(problem.last + 1)]
    y = forward(problem, truth)[0][problem.last]
    whole, determined = layerwise.down(problem, lows, y)
    torch.testing.assert_close(whole, truth)
    assert determined.all()
    monkeypatch.setattr(time, "monotonic", Clock(1.0))
    part, determined = layerwise.down(problem, lows, y, until=done + 0.5)
    assert determined.tolist() == [True] * done + [False] * (6 - done)
    torch.testing.assert_close(part[:done], truth[:done])


def test_a_late_batch_of_large_logits_is_held_against_the_update_once(monkeypatch):
    ways = []
    monkeypatch.setattr(whole_batch, "descend", lambda problem, rows, *rest, **how: ways.append(how) or (rows, None))
    monkeypatch.setattr(
        whole_batch, "judge", lambda problem, inputs, targets, reached: whole_batch.nothing(problem, "", reached)
    )
    monkeypatch.setattr(
        whole_batch, "consistent", lambda problem, spaces, solved, *rest: torch.zeros(len(solved)).bool()
    )
    problem = case((50, 90, 90, 10), 5).problem
    problem = replace(problem, weights=(*problem.weights[:-1], 1e6 * problem.weights[-1]))
    low = problem.factors(problem.last)
    spaces = whole_batch.open_spaces(problem, low.L, low.R)
    solved = whole_batch.Solved(torch.eye(5).to(low.L), torch.rand(5, 10).to(low.L) * 1e-3, torch.ones(5, 90).bool())
    monkeypatch.setattr(whole_batch, "plausible", lambda problem, rows, solved: torch.ones(len(rows)).bool())
    reached = whole_batch.Reached(5, 0.0, 5, 1, 1)
    for until, expected in ((PAST, 1), (float("inf"), 2)):
        ways.clear()
        whole_batch.conclude(problem, spaces, solved, reached, until)
        assert [how.get("computed", True) for how in ways] == [True, False][:expected]


def test_reflections_that_are_late_are_one_step_a_stage():
    observed = make().observed
    nothing = uncoupled(observed.L[:0])
    start = observed.L[:12]
    stages = layer.schedule(40)
    single = [replace(stage, steps=1) for stage in stages]
    late = layer.reflect(observed, nothing, start, start, stages, PAST)
    torch.testing.assert_close(late, layer.reflect(observed, nothing, start, start, single))


def test_a_completion_that_is_late_is_not_exact(monkeypatch):
    J = torch.randn(60, 4, generator=_generator()).double() @ torch.randn(4, 90, generator=_generator(1)).double()
    kept = torch.rand(60, 90, generator=_generator(2)) < 0.6
    assert completion.complete(J, kept, generator=_generator()).exact
    calls = []
    solve = completion.masked_least_squares
    monkeypatch.setattr(completion, "masked_least_squares", lambda *given: calls.append(1) or solve(*given))
    late = completion.complete(J, kept, until=PAST, generator=_generator())
    assert not late.exact
    assert len(calls) <= 2


@pytest.mark.parametrize(("until", "rounds"), [(PAST, 1), (float("inf"), local_training.ROUNDS)])
def test_retraced_training_that_is_late_is_simulated_once(monkeypatch, until, rounds):
    made = case((50, 90, 90, 10), 8)
    samples = local_training.Samples(
        made.inputs, torch.zeros(8, dtype=torch.long), (torch.arange(4), torch.arange(4, 8))
    )
    fits = []

    def compare(problem, training, trial, labels, order):
        fits.append(1e6 - len(fits))
        return local_training.Comparison((1.0,), fits[-1], torch.ones(8).double()), trial

    monkeypatch.setattr(local_training, "_compare", compare)
    training = Training(8, (4, 4), 0.1, 0.0)
    best = local_training._refined(made.problem, training, samples, list(samples.members), until)
    assert (len(fits), best[1].misfit) == (rounds, min(fits))
