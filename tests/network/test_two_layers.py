"""Phase retrieval at two layers at once: its spaces hold the truth, its steps are the textbook's, and it finds more."""

import time

import pytest
import torch
from network_problems import case

from spear.directions import unit_rows
from spear.network import phase_retrieval
from spear.network.phase_retrieval import Iterate, Reflections
from spear.network.problem import Targets, passes
from spear.network.spaces import Foretold
from spear.network.two_layers import BELOW, RELAXATION, FewInputs, Pair, TwoLayers
from spear.network.whole_batch import distinct_samples, open_spaces
from spear.published.lowrank import decompose
from spear.reconstruction import Terms


class Scene:
    """A case, its spaces, and the true vectors of its samples."""

    def __init__(self, sizes=(60, 120, 120, 10), batch=40, seed=0):
        made = case(sizes, batch, seed=seed)
        low = decompose(made.problem.augmented(1))
        self.spaces, self.below = open_spaces(made.problem, low.L, low.R), decompose(made.problem.augmented(0)).L
        counts = torch.nn.functional.one_hot(made.labels, 10).double()
        self.problem, self.run = made.problem, passes(made.problem, made.inputs, Targets(counts, 1 / batch, 0.0))
        self.s = self.run.inputs[1] @ self.spaces.rows[:, :-1].T + self.spaces.rows[:, -1]
        self.weight, self.free = made.problem.weights[1], torch.eye(batch, dtype=torch.float64)
        self.layers = TwoLayers.of(self.spaces, self.weight, self.below, self.free)

    def truth(self) -> Pair:
        """The samples' own vectors, scaled as the layers are."""
        h = self.run.deltas[2] @ self.spaces.head
        size = h.norm(dim=1, keepdim=True)
        u = self.run.deltas[1] / size
        h_below = u @ self.layers.weight.double()
        g = h_below * (self.run.inputs[1] > 0)
        samples = unit_rows(self.s @ self.layers.lift.double().T)
        return Pair(torch.cat([u, h_below], 1), g, samples, h / size, u, g).to(torch.float32)

    def starts(self, count, seed=0) -> tuple[Iterate, torch.Tensor]:
        """Starts with true h and foretold samples."""
        s = Foretold.of(self.spaces, self.free, biased=True).draw(count, torch.Generator().manual_seed(seed))
        h = self.truth().h[torch.arange(count) % len(self.free)]
        v = unit_rows(s @ self.spaces.lift.T).float()
        return Iterate(h * (v > 0), h, v, h), s


@pytest.mark.parametrize("seed", range(3))
def test_the_truth_lies_in_the_spaces_and_is_a_fixed_point(seed):
    scene = Scene(seed=seed)
    true, layers = scene.truth(), scene.layers
    for x, basis in ((true.vectors, layers.vectors), (true.below, layers.below), (true.samples, layers.samples)):
        assert torch.allclose(x @ basis @ basis.T, x, atol=1e-5)
    assert layers.misfit(true).max() < 1e-5
    after = layers.forward(true, 5)
    for name in ("vectors", "below", "samples", "target", "target_below"):
        assert torch.allclose(getattr(after, name), getattr(true, name), atol=1e-4)


def test_a_step_is_the_textbook_reflection_between_spaces_and_masks():
    scene = Scene()
    start, s = scene.starts(8)
    before = scene.layers.search(start, s, Reflections(0))
    after = scene.layers.forward(before, 1)
    near = [
        x @ basis @ basis.T
        for x, basis in zip(
            (before.vectors, before.below, before.samples),
            (scene.layers.vectors, scene.layers.below, scene.layers.samples),
            strict=True,
        )
    ]
    (u, h_below), g, (z, y) = (
        (2 * near[0] - before.vectors).split(120, 1),
        2 * near[1] - before.below,
        (2 * near[2] - before.samples).split(120, 1),
    )
    h = before.h
    active = u**2 - (u - h) ** 2 + z * z.abs() > 0
    middle = (g + h_below) / 2
    active_below = BELOW * (g**2 - (g - middle) ** 2 - (h_below - middle) ** 2) + y * y.abs() > 0
    target, target_below = torch.where(active, h, 0.0), torch.where(active_below, middle, 0.0)
    kept_vectors = torch.cat([target, torch.where(active_below, middle, h_below)], 1)
    kept_samples = torch.cat(
        [torch.where(active == (z > 0), z, 0.0), torch.where(active_below, y.clamp_min(0), 0.0)], 1
    )
    assert torch.allclose(after.target, target, atol=1e-6)
    assert torch.allclose(after.target_below, target_below, atol=1e-6)
    assert torch.allclose(after.vectors, before.vectors + RELAXATION * (kept_vectors - near[0]), atol=1e-5)
    assert torch.allclose(after.below, before.below + RELAXATION * (target_below - near[1]), atol=1e-5)
    moved = before.samples + RELAXATION * (kept_samples - near[2])
    assert torch.allclose(after.samples, unit_rows(moved), atol=1e-5)


def test_a_batch_of_starts_is_each_alone():
    scene = Scene()
    start, s = scene.starts(6)
    whole = scene.layers.search(start, s, Reflections(15, near=1e-3))
    for k in range(6):
        one = torch.tensor([k])
        alone = scene.layers.search(start[one], s[one], Reflections(15, near=1e-3))
        assert torch.allclose(alone.vectors[0], whole.vectors[k], atol=1e-3)


def test_a_search_stops_when_its_time_is_up():
    scene = Scene()
    start, s = scene.starts(6)
    stopped = scene.layers.search(start, s, Reflections(10**9, until=time.monotonic()))
    assert torch.equal(stopped.target, start.u)


def test_in_a_crowd_more_starts_arrive_than_by_one_layer():
    """Over five batches, of which one or another is easy for both."""
    counts = []
    for seed in range(5):
        scene = Scene((200, 200, 200, 10), 110, seed)
        start, s = scene.starts(64)
        pair = scene.layers.search(start, s, Reflections(150, near=3e-3)).target
        alone = phase_retrieval.retrieve_phases(start, scene.spaces.basis.float(), Reflections(400)).target
        true = unit_rows(scene.truth().target)
        counts.append([int(((unit_rows(end) @ true.T).amax(1) > 0.98).sum()) for end in (pair, alone)])
    arrived, few = zip(*counts, strict=True)
    assert sum(arrived) > 3 * sum(few)
    assert min(arrived) > 10


def few_inputs(seed: int) -> tuple[Scene, FewInputs, Pair]:
    """A batch of more samples than inputs: its spaces, and the samples' own vectors."""
    scene = Scene((30, 120, 120, 10), 70, seed)
    below = scene.problem.affine(0) @ torch.linalg.qr(scene.problem.augmented(0).T)[0][:, :31]
    layers = FewInputs.of(scene.spaces, below, scene.free)
    true = scene.truth()
    samples = unit_rows(scene.s @ layers.lift.double().T)
    scale = samples[:, 120:].norm(dim=1, keepdim=True) / scene.run.inputs[1].norm(dim=1, keepdim=True)
    z_below = (scene.run.z[0] * scale).float()
    return scene, layers, Pair(true.target, z_below, samples.float(), true.h, true.target, z_below.clamp_min(0))


@pytest.mark.parametrize("seed", range(3))
def test_with_few_inputs_the_truth_lies_in_the_spaces_and_is_a_fixed_point(seed):
    _, layers, true = few_inputs(seed)
    for x, basis in ((true.vectors, layers.basis), (true.below, layers.below), (true.samples, layers.samples)):
        assert torch.allclose(x @ basis @ basis.T, x, atol=1e-5)
    after = layers.forward(true, 5)
    for name in ("vectors", "below", "samples", "target", "target_below"):
        assert torch.allclose(getattr(after, name), getattr(true, name), atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_with_few_inputs_more_starts_arrive_than_by_one_layer(seed):
    scene, layers, true = few_inputs(seed)
    start, s = scene.starts(70)
    both = layers.search(start, s, Reflections(150, near=3e-3)).target
    alone = phase_retrieval.retrieve_phases(start, scene.spaces.basis.float(), Reflections(400)).target
    arrived, few = (int(((unit_rows(end) @ unit_rows(true.target).T).amax(1) > 0.98).sum()) for end in (both, alone))
    assert arrived > 2 * few
    assert arrived > 10


@pytest.mark.parametrize("inputs", [40, 150])
def test_a_batch_of_half_the_width_comes_back_whole_with_fewer_inputs_and_with_more(inputs):
    made = case((inputs, 200, 200, 10), 100)
    result = distinct_samples(made.problem, Terms())
    assert result.certified.all()
    assert len(result.inputs) == 100
