"""A solved sample alone: its activations from the layer below, in batches too crowded for that layer by itself."""

import pytest
import torch
from network_problems import case, errors
from test_phase_retrieval import solved as directions_of

from spear.conjugate_gradients import conjugate_gradients
from spear.directions import unit_rows
from spear.network import deflation
from spear.network.alone import Alone
from spear.network.exact_step import Tolerances
from spear.network.phase_search import PhaseSearch
from spear.network.problem import Targets, passes
from spear.network.spaces import Solved, dual
from spear.network.whole_batch import distinct_samples, open_spaces
from spear.published.lowrank import decompose
from spear.reconstruction import Budget, Terms

WIDTH, BATCH, KNOWN = 120, 60, 12  # half the width, and how many of the batch are solved
MANY, FEW = 100, 25  # inputs: more than samples, so that the gradient below has their rank, or fewer


class Scene:
    """A crowded batch, its spaces, the directions of the first samples, and the truth of all."""

    def __init__(self, inputs: int = MANY, seed: int = 0, known: int = KNOWN) -> None:
        self.made = case((inputs, WIDTH, WIDTH, 10), BATCH, seed=seed)
        low = decompose(self.made.problem.augmented(1))
        self.spaces, self.low = open_spaces(self.made.problem, low.L, low.R), decompose(self.made.problem.augmented(0))
        counts = torch.nn.functional.one_hot(self.made.labels, 10).double()
        self.run = passes(self.made.problem, self.made.inputs, Targets(counts, 1 / BATCH, 0.0))
        every = directions_of(self.spaces, self.run.deltas[1], self.run.deltas[2])
        self.solved = every[torch.arange(known)]
        self.active = self.run.inputs[1][:known] > 0
        self.h = deflation.vectors_below(self.made.problem, self.spaces, self.solved)

    @property
    def image(self) -> torch.Tensor:
        """Where the pre-activations below lie."""
        rows = self.low.R / self.low.R.norm(dim=1, keepdim=True)
        return torch.linalg.qr(self.made.problem.lift(0, rows))[0]

    def activations(self, s: torch.Tensor) -> torch.Tensor:
        """y of these s, to the scale at which [y; 1] ends in 1."""
        rows = s @ self.spaces.rows
        return rows[:, :-1] / rows[:, -1:]


@pytest.mark.parametrize("inputs", [MANY, FEW])
@pytest.mark.parametrize("seed", range(3))
def test_a_sample_lies_in_its_space_on_its_sides(inputs, seed):
    scene = Scene(inputs, seed)
    alone = Alone.of(scene.spaces, scene.solved, torch.arange(KNOWN), WIDTH)
    y = scene.spaces.rows[:, :WIDTH]
    s = scene.run.inputs[1][:KNOWN] @ y.T + scene.spaces.rows[:, -1]
    scale = scene.spaces.lift.norm() / y.norm()
    truth = torch.cat([s @ scene.spaces.lift.T, s @ y * scale], 1).float()
    assert torch.allclose(alone.near(truth), truth, atol=1e-3 * float(truth.abs().max()))
    z, _ = alone.parted(truth)
    assert torch.allclose(z, truth[:, :WIDTH], atol=1e-4)
    z, _ = alone.parted(-truth)
    assert z.abs().max() < 1e-4


@pytest.mark.parametrize("known", [1, KNOWN])
@pytest.mark.parametrize("seed", range(5))
def test_masks_are_found_without_a_guess_at_half_the_width(known, seed):
    scene = Scene(seed=seed, known=known)
    nothing = torch.zeros_like(scene.active)
    index, mask = deflation.masks_below(scene.spaces, scene.solved, scene.h, nothing, scene.low.L, Tolerances())
    assert len(index) == known
    assert torch.equal(mask, scene.active)


@pytest.mark.parametrize("share", [0.02, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_a_guess_settles_by_what_the_other_units_say(share, seed):
    scene = Scene(seed=seed)
    wrong = torch.rand(scene.active.shape, generator=torch.Generator().manual_seed(seed)) < share
    good, mask = deflation._settled(scene.h, scene.active ^ wrong, scene.low.L, Tolerances())
    assert len(good) > 0.7 * KNOWN
    assert torch.equal(mask, scene.active[good])


def test_a_direction_that_is_none_has_no_mask_below():
    scene = Scene()
    mixed = Solved(scene.solved.t.roll(1, 0), scene.solved.d, scene.solved.mask.roll(1, 0))
    h = deflation.vectors_below(scene.made.problem, scene.spaces, mixed)
    index, _ = deflation.masks_below(scene.spaces, mixed, h, torch.zeros_like(scene.active), scene.low.L, Tolerances())
    assert not len(index)


@pytest.mark.parametrize("known", [1, KNOWN, BATCH])
@pytest.mark.parametrize("seed", range(3))
def test_few_inputs_determine_a_sample(known, seed):
    scene = Scene(FEW, seed, known)
    sure, s = deflation.coordinates_by_inputs(
        scene.spaces, scene.solved, scene.image, torch.arange(known), Tolerances()
    )
    assert sure.all()
    assert torch.allclose(scene.activations(s), scene.run.inputs[1][:known], atol=1e-7)


def test_inputs_as_many_as_samples_determine_none():
    scene = Scene(MANY)
    sure, s = deflation.coordinates_by_inputs(
        scene.spaces, scene.solved, scene.image, torch.arange(KNOWN), Tolerances()
    )
    assert not sure.any()
    assert torch.equal(s, dual(scene.spaces, scene.solved))


def test_what_is_no_sample_is_not_determined_by_few_inputs():
    scene = Scene(FEW)
    t = torch.nn.functional.normalize(scene.solved.t + 0.3 * scene.solved.t.roll(1, 0))
    sure, _ = deflation.coordinates_by_inputs(
        scene.spaces, Solved(t, scene.solved.d, scene.solved.mask), scene.image, torch.arange(KNOWN), Tolerances()
    )
    assert not sure.any()


def test_a_clock_that_has_run_out_determines_nothing():
    scene = Scene(FEW)
    sure, _ = deflation.coordinates_by_inputs(
        scene.spaces, scene.solved, scene.image, torch.arange(KNOWN), Tolerances(), until=0.0
    )
    assert not sure.any()


@pytest.mark.parametrize("n", [3, 30])
@pytest.mark.parametrize("seed", range(3))
def test_zeroed_is_least_squares_on_each_set_of_rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(100, n, generator=generator, dtype=torch.float64))[0]
    rows, wanted = torch.rand(5, 100, generator=generator) < 0.5, torch.randn(5, 100, generator=generator).double()
    a, resolved = deflation.zeroed(frame, rows, wanted)
    assert resolved.all()
    for k in range(5):
        expected = torch.linalg.lstsq(frame[rows[k]], wanted[k, rows[k], None]).solution[:, 0]
        torch.testing.assert_close(a[k], expected)


def test_rows_that_leave_a_column_out_resolve_nothing():
    frame = torch.eye(40, 8, dtype=torch.float64)
    rows = torch.ones(2, 40, dtype=torch.bool)
    rows[1, 3] = False
    assert deflation.zeroed(frame, rows, torch.ones(2, 40, dtype=torch.float64))[1].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients_solve_many_systems_side_by_side(dtype):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(4, 30, 12, generator=generator, dtype=torch.float64).to(dtype)
    A, b = parts.mT @ parts, torch.randn(4, 12, generator=generator, dtype=torch.float64).to(dtype)
    x, left = conjugate_gradients(lambda v: (A @ v[:, :, None])[:, :, 0], b, 60)
    loose = 1e-2 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=loose, atol=loose)
    assert left.max() < 1e-5


@pytest.mark.parametrize("inputs", [100, 30])
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_of_most_of_the_width_comes_back_whole(inputs, seed):
    """At 0.6 of the width, with more inputs than samples and with fewer."""
    made = case((inputs, 100, 100, 10), 60, seed=seed)
    found = distinct_samples(made.problem, Terms(Budget(60.0), seed))
    assert errors(found.inputs, made.inputs).max() < 1e-6
    assert found.certified.all()


@pytest.mark.parametrize("inputs", [MANY, FEW])
@pytest.mark.parametrize("seed", range(3))
def test_directions_are_sharp_whatever_those_were_off_by_that_left(inputs, seed):
    scene = Scene(inputs, seed)
    run = PhaseSearch(scene.made.problem, scene.spaces, 0.0, torch.Generator().manual_seed(seed))
    while run.left:
        run.round()
    assert len(run.gone)
    noise = 1e-6 * torch.randn(run.gone.t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    run.gone = Solved(unit_rows(run.gone.t + noise), run.gone.d, run.gone.mask)
    every = directions_of(scene.spaces, scene.run.deltas[1], scene.run.deltas[2])
    off, own = ((found.t @ every.t.T).abs().amax(1) for found in (run.found, run.sharp))
    assert off.min() < 1 - 1e-13
    assert own.min() > 1 - 1e-13
    assert torch.equal((run.sharp.t @ every.t.T).abs().argmax(1).sort()[0], torch.arange(BATCH))


@pytest.mark.parametrize("known", [1, 10])
@pytest.mark.parametrize("seed", range(3))
def test_a_known_mask_with_few_zeros_determines_its_sample_by_the_inputs_too(known, seed):
    """A third of the width, three units of four active: fewer zeros than samples are missing."""
    made = case((MANY, WIDTH, WIDTH, 10), 36, seed=seed, lifted=0.7)
    low, below = (decompose(made.problem.augmented(k)) for k in (1, 0))
    spaces = open_spaces(made.problem, low.L, low.R)
    counts = torch.nn.functional.one_hot(made.labels, 10).double()
    run = passes(made.problem, made.inputs, Targets(counts, 1 / 36, 0.0))
    solved, index = directions_of(spaces, *run.deltas[1:])[torch.arange(known)], torch.arange(known)
    image = torch.linalg.qr(made.problem.lift(0, below.R / below.R.norm(dim=1, keepdim=True)))[0]
    mask = run.inputs[1][:known] > 0
    few = (~mask).sum(1) < 36 - known
    assert few.all()
    alone, _ = deflation.activation_coordinates(spaces, solved, spaces.rows[:, :-1], index, mask, Tolerances())
    assert not alone[few].any()
    sure, s = deflation.coordinates_by_inputs(spaces, solved, image, index, Tolerances(), mask=mask)
    assert sure.all()
    rows = s @ spaces.rows
    assert torch.allclose(rows[:, :-1] / rows[:, -1:], run.inputs[1][:known], atol=1e-7)
    wrong, _ = deflation.coordinates_by_inputs(
        spaces, solved, image, index, Tolerances(), mask=mask ^ (mask.cumsum(1) == 3)
    )
    assert not wrong.any()
