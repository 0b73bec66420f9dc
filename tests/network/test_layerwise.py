from dataclasses import replace

import pytest
import torch
from network_problems import case

from spear.network.check import check
from spear.network.labels import decode
from spear.network.layerwise import (
    RULES,
    above_first_gap,
    above_gap,
    above_noise,
    active,
    descend,
    nearest_mask,
    solve,
    without_mistakes,
)
from spear.network.problem import NetworkView, Targets, forward, passes


def truth(made) -> Targets:
    """The labels as counts, each copy weighing 1 / b."""
    counts = torch.nn.functional.one_hot(made.labels, made.problem.classes).double()
    return Targets(counts, 1 / len(counts), 0.0)


@pytest.mark.parametrize("sizes", [(30, 40, 5), (30, 40, 50, 5), (20, 40, 30, 35, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_samples_own_gradients_sum_to_autograds(sizes, bias):
    made = case(sizes, 7, bias=bias)
    run = passes(made.problem, made.inputs, truth(made))
    for k, (x, delta) in enumerate(zip(run.inputs, run.deltas, strict=True)):
        assert torch.allclose(delta.T @ made.problem.extend(k, x), made.problem.augmented(k), atol=1e-15)
    layers = check(made.problem, made.inputs, truth(made))[0].layers
    assert max(layers) < 1e-14


def test_check_measures_the_error_of_each_input():
    made = case((30, 40, 50, 5), 7)
    wrong = made.inputs.clone()
    wrong[3] += 1e-5 * torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen, corrected = check(made.problem, wrong, truth(made))
    size = (wrong[3] - made.inputs[3]).norm() / made.inputs[3].norm()
    assert size / 3 < seen.inputs[3] < 3 * size
    assert max(seen.layers) > 1e-8
    assert (corrected - made.inputs).norm() < 0.5 * (wrong - made.inputs).norm()


@pytest.mark.parametrize("bias", [True, False])
def test_descend_from_the_top_layers_vectors(bias):
    made = case((30, 40, 50, 5), 7, bias=bias)
    run = passes(made.problem, made.inputs, truth(made))
    scale = torch.rand(7, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    rows = scale * made.problem.extend(1, run.inputs[1])
    inputs, targets = descend(made.problem, rows, run.deltas[1] != 0, run.deltas[2] / scale)
    assert (inputs - made.inputs).norm() < 1e-10 * made.inputs.norm()
    assert torch.equal(targets.counts, truth(made).counts)


@pytest.mark.parametrize("precision", [1e-16, 6e-8])
def test_a_unit_whose_h_vanishes_takes_its_state_from_the_pre_activation(precision):
    made = case((30, 40, 50, 5), 7)
    run = passes(made.problem, made.inputs, truth(made))
    head = made.problem.weights[2].clone()
    head[:, 3] *= 1e-9
    problem = replace(made.problem, weights=(*made.problem.weights[:2], head), precision=precision)
    mask = made.problem.apply(1, run.inputs[1]) > 0
    wrong = mask.clone()
    wrong[:, 3:5] = ~mask[:, 3:5]
    repaired = without_mistakes(problem, run.inputs[1], wrong, run.deltas[2])
    assert torch.equal(repaired[:, 3], mask[:, 3])
    shown = (run.deltas[2] @ head).abs()[:, 4] > 0.1 * (run.deltas[2] @ head).pow(2).mean(1).sqrt()
    assert torch.equal(repaired[shown, 4], wrong[shown, 4])
    assert shown.any()


@pytest.mark.parametrize("known", [True, False])
def test_decode_counts_copies_and_their_labels(known):
    made = case((30, 40, 50, 5), 6, known=known)
    p = forward(made.problem, made.inputs)[1].softmax(1)
    counts = torch.eye(6, 5, dtype=torch.float64)
    counts[1, 3], counts[2, 2], counts[5, 1] = 2, 2, 1
    batch = int(counts.sum())
    problem = made.problem if not known else replaced(made.problem, batch)
    targets = decode(problem, (counts.sum(1, keepdim=True) * p - counts) / batch, p)
    assert torch.equal(targets.counts, counts)
    assert targets.unit == 1 / batch
    assert targets.error < 1e-12


def replaced(p: NetworkView, batch: int) -> NetworkView:
    return NetworkView(p.weights, p.biases, p.weight_gradients, p.bias_gradients, batch, p.reduction, p.precision)


def test_dependent_vectors_give_no_finite_answer_instead_of_a_wrong_one():
    deltas = torch.ones(2, 5, dtype=torch.float64)
    answer = solve(deltas, torch.eye(5, dtype=torch.float64))
    assert not answer.isfinite().all() or answer.abs().max() > 1e12


def test_each_rule_tells_activations_from_rounding():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(5, 60, generator=generator, dtype=torch.float64).relu()
    y = truth + 1e-10 * torch.randn(5, 60, generator=generator, dtype=torch.float64)
    assert torch.equal(above_noise(y), truth > 0)
    assert torch.equal(above_gap(y), truth > 0)
    assert torch.equal(above_first_gap(y), truth > 0)
    one_sided = truth + 1e-10 * torch.rand(5, 60, generator=generator, dtype=torch.float64)
    assert torch.equal(above_gap(one_sided), truth > 0)


def test_problem_names_what_does_not_fit():
    p = case((30, 40, 50, 5), 7).problem
    with pytest.raises(ValueError, match="layer 2: weight \\(50, 40\\) but gradient \\(40, 30\\)"):
        NetworkView(p.weights, p.biases, (*p.weight_gradients[:1] * 2, p.weight_gradients[2]), p.bias_gradients)
    with pytest.raises(ValueError, match="layer 2 takes 50 inputs; the layer below has 40 outputs"):
        NetworkView(p.weights[::2], p.biases[::2], p.weight_gradients[::2], p.bias_gradients[::2])
    with pytest.raises(ValueError, match="needs a hidden layer; the chain has 1 linear layer"):
        NetworkView(p.weights[:1], p.biases[:1], p.weight_gradients[:1], p.bias_gradients[:1])
    with pytest.raises(ValueError, match="layer 1: a bias needs its gradient"):
        NetworkView(p.weights, p.biases, p.weight_gradients, (None, *p.bias_gradients[1:]))


@pytest.mark.parametrize("seed", range(3))
def test_an_activation_that_is_tiny_among_others_is_above_the_first_gap(seed):
    """In a batch of a thousand some activation is nearer to zero than to the next larger one."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(5, 60, generator=generator, dtype=torch.float64).relu()
    truth[:, 0] = 1e-9
    y = truth + 1e-14 * torch.randn(5, 60, generator=generator, dtype=torch.float64)
    assert torch.equal(above_first_gap(y), truth > 0)
    assert not torch.equal(above_gap(y), truth > 0)


def blurred(inputs, seed):
    """A batch of 7, its activations in which the gap misleads in one sample, what leads back to them, and masks."""
    made = case((inputs, 40, 50, 5), 7, seed=seed)
    run = passes(made.problem, made.inputs, truth(made))
    generator = torch.Generator().manual_seed(seed)
    y = run.inputs[1] + 1e-5 * torch.randn(run.inputs[1].shape, generator=generator, dtype=torch.float64)
    y[2, y[2].argmax()] *= 1e4
    return made.problem, y, made.problem.back(1, run.deltas[1]), run.inputs[1] > 0


@pytest.mark.parametrize("seed", range(3))
def test_where_no_gap_stands_out_the_gradient_tells_the_active_units(seed):
    problem, y, h, mask = blurred(30, seed)
    assert int(above_gap(y)[2].sum()) == 1
    assert torch.equal(active(problem, 0, y, h, above_gap), mask)


@pytest.mark.parametrize("seed", range(3))
def test_where_a_gap_stands_out_no_gradient_is_asked(seed, monkeypatch):
    problem, y, h, mask = blurred(30, seed)
    clear = torch.where(mask, y, 1e-12 * y)
    clear[2] = clear[2].clamp_max(1.0)
    monkeypatch.setattr(NetworkView, "factors", None)
    assert torch.equal(active(problem, 0, clear, h, above_gap), mask)


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_of_less_rank_than_the_batch_tells_no_active_units(seed):
    problem, y, h, _ = blurred(4, seed)
    assert problem.factors(0).rank < len(y)
    for rule in RULES:
        assert torch.equal(active(problem, 0, y, h, rule), rule(y))


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_mask_is_not_an_empty_one(seed):
    problem, _, h, mask = blurred(30, seed)
    found = nearest_mask([torch.zeros_like(mask), mask], h, problem.factors(0).L)
    assert torch.equal(found, mask)
