"""Starts of phase retrieval: classes by what the output bias discloses, vectors from the spaces of the unsolved."""

import pytest
import torch
from network_problems import case
from test_phase_retrieval import opened

from spear.directions import unit_rows
from spear.network.problem import forward
from spear.network.spaces import Foretold, Solved
from spear.network.starts import Starts, label_counts, mean_probabilities, prior_outputs, saturated


def start(made, seed=0) -> Starts:
    return Starts(made.problem, torch.Generator().manual_seed(seed), prior_outputs(made.problem))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_label_counts_with_the_true_mean_output_are_the_batchs(seed, reduction):
    made = case(seed=seed, reduction=reduction)
    p = made.problem.activate(forward(made.problem, made.inputs)[1]).mean(0)
    counts = label_counts(made.problem, p, 20)
    assert torch.allclose(counts, torch.bincount(made.labels, minlength=10).double(), atol=1e-9)
    near = label_counts(made.problem, prior_outputs(made.problem), 20)
    assert (near - counts).abs().max() < 1.5


def test_mean_probabilities_are_the_solved_samples():
    made = case()
    p = made.problem.activate(forward(made.problem, made.inputs)[1])
    d = p - made.problem.one_hot(made.labels)
    solved = Solved(d, d, d > 0)
    prior = p[torch.arange(20), made.labels].mean().expand(10)
    assert torch.allclose(mean_probabilities(solved, prior), p.mean(0), atol=0.02)


@pytest.mark.parametrize("spread", [False, True])
def test_starts_lie_in_their_spaces(spread):
    made = case()
    spaces, *_ = opened()
    free = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    labels = torch.arange(30) % 10
    s = Foretold.of(spaces, free, biased=True).draw(30, torch.Generator().manual_seed(2))
    drawn = start(made).draw(spaces, s, labels, spread=spread)
    ones = torch.ones(30)
    assert torch.allclose(drawn.h.norm(dim=1), ones)
    assert torch.allclose(drawn.v.norm(dim=1), ones)
    assert torch.allclose(drawn.v, unit_rows(s @ spaces.lift.T).float(), atol=1e-5)
    assert torch.equal(drawn.u, drawn.h * (drawn.v > 0))
    same = (drawn.h[:10] - drawn.h[10:20]).norm(dim=1) < 1e-6
    assert same.all() != spread
    assert (s @ spaces.rows[:, -1] > 0).all()  # the last entry of [y; 1]


def test_labels_follow_what_is_missing_and_take_turns_near_the_end():
    made = case(labels=torch.arange(20) % 2, inputs=torch.randn(20, 60, dtype=torch.float64))
    drawn = start(made).labels(2000, made.labels[made.labels == 0], left=17, rank=20)
    counts = torch.bincount(drawn, minlength=10)
    assert counts[1] > 5 * counts[0]
    assert start(made).labels(25, made.labels, left=16, rank=20).tolist() == [k % 10 for k in range(25)]


@pytest.mark.parametrize("seed", range(3))
def test_starts_of_a_saturated_softmax_are_differences_of_two_classes(seed):
    spaces, *_ = opened()
    d = torch.zeros(12, 10, dtype=torch.float64)
    d[:, 3], d[:6, 7], d[6:, 1] = -1, 1, 1
    d[11] = torch.arange(10) - 4.5  # knows more than two: no pair to learn from
    assert saturated(d).tolist() == 11 * [True] + [False]
    s = torch.randn(400, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = start(case(), seed).saturated(spaces, s, d)
    pairs = torch.combinations(torch.arange(10))
    wanted = unit_rows(spaces.head[pairs[:, 0]] - spaces.head[pairs[:, 1]]).float()
    cosine = (drawn.h @ wanted.T).abs()
    assert torch.allclose(cosine.amax(1), torch.ones(400), atol=1e-5)
    often = torch.bincount(cosine.argmax(1), minlength=45)
    shown = (pairs == torch.tensor([3, 7])).all(1) | (pairs == torch.tensor([1, 3])).all(1)
    assert often[shown].sum() > 200
    assert (often[~shown] > 0).sum() > 10
    assert torch.equal(drawn.u, drawn.h * (drawn.v > 0))
