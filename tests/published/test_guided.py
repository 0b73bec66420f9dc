"""Guided sampling: guesses choose rows well, a bad guess does no harm, and what is certified is true."""

import re

import pytest
import torch
from problems import make

from spear import attack, metrics
from spear.published import guided, theory
from spear.published.algorithm import Sampling
from spear.published.filtering import thresholds, zero_rows
from spear.published.guided import Guided

OUT_OF_REACH = 1e14  # proposals that uniform sampling would need


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blurred(inputs, decibels, seed=0):
    """Inputs with normal noise, at a PSNR: an oracle's approximation."""
    peak = inputs.max() - inputs.min()
    return inputs + peak * 10 ** (-decibels / 20) * torch.randn(inputs.shape, generator=generator(seed)).to(inputs)


def large(seed=0, **options):
    """A batch that uniform sampling cannot reach."""
    problem = make(b=44, m=400, n=100, depth=5, seed=seed, **options)
    assert theory.expected_proposals(theory.half_rates(400, 44)) > OUT_OF_REACH
    return problem


@pytest.mark.parametrize("focus", [0, 2, 8])
@pytest.mark.parametrize("size", [1, 5, 12, 20])
def test_rows_are_different_and_among_the_lowest_half(focus, size):
    Z = torch.randn(50, 24, generator=generator(), dtype=torch.float64)
    rows = guided.draw_rows(Z, size, focus=focus, generator=generator())
    assert rows.shape == (50, size)
    assert all(len(set(row)) == size for row in rows.tolist())
    place = Z.argsort(dim=1).argsort(dim=1).gather(1, rows)
    assert int(place.max()) < max(12, size)


def test_more_focus_draws_lower_rows():
    Z = torch.randn(400, 100, generator=generator(), dtype=torch.float64)
    means = [Z.gather(1, guided.draw_rows(Z, 20, focus=f, generator=generator())).mean().item() for f in (0, 1, 4, 100)]
    assert means == sorted(means, reverse=True)
    lowest = Z.sort(dim=1).values[:, :21].mean()
    assert means[-1] == pytest.approx(float(lowest), abs=0.01)


@pytest.mark.parametrize("bias", [True, False])
def test_the_truth_is_its_own_guess(bias):
    problem = make(bias=bias)
    V = torch.linalg.inv(problem.q)
    expected = V / torch.linalg.vector_norm(V, dim=0)
    v = guided.guesses(problem.observed, problem.inputs)
    torch.testing.assert_close((v * expected.mT).sum(1).abs(), torch.ones(len(v), dtype=v.dtype))


def test_what_is_outside_the_row_space_does_not_matter():
    problem = make(bias=False)
    R = problem.observed.R
    noise = torch.randn(6, 40, generator=generator(), dtype=torch.float64)
    outside = noise - noise @ torch.linalg.pinv(R) @ R
    v, blurry = (guided.guesses(problem.observed, problem.inputs + x) for x in (0, 50 * outside))
    torch.testing.assert_close(v, blurry)


def test_a_perfect_guess_hits_at_every_draw_of_low_rows():
    problem = large()
    observed, b = problem.observed, 44
    Z = guided.guesses(observed, problem.inputs) @ observed.B.mT
    rows = guided.draw_rows(Z, b - 1, generator=generator())
    truth = zero_rows(observed.L, problem.q)
    assert truth.gather(1, rows).all()


def test_a_guess_of_the_batch_multiplies_the_hits():
    problem = large(seed=1)
    observed, options = problem.observed, {"threshold": thresholds(problem.observed, 1e-9)[0]}
    pool = guided.guesses(observed, blurred(problem.inputs, 25))
    without, with_ = (
        guided.propose(observed, p, observed.L[:0], 500, generator=generator(), **options) for p in (None, pool)
    )
    assert without.count == with_.count == 500
    assert with_.hits > 2 * without.hits
    assert len(with_.directions) > len(without.directions)


def test_proposals_are_true_directions_away_from_those_found():
    problem = large()
    observed, threshold = problem.observed, thresholds(problem.observed, 1e-9)[0]
    found = problem.q[:34]
    result = guided.propose(observed, None, found, 300, threshold=threshold, generator=generator())
    match = (result.directions @ problem.q.mT).abs()
    assert len(result.directions)
    assert bool((match.amax(1) > 1 - 1e-9).all())
    assert bool((match.argmax(1) >= 34).double().mean() > 0.9)
    assert result.zeros.tolist() == zero_rows(observed.L, result.directions).sum(1).tolist()


@pytest.mark.parametrize("decibels", [None, 10, 30])
@pytest.mark.parametrize("seed", range(2))
def test_a_batch_out_of_reach_of_uniform_sampling(decibels, seed):
    problem = large(seed=seed)
    guess = None if decibels is None else blurred(problem.inputs, decibels)
    result = attack(problem.model, problem.update, method=Guided(approximate=guess), seed=seed)
    report = metrics.evaluate(result, problem.inputs, problem.labels)
    assert result.complete
    assert (report.recall, report.precision, report.label_accuracy) == (1, 1, 1)
    assert result.stats.proposals == guided.ROUND * result.stats.rounds


@pytest.mark.parametrize("bad", ["zeros", "noise", "nan", "one", "repeated", "none"])
@pytest.mark.parametrize("b", [1, 2, 3, 8])
def test_a_bad_guess_does_no_harm(bad, b):
    problem = make(b=b)
    noise = torch.randn(b, 40, generator=generator(7), dtype=torch.float64)
    guess = {
        "zeros": 0 * noise,
        "noise": 100 * noise,
        "nan": noise * torch.nan,
        "one": noise[:1],
        "repeated": noise[:1].repeat(3 * b, 1),
        "none": noise[:0],
    }[bad]
    result = attack(problem.model, problem.update, method=Guided(approximate=guess))
    report = metrics.evaluate(result, problem.inputs, problem.labels)
    assert result.complete
    assert (report.recall, report.precision) == (1, 1)


@pytest.mark.parametrize("seed", range(4))
def test_wrong_weights_certify_nothing_and_say_why(seed):
    problem, stranger = make(seed=seed), make(seed=seed + 10)
    result = attack(stranger.model, problem.update, method=Guided(approximate=problem.inputs), max_proposals=40_000)
    assert not result.certified.any()
    assert not result.complete
    assert metrics.evaluate(result, problem.inputs).recall == 1  # the gradient's own zeros need no weights
    assert "older or newer weights than the client's" in result.reason


def test_too_large_a_batch_ends_where_guesses_do():
    problem = make(b=30, m=60, n=50)
    result = attack(problem.model, problem.update, method="guided")
    assert not result.complete
    assert re.match(r"guided: 30 rounds of guesses found nothing new: \d+ of 30 directions", result.reason)


def test_budgets_and_progress():
    problem, seen = make(b=30, m=60, n=50), []
    result = attack(problem.model, problem.update, method="guided", max_proposals=2000, progress=seen.append)
    assert [p.proposals for p in seen] == [1000, 2000]
    assert result.stats.proposals == 2000
    assert attack(problem.model, problem.update, method="guided", time_limit=0).stats.proposals == 0


def test_without_a_bias_inputs_are_known_up_to_a_factor():
    problem = make(bias=False)
    result = attack(problem.model, problem.update, method=Guided(approximate=problem.inputs))
    unit = problem.inputs / torch.linalg.vector_norm(problem.inputs, dim=1, keepdim=True)
    assert metrics.evaluate(result, unit).recall == 1
    assert not result.certified.any()


def test_the_seed_decides():
    problem = make(b=10, m=120)
    first, again, other = (attack(problem.model, problem.update, method="guided", seed=s) for s in (3, 3, 4))
    assert torch.equal(first.inputs, again.inputs)
    assert first.stats.proposals == again.stats.proposals
    assert not torch.equal(first.inputs, other.inputs)


def test_sizes_must_agree():
    problem = make()
    with pytest.raises(ValueError, match="approximations have 39 entries; the layer has 40 inputs"):
        attack(problem.model, problem.update, method=Guided(approximate=problem.inputs[:, :39]))


def test_only_guided_sampling_takes_approximations():
    with pytest.raises(TypeError, match="approximate"):
        Sampling(approximate=make().inputs)
