import time
from dataclasses import replace

import pytest
import torch
from network_problems import case

from spear.directions import quick, unit_rows
from spear.network import exact_step, last_samples, phase_retrieval
from spear.network.exact_step import Tolerances
from spear.network.phase_retrieval import Iterate, Reflections
from spear.network.problem import Targets, passes
from spear.network.spaces import Foretold, Solved, complement, misfit, project
from spear.network.whole_batch import open_spaces
from spear.published.lowrank import decompose


def opened(sizes=(60, 120, 120, 10), batch=20, seed=0):
    """Spaces of the last hidden layer; true back-propagated vectors, dLoss/dlogits, and activations below."""
    made = case(sizes, batch, seed=seed)
    low = decompose(made.problem.augmented(made.problem.last))
    spaces = open_spaces(made.problem, low.L, low.R)
    counts = torch.nn.functional.one_hot(made.labels, made.problem.classes).double()
    run = passes(made.problem, made.inputs, Targets(counts, 1 / batch, 0.0))
    return spaces, run.deltas[-2], run.deltas[-1], run.inputs[-2]


def solved(spaces, deltas, errors) -> Solved:
    t = deltas @ spaces.basis
    norm = t.norm(dim=1, keepdim=True)
    return Solved(t / norm, errors / norm, deltas != 0)


def starts(spaces, deltas, errors, count=12):
    generator = torch.Generator().manual_seed(0)
    h = unit_rows(errors[:count] @ spaces.head).float()
    v = torch.randn(count, len(spaces.lift), generator=generator)
    return Iterate(h * (v > 0), h, unit_rows(v), h)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_exact_step_solves_a_true_mask(classes, seed):
    spaces, deltas, errors, _ = opened((60, 120, 120, classes), seed=seed)
    exact = exact_step.solve_mask(spaces, deltas != 0)
    true = solved(spaces, deltas, errors)
    assert exact.settled.all()
    assert exact.sine.max() < 1e-6
    assert exact.second.min() > 1e-2
    side = (exact.t * true.t).sum(1, keepdim=True).sign()  # two classes: d = (1, -1), so the label has no sign
    assert (side == 1).all() or classes == 2
    assert torch.allclose(exact.t, side * true.t, atol=1e-9)
    assert torch.allclose(exact.d, side * true.d, atol=1e-9)


def test_exact_step_equals_the_textbook_eigenproblem():
    spaces, _, _, _ = opened()
    mask = torch.rand(4, 120, generator=torch.Generator().manual_seed(0)) < 0.5
    got = exact_step.solve_mask(spaces, mask, rounds=1)
    for k in range(4):
        e = torch.linalg.qr(mask[k, :, None] * spaces.head_space)[0]
        cosines = torch.linalg.svdvals(spaces.basis.T @ e)
        assert torch.allclose((1 - cosines[:2] ** 2).sqrt(), torch.stack([got.sine[k], got.second[k]]), atol=1e-7)


def test_exact_step_repairs_a_few_wrong_entries():
    spaces, deltas, errors, _ = opened()
    mask = deltas != 0
    mask[:, :3] = ~mask[:, :3]
    exact = exact_step.solve_mask(spaces, mask, rounds=8)
    assert exact.settled.all()
    assert torch.allclose(exact.t, solved(spaces, deltas, errors).t, atol=1e-9)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("partnered", [False, True])
def test_batched_search_equals_single_starts(moving, partnered):
    spaces, deltas, errors, _ = opened()
    basis = spaces.basis.float()
    head = torch.linalg.qr(spaces.head_space)[0].float() if moving else None
    partner = torch.linalg.qr(spaces.lift)[0].float() if partnered else None
    begin = starts(spaces, deltas, errors)
    whole = phase_retrieval.retrieve_phases(begin, basis, Reflections(20, head=head, partner=partner))
    for k in range(3):
        single = phase_retrieval.retrieve_phases(
            begin[torch.tensor([k])], basis, Reflections(20, head=head, partner=partner)
        )
        assert torch.allclose(single.u[0], whole.u[k], atol=1e-3)


def test_a_search_stops_when_its_time_is_up():
    spaces, deltas, errors, _ = opened()
    begin = starts(spaces, deltas, errors)
    stopped = phase_retrieval.retrieve_phases(begin, spaces.basis.float(), Reflections(10**9, until=time.monotonic()))
    assert torch.allclose(stopped.u, begin.u)
    assert torch.allclose(stopped.target, begin.target)


@pytest.mark.parametrize("partnered", [False, True])
def test_a_step_equals_the_textbook_choice_between_0_and_h(partnered):
    spaces, deltas, errors, _ = opened()
    partner = torch.linalg.qr(spaces.lift)[0] if partnered else None
    begin = starts(spaces, deltas, errors).to(torch.float64)
    after = phase_retrieval.retrieve_phases(begin, spaces.basis, Reflections(1, partner=partner))
    u, h, v = begin.u, begin.h, begin.v
    inside = u @ spaces.basis @ spaces.basis.T
    evidence = (2 * (2 * inside - u) - h) * h
    if partnered:
        turned = 2 * v @ partner @ partner.T - v
        evidence += turned * turned.abs()
        v = v + (torch.where((evidence > 0) == (turned > 0), turned, 0.0) - v @ partner @ partner.T) / 2
    target = torch.where(evidence > 0, h, 0.0)
    assert torch.equal(after.target, target)
    assert torch.allclose(after.u, u + (target - inside) / 2, atol=1e-14)
    assert torch.allclose(after.v, unit_rows(v) if partnered else v, atol=1e-14)


def test_starts_that_arrived_end_and_the_others_go_on():
    spaces, deltas, errors, _ = opened(batch=40)
    begin = starts(spaces, deltas, errors, count=40).to(torch.float64)
    free = phase_retrieval.retrieve_phases(begin, spaces.basis, Reflections(30))
    ended = phase_retrieval.retrieve_phases(begin, spaces.basis, Reflections(30, near=0.03))
    fit = misfit(ended.target, spaces.basis)
    arrived, vanished = fit < 0.03, fit == 1
    on = torch.isclose(ended.u, free.u, atol=1e-9).all(1)
    assert 0 < arrived.sum() < 40
    assert (arrived | vanished | on).all()
    assert not on.all()
    assert torch.equal(ended.h, begin.h)


def test_a_large_basis_in_bfloat16_projects_to_its_rounding():
    basis = torch.linalg.qr(torch.randn(500, 250, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    exact = x @ basis @ basis.T
    assert quick(basis.double()).dtype == torch.float64
    assert quick(basis[:100]).dtype == torch.float32
    for form in (quick(basis), basis.bfloat16()):
        assert ((project(x, form) - exact).norm(dim=1) < 0.01 * exact.norm(dim=1)).all()
        off = misfit(x / x.norm(dim=1, keepdim=True), form) - 1 + exact.pow(2).sum(1) / x.pow(2).sum(1)
        assert off.abs().max() < 0.01


def test_masks_that_settled_are_left_alone_while_others_are_renewed():
    spaces, deltas, _, _ = opened()
    mask = deltas != 0
    mask[::2, :3] = ~mask[::2, :3]
    together = exact_step.solve_mask(spaces, mask)
    for k in range(len(mask)):
        alone = exact_step.solve_mask(spaces, mask[k : k + 1])
        for name in ("t", "d", "sine", "second", "lever"):
            assert torch.allclose(getattr(together, name)[k], getattr(alone, name)[0], atol=1e-9)
        assert torch.equal(together.mask[k], alone.mask[0])
        assert together.settled[k] == alone.settled[0]


@pytest.mark.parametrize("moving", [False, True])
def test_truth_is_a_fixed_point(moving):
    spaces, deltas, errors, _ = opened()
    h = errors @ spaces.head
    scale = h.norm(dim=1, keepdim=True)
    truth = Iterate(deltas / scale, h / scale, h / scale, deltas / scale)
    head = torch.linalg.qr(spaces.head_space)[0] if moving else None
    after = phase_retrieval.retrieve_phases(truth, spaces.basis, Reflections(5, head=head))
    assert torch.allclose(after.u, truth.u, atol=1e-12)
    assert misfit(after.target, spaces.basis).max() < 1e-12


def test_complement_holds_the_unsolved_samples():
    spaces, deltas, errors, y = opened()
    free = complement(spaces, solved(spaces, deltas, errors)[torch.arange(15)])
    assert free.shape == (20, 5)
    s = torch.cat([y, torch.ones(20, 1, dtype=y.dtype)], 1) @ spaces.rows.T
    inside = (s @ free).norm(dim=1) / s.norm(dim=1)
    assert torch.allclose(inside[15:], torch.ones(5, dtype=y.dtype))
    assert (inside[:15] < 1 - 1e-6).all()


def test_linear_programmes_find_the_last_few():
    spaces, deltas, errors, _ = opened()
    true = solved(spaces, deltas, errors)
    free = complement(spaces, true[torch.arange(17)])
    generator = torch.Generator().manual_seed(0)
    found = last_samples.vertices(spaces, spaces.rows[:, :-1], free, Tolerances(), tries=20, generator=generator)
    assert len(found) == 3
    assert ((found.t @ true.t[17:].T).abs().amax(1) > 1 - 1e-9).all()


def test_the_last_one_is_read_off():
    spaces, deltas, errors, _ = opened()
    true = solved(spaces, deltas, errors)
    found = last_samples.last_one(spaces, complement(spaces, true[torch.arange(19)]), Tolerances())
    assert torch.allclose(found.t, true.t[19:], atol=1e-9)
    assert torch.equal(found.labels, true.labels[19:])


def test_join_keeps_one_of_each_direction():
    spaces, deltas, errors, _ = opened()
    true = solved(spaces, deltas, errors)
    flipped = Solved(-true.t, -true.d, true.mask)
    first = Solved.none(spaces).join(true[torch.tensor([0, 1, 1, 0])], room=20)
    assert len(first) == 2
    assert len(first.join(flipped[torch.tensor([1, 2])], room=20)) == 3
    assert len(first.join(true, room=5)) == 7


def test_distinct_masks_by_increasing_misfit():
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 1], [0, 0, 1]]).bool()
    assert exact_step.different_masks(mask, torch.tensor([3.0, 2.0, 1.0, 0.5])).tolist() == [3, 2, 1]


def test_foretold_samples_are_the_textbook_normal_of_the_unsolved_ones():
    spaces, deltas, errors, _ = opened()
    free = complement(spaces, solved(spaces, deltas, errors)[torch.arange(8)])
    covariance = free @ torch.linalg.inv(free.T @ torch.diag(spaces.singular**-2) @ free) @ free.T
    ones = spaces.rows[:, -1]
    gain = covariance @ ones / (ones @ covariance @ ones)
    known = (covariance - torch.outer(gain, covariance @ ones)) / (ones @ covariance @ ones)
    foretold = Foretold.of(spaces, free, biased=True)
    size = ones @ foretold.coordinates @ foretold.mean
    mean, beside = foretold.mean, torch.eye(12, dtype=torch.float64) - torch.outer(foretold.mean, foretold.mean)
    assert torch.allclose(foretold.coordinates @ mean / size, gain, atol=1e-9)
    assert torch.allclose(foretold.coordinates @ beside @ foretold.coordinates.T / size**2, known, atol=1e-9)
    drawn = foretold.draw(20000, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn @ ones, size.expand(20000))
    assert (drawn.mean(0) / size - gain).norm() < 0.1 * known.diagonal().sum().sqrt()
    assert (drawn.T.cov() / size**2 - known).norm() < 0.1 * known.norm()


@pytest.mark.parametrize("seed", range(3))
def test_foretold_samples_resemble_the_true_ones_and_do_not_know_the_gradients_scale_or_basis(seed):
    spaces, deltas, _, _ = opened(batch=60, seed=seed)
    free = torch.eye(spaces.rank, dtype=torch.float64)
    foretold = Foretold.of(spaces, free, biased=True)
    mean = foretold.coordinates @ foretold.mean
    assert ((spaces.lift @ mean > 0) == (deltas != 0)).double().mean() > 0.6
    turned = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    for other, basis in ((spaces, turned), (replace(spaces, singular=7 * spaces.singular), free)):
        same = Foretold.of(other, basis, biased=True)
        assert torch.allclose(unit_rows((same.coordinates @ same.mean)[None])[0], mean / mean.norm(), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_what_the_others_say_of_an_entry_is_the_fit_without_it(seed):
    spaces, deltas, _, _ = opened(batch=60, seed=seed)
    wanted = deltas[:4] + 0.1 * deltas.abs().max() * torch.randn(4, 120, dtype=torch.float64)
    got = spaces.without_itself(project(wanted, spaces.basis), wanted)
    for j in (0, 50, 119):
        others = torch.arange(120) != j
        t = torch.linalg.lstsq(spaces.basis[others], wanted[:, others].T).solution
        assert torch.allclose(got[:, j], spaces.basis[j] @ t, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_in_a_crowded_span_wrong_entries_are_seen_by_the_others(seed):
    spaces, deltas, *_ = opened((60, 160, 160, 10), batch=80, seed=seed)
    mask = deltas != 0
    unit = torch.randint(160, (80, 1), generator=torch.Generator().manual_seed(seed))
    wrong = torch.zeros_like(mask).scatter(1, unit, True)
    exact = exact_step.solve_mask(spaces, mask ^ wrong)
    assert (exact.mask == mask).all(1).double().mean() > 0.85
