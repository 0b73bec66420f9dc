import time
from dataclasses import replace

import pytest
import torch
from network_problems import assert_labels, case, errors

from spear.directions import unit_rows
from spear.network import one_by_one, projection, whole_batch
from spear.network.factors import Factors, subtract, wedderburn
from spear.network.one_by_one import KnownSamples
from spear.network.problem import Targets, passes
from spear.network.projection import Limits, Projections
from spear.published.lowrank import decompose
from spear.reconstruction import Budget, Terms


def opened(sizes=(60, 150, 150, 10), batch=24, seed=0):
    """A case, the factors of its first two gradients, and its true coordinates c."""
    made = case(sizes, batch, seed=seed)
    first, second = (Factors.of(decompose(made.problem.augmented(k))) for k in (0, 1))
    onto = Projections.of(made.problem, first, second)
    return made, first, second, onto.lift, onto.span, unit_rows(made.problem.apply(0, made.inputs) @ onto.lift)


EXACT = Limits(rough=0.2, alike=0.9999, sine=1e-6, same=1 - 1e-6, gap=1e3, floor=1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(60, 150, 150, 10), (200, 120, 140, 5)])
def test_a_sample_solves_its_problem_and_comes_back(sizes, seed):
    made, first, second, lift, span, c = opened(sizes, seed=seed)
    onto = Projections.of(made.problem, first, second)
    assert torch.allclose(onto.place(made.inputs), c, atol=1e-12)
    assert torch.allclose(onto.inputs(c), made.inputs, atol=1e-9)
    z, y = c @ lift.T, (c @ lift.T).relu()
    slow = made.problem.apply(0, made.inputs)
    assert torch.allclose(z, slow / slow.norm(dim=1, keepdim=True), atol=1e-12)
    assert float((y - y @ span @ span.T).norm()) < 1e-10
    assert torch.allclose(
        onto.polished(made.inputs, EXACT)[:, None].sub(made.inputs).norm(dim=2).amin(1),
        torch.zeros(24).double(),
        atol=1e-9,
    )


@pytest.mark.parametrize("seed", range(3))
def test_starts_lead_to_samples_each_once_and_the_best_first(seed):
    made, first, second, *_ = opened(seed=seed)
    onto = Projections.of(made.problem, first, second)
    starts = onto.starts(60, torch.Generator().manual_seed(seed))
    assert torch.allclose(starts.norm(dim=1), torch.ones(60).double())
    c, sine = onto.settle(onto.climb(torch.cat([starts, starts]), EXACT), EXACT)
    assert torch.equal(sine, sine.sort()[0])
    found = onto.inputs(c)
    near = (found[:, None] - made.inputs).norm(dim=2) / made.inputs.norm(dim=1)
    assert near.amin(1).max() < 1e-9
    assert len(near.argmin(1).unique()) == len(found) > 5
    assert torch.equal(found, onto.samples(torch.cat([starts, starts]), EXACT))


def test_no_starts_no_samples_and_an_input_at_infinity_is_none():
    made, first, second, *_ = opened()
    onto = Projections.of(made.problem, first, second)
    assert onto.samples(onto.lift.new_zeros(0, 24), EXACT).shape == (0, 60)
    away = onto.rows[:, -1:]
    level = unit_rows(torch.linalg.qr(away, mode="complete")[0][:, 1:2].T)  # c of [x; 0]
    assert onto.inputs(level @ onto.triangle.T).shape == (0, 60)


@pytest.mark.parametrize(("limits", "kept"), [({}, 24), ({"gap": 1e12}, 0), ({"sine": 0.0}, 0), ({"same": -1.0}, 1)])
def test_every_limit_turns_down(limits, kept):
    made, first, second, _, _, c = opened()
    onto = Projections.of(made.problem, first, second)
    assert len(onto.settle(c, replace(EXACT, **limits))[0]) == kept


@pytest.mark.parametrize("count", [1, 5, 24])
@pytest.mark.parametrize("seed", range(3))
def test_a_sample_taken_out_at_its_weight_lowers_the_rank(count, seed):
    made, first, *_ = opened(seed=seed)
    counts = torch.nn.functional.one_hot(made.labels, 10).double()
    run = passes(made.problem, made.inputs, Targets(counts, 1.0, 0.0))
    x = made.problem.extend(0, made.inputs)
    t, s = first.place(run.deltas[0][:count], x[:count])
    weight = wedderburn(first.singular, t, s)
    assert torch.allclose(weight, torch.full((count,), 1 / 24).double(), rtol=1e-8)
    left, values, right = subtract(first.singular, weight[:, None] * t, s)
    slow = torch.diag(first.singular) - sum(w * torch.outer(a, b) for w, a, b in zip(weight, t, s, strict=True))
    assert torch.allclose((left * values) @ right, slow, atol=1e-13)
    assert len(values) == 24 - count


def test_exact_step_at_the_truth_and_near_it():
    _, _, _, lift, span, c = opened()
    noise = torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close = c + 1e-3 * noise
    for begin in (c, close / close.norm(dim=1, keepdim=True)):
        end, sine, second = projection.polish(begin, lift, span)
        assert torch.allclose(end, c, atol=1e-8)
        assert sine.max() < 1e-6
        assert second.min() > 1e-3


def test_ascent_finds_samples_and_equals_single_starts():
    _, _, _, lift, span, c = opened()
    begin = torch.randn(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    begin = begin / begin.norm(dim=1, keepdim=True)
    end, sine = projection.ascend(begin, lift, span)
    hit = (end @ c.T).amax(1) > 1 - 1e-4
    assert hit.double().mean() > 0.3
    assert torch.equal(hit, sine < 0.02)
    one, _ = projection.ascend(begin[3:4], lift, span, steps=20)
    assert torch.allclose(one[0], projection.ascend(begin, lift, span, steps=20)[0][3], atol=1e-9)


def test_factors_without_samples_are_those_of_the_rest():
    made, first, second, *_ = opened()
    counts = torch.nn.functional.one_hot(made.labels[:5], 10).double()
    smaller = one_by_one._without(made.problem, (first, second), KnownSamples(made.inputs[:5], counts), 1 / 24)
    rest = case((60, 150, 150, 10), inputs=made.inputs[5:], labels=made.labels[5:], reduction="sum")
    for k, f in enumerate(smaller):
        assert len(f.singular) == 19
        assert torch.allclose((f.basis * f.singular) @ f.rows, rest.problem.augmented(k) / 24, atol=1e-13)


def test_labels_by_the_span_of_the_first_gradient():
    made, *_ = opened()
    labels, alone = one_by_one.label(made.problem, made.inputs, decompose(made.problem.augmented(0)).L)
    assert torch.equal(labels, made.labels)
    assert alone.all()
    _, alone = one_by_one.label(made.problem, made.inputs.flip(1), decompose(made.problem.augmented(0)).L)
    assert not alone.any()


@pytest.mark.parametrize("sizes", [(60, 120, 120, 120, 120, 120, 120, 10), (60, 200, 200, 300)])
def test_where_the_last_layer_says_too_little_the_input_side_takes_over(sizes):
    """Deep networks of random inputs, whose last layers blur the samples, and more classes than units."""
    made = case(sizes, 20)
    found = whole_batch.distinct_samples(made.problem, Terms(Budget(seconds=60.0)))
    assert found.complete, found.reason
    assert errors(made.inputs, found.inputs).max() < 1e-9
    assert_labels(made, found)


def test_a_sample_found_by_the_output_side_is_subtracted_first():
    made, *_ = opened()
    counts = torch.nn.functional.one_hot(made.labels, 10).double()
    lows = [decompose(made.problem.augmented(k)) for k in (0, 1)]
    known = KnownSamples(made.inputs[:20], counts[:20])
    generator = torch.Generator().manual_seed(0)
    found = one_by_one.peel(
        made.problem, lows, known, 1 / 24, accept=1e-9, until=time.monotonic() + 20.0, generator=generator
    )
    assert len(found.inputs) == 24
    assert errors(made.inputs, found.inputs).max() < 1e-9


@pytest.mark.parametrize("classes", [2, 10, 40])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_class_is_a_pass_of_its_own(classes, layer):
    made = case((30, 60, 60, classes), 5, seed=classes)
    each = list(projection.each_class(made.problem, made.inputs, layer))
    assert len(each) == classes
    for label, found in enumerate(each):
        counts = torch.zeros(5, classes, dtype=torch.float64)
        counts[:, label] = 1
        own = passes(made.problem, made.inputs, Targets(counts, 1.0, 0.0)).deltas[layer]
        assert torch.equal(found, own)
