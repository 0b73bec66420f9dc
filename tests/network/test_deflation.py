import pytest
import torch
from network_problems import case
from test_phase_retrieval import opened, solved

from spear.network import deflation, exact_step, layerwise, one_by_one
from spear.network.exact_step import Tolerances
from spear.network.problem import Targets, passes
from spear.published.lowrank import decompose


@pytest.fixture
def scene():
    """A case, its top spaces, all true directions, its true passes, and the layer below's factorisation."""
    made = case((60, 120, 120, 10), 20)
    spaces, deltas, errors, _ = opened((60, 120, 120, 10), 20)
    counts = torch.nn.functional.one_hot(made.labels, 10).double()
    run = passes(made.problem, made.inputs, Targets(counts, 1 / 20, 0.0))
    return made, spaces, solved(spaces, deltas, errors), run, decompose(made.problem.augmented(0)), counts


@pytest.mark.parametrize("guessed", ["nothing", "nearly", "all"])
def test_masks_below_are_those_of_the_activations(scene, guessed):
    made, spaces, true, run, low, _ = scene
    h = deflation.vectors_below(made.problem, spaces, true)
    generator = torch.Generator().manual_seed(0)
    active = run.inputs[1] > 0
    wrong = torch.rand(active.shape, generator=generator) < 0.1
    guess = {"nothing": torch.zeros_like(active), "nearly": active ^ wrong, "all": active}[guessed]
    index, mask = deflation.masks_below(spaces, true, h, guess, low.L, Tolerances())
    assert len(index.unique()) == len(index) == 20
    assert torch.equal(mask, active[index])


@pytest.mark.parametrize("known", [8, 20])
def test_activations_follow_from_their_zeros(scene, known):
    _, spaces, true, run, _, _ = scene
    some = true[torch.arange(known)]
    index = torch.tensor([5, 0, 3])
    mask = run.inputs[1][index] > 0
    sure, s = deflation.activation_coordinates(spaces, some, spaces.rows[:, :-1], index, mask, Tolerances())
    rows = s @ spaces.rows
    assert sure.all()
    assert torch.allclose(rows[:, :-1] / rows[:, -1:], run.inputs[1][index], atol=1e-9)


def test_a_wrong_mask_is_not_sure(scene):
    _, spaces, true, run, _, _ = scene
    mask = ~(run.inputs[1][:3] > 0)
    sure, _ = deflation.activation_coordinates(
        spaces, true[torch.arange(8)], spaces.rows[:, :-1], torch.arange(3), mask, Tolerances()
    )
    assert not sure.any()


def test_deflation_is_the_problem_without_these_samples(scene):
    _, spaces, true, run, _, _ = scene
    index, mask = torch.arange(6), run.inputs[1][:6] > 0
    some = true[torch.arange(9)]
    _, s = deflation.activation_coordinates(spaces, some, spaces.rows[:, :-1], index, mask, Tolerances())
    smaller, rest = deflation.deflate(spaces, some, index, s)
    kept = run.deltas[1][6:].T @ torch.cat([run.inputs[1][6:], torch.ones(14, 1, dtype=torch.float64)], 1)
    assert torch.allclose((smaller.basis * smaller.singular) @ smaller.rows, kept, atol=1e-14)
    assert torch.allclose(exact_step.solve_mask(smaller, rest.mask).t, rest.t, atol=1e-8)


def test_down_and_witness_at_the_truth(scene):
    made, _, _, run, low, counts = scene
    lows = [low, decompose(made.problem.augmented(1))]
    inputs, determined = layerwise.down(made.problem, lows, run.inputs[1])
    assert determined.all()
    assert torch.allclose(inputs, made.inputs, atol=1e-9)
    seen = one_by_one.witness(made.problem, lows, inputs, counts)
    assert seen.sine.max() < 1e-9
    assert torch.allclose(seen.weight, torch.full((20, 2), 1 / 20, dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize("what", ["input", "label"])
def test_witness_speaks_against_what_was_not_in_the_batch(scene, what):
    made, _, _, _, low, counts = scene
    lows = [low, decompose(made.problem.augmented(1))]
    inputs = (made.inputs + made.inputs.roll(1, 0)) / 2 if what == "input" else made.inputs
    labels = counts.roll(1, 1) if what == "label" else counts
    assert one_by_one.witness(made.problem, lows, inputs, labels).sine.min() > 1e-3
