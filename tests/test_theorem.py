"""The theorem of `spear.certificate`: its condition, its bound, and every reason for which a certificate is refused."""

from dataclasses import replace

import pytest
import torch
from network_problems import case, errors

from spear.certificate import (
    Certificate,
    column_errors,
    input_errors,
    inverse_columns,
    length_slack,
    norms,
    rms,
    spread_of_family,
    spread_of_zeros,
)
from spear.network import whole_batch
from spear.network.error_bounds import (
    Held,
    entry_noise,
    family,
    input_bounds,
    joint_spreads,
    largest_singular,
    most_back,
    spreads,
)
from spear.network.problem import Targets, passes
from spear.network.rest import rest_of
from spear.reconstruction import Budget, Terms

DTYPE = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def columns(seed: int, b: int = 5, m: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """G (b, m) with masks, an orthonormal basis of its span, and the inactive units of each sample."""
    inactive = torch.rand(b, m, generator=generator(seed)) < 0.5
    G = torch.randn(b, m, generator=generator(seed + 1), dtype=DTYPE) * ~inactive
    return G, torch.linalg.qr(G.mT)[0], inactive


@pytest.mark.parametrize("seed", range(5))
def test_the_family_of_the_active_units_is_that_of_the_zeros(seed):
    """The same angles, but for right ones: as many as the other space is larger."""
    G, basis, inactive = columns(seed)
    zeros = spread_of_zeros(basis, G, inactive)
    for own, zero, spread in zip(G, inactive, zeros, strict=True):
        rows = torch.eye(len(zero), dtype=DTYPE)[~zero]
        active = spread_of_family(basis, own[None], rows[None])
        torch.testing.assert_close(spread**2 - len(G), active[0] ** 2 - len(rows))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("at_once", [1, 200, 2**21])
def test_the_spread_sums_over_the_angles_of_the_two_spaces(at_once, seed, monkeypatch):
    """By the textbook: singular values of the product of two orthonormal bases are the cosines."""
    monkeypatch.setattr("spear.certificate.AT_ONCE", at_once)
    G, basis, inactive = columns(seed)
    for i, spread in enumerate(spread_of_zeros(basis, G, inactive)):
        cosines = torch.linalg.svdvals(basis[~inactive[i]])
        sines = (1 - cosines.square()).sort().values[1:]  # the first is the column itself
        torch.testing.assert_close(spread, (1 + (1 / sines).sum()).sqrt())
    assert spread_of_zeros(basis, G[:0], inactive[:0]).shape == (0,)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("m", [7, 9, 12, 40])
def test_the_spread_is_infinite_exactly_where_the_inactive_rows_do_not_fix_the_column(seed, m):
    G, basis, inactive = columns(seed, m=m)
    ranks = [int(torch.linalg.matrix_rank(basis[zero], rtol=1e-9)) for zero in inactive]
    finite = spread_of_zeros(basis, G, inactive).isfinite()
    assert finite.tolist() == [rank == len(G) - 1 for rank in ranks]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(30, 60, 10), (30, 60, 50, 3), (30, 60, 2)])
def test_no_other_vectors_of_the_families_have_the_same_span(sizes, seed):
    """The theorem's condition, by brute force: what of F_i lies in span(G) is one line."""
    made = case(sizes, 8, seed=seed)
    run = passes(made.problem, made.inputs, targets(made))
    basis = torch.linalg.qr(run.deltas[0].T)[0]
    rows = family(made.problem, run, 0, torch.arange(8))
    found = spread_of_family(basis, run.deltas[0], rows)
    for own, spread in zip(rows, found, strict=True):
        own = torch.linalg.svd(own, full_matrices=False)[2]
        sines = torch.linalg.svdvals(own - own @ basis @ basis.T)
        assert int((sines < 1e-9).sum()) == 1
        torch.testing.assert_close(spread, (1 + (1 / sines[:-1]).pow(2).sum()).sqrt())
    assert (spreads(Held(made.problem, run), 0) < torch.inf).all()


def targets(made):
    problem = made.problem
    return Targets(
        torch.nn.functional.one_hot(made.labels, problem.classes).to(DTYPE), problem.unit(len(made.labels)), 0.0
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(30, 40, 40, 10), (30, 40, 40, 40, 60), (30, 50, 20)])
def test_the_joint_spread_is_that_of_all_layers_conditions_side_by_side(sizes, seed):
    """Against a textbook version: one least-squares problem a sample, each layer's equations over its noise."""
    made = case(sizes, 15, seed=seed)
    problem, run = made.problem, passes(made.problem, made.inputs, targets(made))
    noise = [entry_noise(problem, k, rest_of(problem, k, run))[0] for k in range(len(run.deltas))]
    columns = [inverse_columns(problem.extend(k, x)) for k, x in enumerate(run.inputs)]
    for i, found in enumerate(joint_spreads(Held(problem, run))):
        zero_sum = torch.cat([torch.ones(1, sizes[-1], dtype=DTYPE), run.deltas[-1][i : i + 1]])
        B, equations = torch.linalg.svd(zero_sum)[2][2:].T, []  # what d may be beside the sample's own
        for k in reversed(range(len(run.deltas))):
            B = B if k > problem.last else run.slopes[k][i][:, None] * (problem.weights[k + 1].T @ B)
            if len(run.deltas[k]) <= sizes[k + 1]:
                beside = B - run.deltas[k].T @ torch.linalg.lstsq(run.deltas[k].T, B).solution
                equations.append(beside / (noise[k] * columns[k][i]))
        g = run.deltas[0][i] / run.deltas[0][i].norm()
        moved = (B - torch.outer(g, g @ B)) @ torch.linalg.pinv(torch.cat(equations), rtol=1e-9)
        expected = (1 + (moved / (noise[0] * columns[0][i])).pow(2).sum()).sqrt()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_many_classes_need_all_layers(seed):
    """The first layer alone does not tell 24 samples in 40 units with 60 classes; all together do."""
    made = case((30, 40, 40, 60), 24, seed=seed)
    run = passes(made.problem, made.inputs, targets(made))
    held = Held(made.problem, run)
    alone, joint = spreads(held, 0), joint_spreads(held)
    assert alone.isinf().any()
    assert joint.isfinite().all()
    assert (joint <= alone).all()


@pytest.mark.parametrize("seed", range(3))
def test_all_layers_together_do_not_tell_two_samples_of_one_region(seed):
    made = case((30, 40, 40, 60), 12, seed=seed)
    x, y = made.inputs.clone(), made.labels.clone()
    x[1], y[1] = x[0] * (1 + 1e-6), y[0] + 1 - 2 * (y[0] == 59)
    made = case((30, 40, 40, 60), inputs=x, labels=y, seed=seed)
    joint = joint_spreads(Held(made.problem, passes(made.problem, x, targets(made))))
    assert joint[:2].isinf().all()


@pytest.mark.parametrize("exponent", [-13, -11, -9])
@pytest.mark.parametrize("sizes", [(30, 60, 60, 10), (30, 60, 2), (6, 60, 60, 10), (30, 24, 24, 60)])
@pytest.mark.parametrize("seed", range(3))
def test_noise_moves_no_input_beyond_its_bound(sizes, exponent, seed):
    """Noise of the size that is left; six inputs for eight samples are told by the second layer alone."""
    made = case(sizes, 8, seed=seed)
    noisy = [
        g + 10.0**exponent * rms(g) * torch.randn(g.shape, generator=generator(seed), dtype=DTYPE)
        for g in made.problem.weight_gradients
    ]
    problem = replace(made.problem, weight_gradients=tuple(noisy), precision=10.0**exponent / 2)
    found = whole_batch.distinct_samples(problem, Terms(Budget(10.0)))
    assert len(found.inputs) == 8
    away = errors(made.inputs, found.inputs)
    assert (away <= found.error_bound).all()
    assert (found.error_bound < 1e7 * away.max()).all()


@pytest.mark.parametrize("shape", [(70, 30), (30, 70), (50, 50), (40, 1)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("seed", range(3))
def test_no_singular_value_is_larger_than_its_bound(shape, size, seed):
    W = size * torch.randn(*shape, generator=generator(seed), dtype=DTYPE)
    most = float(torch.linalg.svdvals(W)[0])
    assert most * (1 - 1e-6) <= largest_singular(W) <= 2 * most


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_vector_is_longer_at_the_first_layer_than_it_can_be(k, seed):
    made = case((12, 40, 30, 20, 5), 4, seed=seed)
    problem, run = made.problem, passes(made.problem, made.inputs, targets(made))
    most = most_back(problem, run, k)
    for i in range(4):
        back = torch.eye(problem.weights[k].shape[0], dtype=DTYPE)
        for layer in reversed(range(k)):
            back = problem.back(layer + 1, back) * run.slopes[layer][i]
        assert float(torch.linalg.matrix_norm(back, 2)) <= most
    assert most_back(problem, run, 0) == 1


def test_dependent_samples_have_no_bound():
    made = case((30, 60, 10), 6)
    x = made.inputs.clone()
    x[5] = x[0]
    run = passes(made.problem, x, targets(replace_inputs(made, x)))
    assert input_bounds(made.problem, run, targets(made)).isinf().any()


def replace_inputs(made, x):
    return replace(made, inputs=x)


@pytest.mark.parametrize("seed", range(3))
def test_columns_of_the_inverse(seed):
    A = torch.randn(4, 9, generator=generator(seed), dtype=DTYPE)
    torch.testing.assert_close(inverse_columns(A), torch.linalg.pinv(A).norm(dim=0))
    assert inverse_columns(A[:, :3]).isinf().all()


def test_errors_grow_with_the_entries_and_with_the_spread():
    G, X = (torch.randn(4, n, generator=generator(n), dtype=DTYPE) for n in (30, 12))
    X[:, -1] = 1

    def bound(spread, entry):
        moved = column_errors(inverse_columns(X), torch.full((4,), spread, dtype=DTYPE), entry)
        return input_errors(G, X, entries=(entry, entry))(moved)

    torch.testing.assert_close(bound(1.0, 2e-9), 2 * bound(1.0, 1e-9))
    assert (bound(3.0, 1e-9) > bound(1.0, 1e-9)).all()
    assert column_errors(inverse_columns(X[:, :3]), torch.ones(4, dtype=DTYPE), 1e-9).isinf().all()


@pytest.mark.parametrize("seed", range(3))
def test_signs_change_at_the_slack_and_not_before(seed):
    linear = torch.randn(5, 20, generator=generator(seed), dtype=DTYPE)
    bias = torch.randn(20, generator=generator(seed + 1), dtype=DTYPE)
    slack = length_slack(linear, bias)
    signs = linear + bias > 0
    for row, own, s in zip(linear, signs, slack.tolist(), strict=True):
        inside = [torch.equal((1 + t * s) * row + bias > 0, own) for t in (-1 + 1e-9, 1 - 1e-9)]
        outside = [torch.equal((1 + t * s) * row + bias > 0, own) for t in (-1 - 1e-9, 1 + 1e-9)]
        assert any(inside)
        assert not all(outside)


def test_what_an_error_is_relative_to():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=DTYPE)
    assert norms(x).tolist() == pytest.approx([5, 1e-6 * 5 / 2**0.5])
    assert (norms(0 * x) > 0).all()


HOLDS = Certificate(torch.tensor([1, 1]), 2, 1e-15, 1e-9, torch.tensor([1e-12, 1e-9], dtype=DTYPE), 1e-6)


def test_a_certificate_that_holds():
    assert HOLDS.holds
    assert HOLDS.certified.all()
    assert HOLDS.why_not() == ""


@pytest.mark.parametrize(
    ("change", "reason", "explained"),
    [
        ({"disclosed": None}, "the number of samples is not disclosed", True),
        ({"disclosed": 3}, "2 samples were found, 3 disclosed", True),
        ({"copies": torch.tensor([1, 2])}, "1 of 2 images stand for several samples each", True),
        ({"copies": torch.tensor([1, 2]), "disclosed": 3}, "1 of 2 images stand for several samples each", True),
        ({"reserve": "two classes"}, "two classes", True),
        ({"residual": 1e-8}, "reproduces the gradients to 1e-08, rounding allows 1e-09", False),
        ({"residual": float("nan")}, "reproduces the gradients to nan", False),
        ({"doubt": "noise"}, "noise", False),
    ],
)
def test_whatever_fails_leaves_nothing_certified_and_says_so(change, reason, explained):
    certificate = replace(HOLDS, **change)
    assert not certificate.holds
    assert not certificate.certified.any()
    assert (certificate.explained == explained).all()
    assert reason in certificate.why_not()


def test_an_input_that_is_poorly_determined_is_the_only_one_lost():
    certificate = replace(HOLDS, error_bound=torch.tensor([1e-12, 1e-3], dtype=DTYPE))
    assert certificate.certified.tolist() == [True, False]
    assert not certificate.holds
    assert "an input is determined to 1e-03 only" in certificate.why_not()


def test_nothing_is_no_certificate():
    nobody = Certificate(torch.zeros(0, dtype=torch.long), 0, 0.0, 1e-9, torch.zeros(0, dtype=DTYPE), 1e-6)
    assert not nobody.holds
