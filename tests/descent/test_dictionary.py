"""Sparse vectors in a subspace: the learners, against slow textbook versions, and the collection of all columns."""

from functools import partial

import pytest
import torch
from problems import make

from spear.descent import columns, dictionary
from spear.directions import unit_rows
from spear.published.greedy import disaggregate
from spear.reconstruction import Budget, Terms

SEEDS = range(5)
LEARNERS = [
    dictionary.soft_threshold,
    dictionary.subgradient,
    partial(dictionary.reweighted, steps=40),
]


def planted(m, b, seed, share=0.3):
    """An orthonormal basis of a subspace that holds b sparse, nearly orthogonal vectors, and their coordinates."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(m, b, dtype=torch.float64, generator=generator)
    G = G * (torch.rand(m, b, generator=generator) < share)
    rotation = torch.linalg.qr(torch.randn(b, b, dtype=torch.float64, generator=generator))[0]
    L, triangle = torch.linalg.qr(G @ rotation)
    q = unit_rows((triangle @ rotation.mT).mT)  # G = L (triangle rotation^T)
    starts = L[L.norm(dim=1) > 1e-9][:40]  # rows in which no vector is active are zero
    return L, q, unit_rows(starts)


@pytest.mark.parametrize("learner", LEARNERS, ids=["soft", "subgradient", "reweighted"])
@pytest.mark.parametrize("seed", SEEDS)
def test_learners_find_planted_vectors(learner, seed):
    L, q, starts = planted(400, 10, seed)
    found = learner(L, starts)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(40, dtype=torch.float64))
    assert ((found @ q.mT).abs().amax(1) > 0.98).double().mean() > 0.8


@pytest.mark.parametrize("seed", SEEDS)
def test_l4_finds_all_planted_vectors_at_once(seed):
    L, q, starts = planted(2000, 8, seed, share=0.15)
    A = dictionary.l4_maximise(L, starts[:3])
    torch.testing.assert_close(A @ A.mT, torch.eye(8, dtype=torch.float64))
    assert ((A @ q.mT).abs().amax(0) > 0.97).all()


@pytest.mark.parametrize("learner", LEARNERS, ids=["soft", "subgradient", "reweighted"])
def test_all_starts_at_once_are_each_start_alone(learner):
    L, _, starts = planted(300, 8, 0)
    short = partial(learner, steps=12)
    if learner is dictionary.subgradient:
        short = partial(short, spread=1.0)
    alone = torch.cat([short(L, q[None]) for q in starts])
    torch.testing.assert_close(short(L, starts), alone, rtol=0, atol=1e-9)


def test_soft_threshold_is_the_textbook_iteration():
    L, _, starts = planted(200, 6, 1)
    fast = dictionary.soft_threshold(L, starts[:4], steps=3, first=0.6, last=0.6)
    for q, expected in zip(starts[:4], fast, strict=True):
        for _ in range(3):
            r = [float(row @ q) for row in L]
            s = [(abs(x) - 0.6 / 200**0.5) * (1 if x > 0 else -1) if abs(x) > 0.6 / 200**0.5 else 0.0 for x in r]
            q = sum(x * row for x, row in zip(s, L, strict=True))
            q = q / q.norm()
        torch.testing.assert_close(q, expected)


def test_subgradient_steps_descend_on_the_sphere():
    L, _, starts = planted(200, 6, 2)
    before, after = starts, dictionary.subgradient(L, starts, steps=200)
    assert ((after @ L.mT).abs().sum(1) < (before @ L.mT).abs().sum(1) + 1e-9).all()


def test_reweighted_is_an_inverse_iteration():
    L, _, starts = planted(200, 6, 3)
    q = starts[0]
    weight = 1 / ((1 / 200**0.5) ** 2 + (L @ q) ** 2).sqrt()
    once = torch.linalg.solve(L.mT @ torch.diag(weight) @ L, q)
    torch.testing.assert_close(dictionary.reweighted(L, q[None], steps=1)[0], once / once.norm())


@pytest.mark.parametrize(("b", "m"), [(1, 20), (2, 40), (6, 120), (16, 240)])
@pytest.mark.parametrize("seed", SEEDS)
def test_all_columns(b, m, seed):
    problem = make(b, m, 60, seed=seed)
    found = dictionary.find_columns(problem.observed, Terms(seed=seed))
    assert found.matching == 1, found.spent
    _, X = disaggregate(problem.observed, found.q[found.basis])
    order = torch.cdist(problem.inputs, X.mT).argmin(1)
    torch.testing.assert_close(X.mT[order], problem.inputs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("learner", [*LEARNERS, dictionary.l4_maximise], ids=["soft", "subgradient", "irls", "l4"])
def test_any_learner_may_collect(learner):
    problem = make(4, 200, 60)
    lengths = columns.Lengths(shortest=100, longest=100)
    terms = Terms(Budget(proposals=2000))
    found = dictionary.find_columns(problem.observed, terms, learner=learner, lengths=lengths)
    assert len(found.basis) >= 2
