import pytest
import torch
from network_problems import assert_labels, case, errors

from spear.network import one_by_one, projection, whole_batch
from spear.network.one_by_one import KnownSamples
from spear.network.projection import Factors
from spear.network.recovery import Budget
from spear.published.lowrank import decompose


def opened(sizes=(60, 150, 150, 10), batch=24, seed=0):
    """A case, the factors of its first two gradients, and its true coordinates c."""
    made = case(sizes, batch, seed=seed)
    first, second = (Factors.of(decompose(made.problem.augmented(k))) for k in (0, 1))
    lift = torch.linalg.qr(made.problem.affine(0) @ first.rows.T)[0]
    span = torch.linalg.qr(second.rows[:, :-1].T)[0]
    c = made.problem.apply(0, made.inputs) @ lift
    return made, first, second, lift, span, c / c.norm(dim=1, keepdim=True)


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
    found = whole_batch.recover(made.problem, budget=Budget(seconds=60.0))
    assert found.complete, found.reason
    assert errors(made.inputs, found.inputs).max() < 1e-9
    assert_labels(made, found)


def test_a_sample_found_by_the_output_side_is_subtracted_first():
    made, *_ = opened()
    counts = torch.nn.functional.one_hot(made.labels, 10).double()
    lows = [decompose(made.problem.augmented(k)) for k in (0, 1)]
    known = KnownSamples(made.inputs[:20], counts[:20])
    generator = torch.Generator().manual_seed(0)
    found = one_by_one.peel(made.problem, lows, known, 1 / 24, accept=1e-9, seconds=20.0, generator=generator)
    assert len(found.inputs) == 24
    assert errors(made.inputs, found.inputs).max() < 1e-9
