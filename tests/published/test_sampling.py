"""Kernels, walks and rounds of the sampler, against textbook forms and the probabilities of the theory."""

import itertools
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make

from spear.published import sampling, theory, walks
from spear.published.kernels import MOST, block_kernels, distinct, kernels_lu, kernels_svd, naive, refine, sample_rows
from spear.published.view import Observed

MET = 1 - 1e-9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixed(m, b, seed=0, zeros=None):
    """L with orthonormal columns, the zeros of G (m, b), the true directions (b, b); other entries are normal."""
    g = generator(seed)
    if zeros is None:
        mask = torch.rand(m, b, generator=g) < 0.5
    else:
        mask = torch.rand(m, b, generator=g).argsort(0).argsort(0) < zeros
    G = torch.randn(m, b, generator=g, dtype=torch.float64).masked_fill(mask, 0)
    L = torch.linalg.svd(G, full_matrices=False)[0]
    Q = L.mT @ G
    return L, mask, (Q / Q.norm(dim=0)).mT.contiguous()


def seen(L, tolerance=1e-7):
    """What the server sees, the weights being such that every v is near its q: B = L."""
    return Observed(L, L.new_zeros(L.shape[1], 0), L, None, tolerance)


def met(q, truth):
    """Which of the true directions are among q, up to sign."""
    return ((q @ truth.mT).abs() > MET).any(0)


def chains_of(L, count, *, share=1.0, seed=0, dtype=torch.float64):
    start = {"share": share, "generator": generator(seed), "device": torch.device("cpu"), "dtype": dtype}
    return walks.exchange_bases(walks.start_chains(seen(L), count, **start))


# --- draws and kernels


@pytest.mark.parametrize(("count", "width", "size"), [(200, 7, 3), (50, 20, 19), (30, 5, 5), (4, 6, 0), (0, 5, 2)])
def test_rows_are_drawn_without_replacement(count, width, size):
    rows = sample_rows(count, width, size, generator=generator())
    assert rows.shape == (count, size)
    assert all(len(set(draw)) == size and set(draw) <= set(range(width)) for draw in rows.tolist())
    assert torch.equal(rows, sample_rows(count, width, size, generator=generator()))


def test_every_set_of_rows_is_equally_likely():
    draws = sample_rows(20_000, 6, 3, generator=generator(1)).sort(1).values
    counts = draws.unique(dim=0, return_counts=True)[1].double()
    expected = 20_000 / 20
    assert len(counts) == 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8  # chi-squared with 19 degrees of freedom, 0.1 %


def test_more_rows_than_there_are_cannot_be_drawn():
    with pytest.raises(ValueError, match="cannot draw 6 different rows out of 5"):
        sample_rows(3, 5, 6)


@pytest.mark.parametrize("kernels", [kernels_svd, kernels_lu])
@pytest.mark.parametrize("b", [1, 2, 3, 8, 20])
def test_kernels_are_unit_vectors_that_the_rows_annihilate(kernels, b):
    A = torch.randn(17, b - 1, b, generator=generator(b), dtype=torch.float64)
    q = kernels(A)
    torch.testing.assert_close(q.norm(dim=1), torch.ones(17, dtype=torch.float64))
    assert float((A @ q[:, :, None]).abs().amax() if b > 1 else 0) < 1e-11


@given(b=st.integers(2, 9), seed=st.integers(0, 10**6), last=st.sampled_from([0.0, 1e-14, 1e-7, 1e-3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_fast_kernels_are_those_of_the_textbook_even_where_the_last_coordinate_vanishes(b, seed, last):
    kernel = torch.randn(5, b, generator=generator(seed), dtype=torch.float64)
    kernel[:, -1] *= last
    kernel /= kernel.norm(dim=1, keepdim=True)
    A = torch.randn(5, b - 1, b, generator=generator(seed + 1), dtype=torch.float64)
    A -= A @ kernel[:, :, None] * kernel[:, None]
    condition = 1 / torch.linalg.svdvals(A).amin()
    fast, slow = kernels_lu(A), kernels_svd(A)
    assert float(1 - (fast * slow).sum(1).abs().amin()) < 1e-10 * (1 + condition)


def test_a_matrix_that_lacks_rank_has_a_kernel_vector_too():
    A = torch.zeros(2, 3, 4, dtype=torch.float64)
    A[1, :2, :2] = torch.eye(2)
    q = kernels_lu(A)
    torch.testing.assert_close(q.norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert float((A @ q[:, :, None]).abs().max()) < 1e-12


@pytest.mark.parametrize("b", [1, 2, 5, 20])
def test_a_block_has_the_kernels_of_all_its_submatrices(b):
    blocks = torch.randn(6, b, b, generator=generator(b), dtype=torch.float64)
    q = block_kernels(blocks)
    for j in range(b):
        slow = kernels_svd(torch.cat([blocks[:, :j], blocks[:, j + 1 :]], 1))
        torch.testing.assert_close((q[:, j] * slow).sum(1).abs(), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_kernels_of_a_singular_block_are_not_finite():
    blocks = torch.stack([torch.zeros(3, 3), torch.eye(3)]).double()
    assert not block_kernels(blocks)[0].isfinite().any()
    assert torch.equal(block_kernels(blocks)[1], torch.eye(3, dtype=torch.float64))


# --- the published sampler


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("kernels", [kernels_svd, kernels_lu])
def test_the_published_sampler_is_the_loop_over_proposals(kernels, chunk):
    L, _, _ = mixed(30, 4)
    found = naive(L, 60, threshold=10, generator=generator(5), kernels=kernels, chunk=chunk)
    g, expected = generator(5), []
    for size in [chunk] * (60 // chunk) + [60 % chunk]:
        for rows in sample_rows(size, 30, 3, generator=g):
            entries = (L @ torch.linalg.svd(L[rows], full_matrices=True)[2][-1]).abs()
            zeros = int((entries < 1e-7 * entries.max()).sum())
            expected += [zeros] if zeros >= 10 else []
    assert (found.count, found.hits, found.zeros.tolist()) == (60, len(expected), expected)


@pytest.mark.parametrize(("m", "b"), [(25, 4), (30, 4), (40, 3)])
def test_the_published_sampler_hits_as_often_as_the_theory_says(m, b):
    proposals, L, mask, truth = 20_000, *mixed(m, b, seed=3)

    def kernels(A):  # sets of rows that lack rank have no kernel to speak of
        return kernels_svd(A).masked_fill(torch.linalg.svdvals(A)[:, -1:] < 1e-9, 1 / math.sqrt(b))

    every = torch.tensor(list(itertools.combinations(range(m), b - 1)))
    p = ((kernels(L[every]) @ truth.mT).abs() > MET).double().mean(0)
    assert bool((p <= theory.success_probability(mask.sum(0), m, b) + 1e-12).all())
    found = naive(L, proposals, threshold=b - 1, generator=generator(), kernels=kernels)
    counts = ((found.directions @ truth.mT).abs() > MET).sum(0)
    assert bool(((counts - proposals * p).abs() < 4 * (proposals * p).sqrt()).all())


# --- the tableau


def textbook(L, t):
    """T of every chain from its definition: L_held = T^T L_basis."""
    solved = [torch.linalg.solve(L[rows].mT, L[held].mT) for rows, held in zip(t.basis.mT, t.held.mT, strict=True)]
    return torch.stack(solved, 2)


@pytest.mark.parametrize("seed", range(4))
def test_a_reference_basis_is_a_well_conditioned_choice_of_rows(seed):
    L, _, _ = mixed(50, 9, seed)
    rows = walks.reference_basis(L, generator=generator(seed))
    assert len(set(rows.tolist())) == 9
    assert float(torch.linalg.cond(L[rows])) < 100
    assert rows.tolist() != walks.reference_basis(L, generator=generator(seed + 100)).tolist()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_pools_have_different_rows_from_among_those_allowed(share):
    L, rest = mixed(60, 5)[0], torch.arange(10, 60)
    pools = walks.draw_pools(seen(L), rest, 8, 33, share=share, generator=generator())
    assert pools.shape == (8, 33)
    assert all(len(set(pool)) == 8 and min(pool) >= 10 for pool in pools.mT.tolist())


@pytest.mark.parametrize("bias", [True, False])
def test_likely_pools_are_where_a_row_of_L_puts_the_lowest_pre_activations(bias):
    observed, rest = make(5, 60, 40, bias=bias).observed, torch.arange(60)
    pools = walks.draw_pools(observed, rest, 8, 40, share=0.25, generator=generator())
    v = observed.L if observed.d is None else observed.L * (observed.L @ observed.d).sign()[:, None]
    lowest = (v @ observed.B.mT).argsort(1)[:, :15].tolist()
    assert all(any(set(pool) <= set(rows) for rows in lowest) for pool in pools.mT.tolist())


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_likely_pools_vanish_together_more_often_than_uniform_ones(share, seed):
    """The zeros of the column that has most of them, in pools of one size."""
    problem = make(16, 200, 100, 6, seed=seed)
    zero, rest = problem.observed.L @ problem.q.mT, torch.arange(200)
    zero = zero.abs() < 1e-9 * zero.abs().amax(0)
    likely, uniform = (
        zero[walks.draw_pools(problem.observed, rest, 30, 200, share=each, generator=generator())].sum(0).amax(1)
        for each in (share, 1.0)
    )
    assert likely.double().mean() > 1.1 * uniform.double().mean()


@pytest.mark.parametrize(("m", "b"), [(5, 2), (12, 3), (40, 7), (60, 16), (16, 14)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_pivots_keep_the_coefficients_of_all_chains(m, b, share):
    L, _, _ = mixed(m, b, seed=m)
    t = chains_of(L, 64, share=share)
    torch.testing.assert_close(t.entries, textbook(L, t), rtol=1e-6, atol=1e-6)
    pools = torch.cat([t.basis, t.held]).sort(0).values
    for step in range(30):
        before = torch.stack([t.basis[step % b], t.held[step % len(t.held)]])
        moved = walks.pivot(t, step % b, step % len(t.held))
        after = torch.stack([t.held[step % len(t.held)], t.basis[step % b]])
        assert torch.equal(torch.where(moved, before, before.flip(0)), after)
    assert torch.equal(torch.cat([t.basis, t.held]).sort(0).values, pools)
    torch.testing.assert_close(t.entries, textbook(L, t), rtol=1e-6, atol=1e-6)


def test_chains_with_a_vanishing_pivot_sit_still():
    L, _, _ = mixed(40, 5)
    t = chains_of(L, 64)
    before = t.entries.clone()
    moved = walks.pivot(t, 2, 3)
    assert 0 < moved.sum() < 64  # at b = 5 many sets of b rows vanish in a column
    assert torch.equal(moved, before[2, 3].abs() > 1.3e-4)
    assert torch.equal(t.entries[:, :, ~moved], before[:, :, ~moved])


@pytest.mark.parametrize("b", [2, 3, 6, 7, 15, 20])
@pytest.mark.parametrize("pairs", [1, 3])
def test_coincidences_are_those_of_the_double_loop(b, pairs):
    rows = torch.randn(b, 2 * pairs, 64, generator=generator(b), dtype=torch.float64)
    code = walks.codes(rows, 19)  # four bits of mantissa and twelve of exponent and sign: collisions abound
    compare = walks.Comparison(b, pairs, 64, 19, torch.device("cpu"))
    expected = [
        any(code[i, p, c] == code[j, p, c] for i, j in itertools.combinations(range(b), 2) for p in range(pairs))
        for c in range(64)
    ]
    assert compare.chains(rows).tolist() == [c for c in range(64) if expected[c]]


def visible(t, mask, pairs=3):
    """For chains and columns of G: just two rows of the basis do not vanish there, and both rows of some pair do."""
    active = (~mask[t.basis]).sum(0)
    held = mask[t.held[: 2 * pairs]]
    return (active == 2) & (held[:pairs] & held[pairs:]).any(0)


@pytest.mark.parametrize(("m", "b"), [(60, 6), (80, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_a_comparison_sees_every_kernel_that_it_tests(m, b, seed):
    L, mask, _ = mixed(m, b, seed)
    t = chains_of(L, 512, seed=seed)
    compare = walks.Comparison(b, 3, 512, 7, torch.device("cpu"))
    seen = torch.zeros(512, dtype=torch.bool)
    seen[compare.chains(t.entries[:, :6])] = True
    ratios = t.entries[:, :6].abs().amin((0, 1)) > 1e-6  # not 0 / 0, as the rows of the smallest problems give at times
    expected = visible(t, mask).any(1) & ratios
    assert expected.sum() > 20
    assert (expected & ~seen).sum() <= 0.01 * expected.sum()  # but where rounding parts equal ratios


@pytest.mark.parametrize(("m", "b"), [(60, 6), (80, 9), (100, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_promising_rows_have_a_sparse_kernel(m, b, dtype):
    L, _, truth = mixed(m, b, seed=1)
    rows = walks.walk(chains_of(L, 512, dtype=dtype), 20, tolerance=1e-7).rows
    assert len(rows) > (100 if b < 16 else 10)
    assert all(len(set(each)) == b - 1 for each in rows.tolist())
    q = kernels_svd(L[rows])
    sparse = ((L @ q.mT).abs() < 1e-8).sum(0) >= b + 1  # two rows of those held out, at least
    assert sparse.double().mean() > (0.95 if dtype == torch.float64 else 0.9)
    assert ((q @ truth.mT).abs() > MET).any(1).double().mean() > 0.85  # the others are mixtures of columns


def test_single_precision_loses_few_sightings():
    L, _, truth = mixed(100, 16, seed=2)
    found = [
        walks.walk(chains_of(L, 1024, dtype=dtype), 30, tolerance=1e-7) for dtype in (torch.float32, torch.float64)
    ]
    single, double = (int(((kernels_svd(L[w.rows]) @ truth.mT).abs() > MET).any(1).sum()) for w in found)
    assert double > 50
    assert single > 0.5 * double


def test_kernels_are_counted_once():
    """Of the sets of b rows that a chain compares few come twice, and as many as are counted are different."""
    m, b, steps = 60, 6, 40
    L, _, _ = mixed(m, b, seed=4)
    count = walks.walk(chains_of(L, 16), steps, tolerance=1e-7).kernels
    t, tested = chains_of(L, 16), [set() for _ in range(16)]
    for step in range(steps):
        row = (step + step // b) % 12
        walks.pivot(t, step % b, row)
        first = 0 if row >= 6 else 6
        for c, sets in enumerate(tested):
            basis, held = t.basis[:, c].tolist(), t.held[first : first + 6, c].tolist()
            for out, p in itertools.product(itertools.combinations(basis, 2), range(3)):
                sets.add(frozenset({*basis, held[p], held[p + 3]} - set(out)))
    different = sum(len(sets) for sets in tested)
    assert 0.9 * different < count < 1.1 * different


def falling(n, k):
    return math.prod(n - i for i in range(k))


def sighting_probability(zeros, m, b, pairs):
    """For a column of `zeros` zeros: a random basis has just two active rows in it, and some pair of others none."""
    basis = math.comb(zeros, b - 2) * math.comb(m - zeros, 2) / math.comb(m, b)
    left, total = zeros - b + 2, m - b
    union = sum(
        (-1) ** (r + 1) * math.comb(pairs, r) * falling(left, 2 * r) / falling(total, 2 * r)
        for r in range(1, pairs + 1)
    )
    return basis * union


@pytest.mark.parametrize(("m", "b", "zeros"), [(80, 8, 40), (100, 10, 55), (120, 12, 70)])
def test_walks_sight_columns_as_often_as_the_theory_says(m, b, zeros):
    excess = []
    for seed in range(12):
        L, mask, _ = mixed(m, b, seed, zeros)
        t, compare = chains_of(L, 512, seed=seed), walks.Comparison(b, 3, 512, 7, torch.device("cpu"))
        for step in range(60):
            walks.pivot(t, step % b, (step + step // b) % 12)
        sighted = float(visible(t, mask)[compare.chains(t.entries[:, :6])].double().sum() / 512)
        start = walks.reference_basis(
            L, generator=generator(seed)
        )  # has left all chains: pools are drawn from the rest
        rest = zeros - mask[start].sum(0)
        excess.append(sighted - sum(sighting_probability(z, m - b, b, 3) for z in rest.tolist()))
    excess = torch.tensor(excess)
    # a few per cent of the sets of b rows are singular at this size, and never a basis
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / math.sqrt(len(excess)) + 0.03


# --- rounds


@pytest.mark.parametrize(("m", "b"), [(10, 1), (24, 2), (30, 3), (60, 6), (90, 12), (90, 13), (120, 16)])
@pytest.mark.parametrize("seed", range(2))
def test_a_search_finds_all_columns_of_a_small_problem(m, b, seed):
    L, _, truth = mixed(m, b, seed, m // 2)
    found = torch.zeros(b, dtype=torch.bool)
    for proposals in itertools.islice(sampling.proposal_rounds(seen(L), threshold=max(b, m // 3), seed=seed), 30):
        found |= met(proposals.directions, truth)
        if found.all():
            break
    assert found.all()


@pytest.mark.parametrize(("m", "b"), [(3, 1), (4, 2), (5, 3), (8, 6), (17, 15), (18, 16), (30, 20), (40, 30)])
def test_narrow_layers_are_no_obstacle(m, b):
    L, _, _ = mixed(m, b, seed=m)
    proposals = sampling.rounds(seen(L), range(0, 1), threshold=b)
    assert proposals.count > 0
    assert bool((proposals.zeros >= b).all())


@pytest.mark.parametrize(("m", "b"), [(60, 6), (110, 16)])
def test_directions_of_a_round_are_sparse_polished_and_different(m, b):
    L, mask, truth = mixed(m, b, seed=7)
    proposals = sampling.rounds(seen(L), range(1, 2), threshold=b + 4)
    q = proposals.directions
    assert q.dtype == torch.float64
    assert 0 < len(q) <= proposals.hits <= proposals.count
    torch.testing.assert_close(q.norm(dim=1), torch.ones(len(q), dtype=torch.float64))
    assert float((q @ q.mT).abs().fill_diagonal_(0).max()) < 1 - 1e-7
    assert torch.equal(proposals.zeros, ((L @ q.mT).abs() < 1e-7 * (L @ q.mT).abs().amax(0)).sum(0))
    assert bool((proposals.zeros >= b + 4).all())
    hit, column = ((q @ truth.mT).abs() > MET).nonzero(as_tuple=True)
    assert len(hit) > 1
    assert torch.equal(proposals.zeros[hit], mask.sum(0)[column])
    assert float(((q[hit] * truth[column]).sum(1).abs() - 1).abs().max()) < 1e-14
    assert float((L @ q[hit].mT)[mask[:, column]].abs().max()) < 1e-13


def same(one, other):
    """Whether two sets of directions are equal up to order and sign."""
    return len(one) == len(other) and bool(((one @ other.mT).abs().amax(1) > MET).all())


@pytest.mark.parametrize(("m", "b"), [(60, 6), (110, 16)])
def test_results_do_not_depend_on_which_rounds_are_computed_together(m, b):
    L, _, _ = mixed(m, b)
    options = {"threshold": m // 3, "seed": 3}
    single = [sampling.rounds(seen(L), range(index, index + 1), **options) for index in range(3)]
    for parts in ([range(3)], [range(2), range(2, 3)]):
        found = [sampling.rounds(seen(L), part, **options) for part in parts]
        for part, together in zip(parts, found, strict=True):
            alone = torch.cat([single[index].directions for index in part])
            assert same(together.directions, distinct(L, alone, 1e-7))
            assert together.count == sum(single[index].count for index in part)
            assert together.hits == sum(single[index].hits for index in part)


@pytest.mark.parametrize("b", [6, 16])
def test_results_do_not_depend_on_who_computes_them_and_threads_are_left_alone(b):
    L, _, _ = mixed(110, b)
    threads = torch.get_num_threads()
    single = [sampling.rounds(seen(L), range(index, index + 1), threshold=40) for index in range(3)]
    try:
        for count, executor in ((1, None), (3, None), (1, ThreadPoolExecutor(1)), (2, ThreadPoolExecutor(3))):
            torch.set_num_threads(count)
            found = list(itertools.islice(sampling.proposal_rounds(seen(L), threshold=40, executor=executor), 3))
            assert torch.get_num_threads() == count
            for one, other in zip(single, found, strict=True):
                assert (one.count, one.hits) == (other.count, other.hits)
                assert torch.equal(one.directions, other.directions)
                assert torch.equal(one.zeros, other.zeros)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("b", "limit"), [(6, 1), (6, 100), (16, 5000), (16, 10**6)])
def test_small_limits_are_kept(b, limit):
    L, _, _ = mixed(110, b)
    assert next(sampling.proposal_rounds(seen(L), threshold=40, limit=limit)).count < limit + b
    assert next(sampling.proposal_rounds(seen(L), threshold=40)).count >= sampling.BLOCKS * b


def test_wide_chunks_are_the_rounds_side_by_side():
    """What a GPU does: the chains of several rounds in one walk."""
    L, _, _ = mixed(110, 18)
    wide = sampling.chain_rounds(seen(L), range(3), seed=0, device=torch.device("cpu"))
    single = [sampling.chain_rounds(seen(L), range(r, r + 1), seed=0, device=torch.device("cpu")) for r in range(3)]
    assert wide[0] == sum(count for count, _ in single)
    assert same(distinct(L, wide[1], 1e-7), distinct(L, torch.cat([q for _, q in single]), 1e-7))


def test_rounds_and_seeds_are_different_draws():
    L, _, _ = mixed(110, 16)
    draws = [
        sampling.chain_rounds(seen(L), range(r, r + 1), seed=s, device=torch.device("cpu"))[1]
        for r, s in [(0, 0), (3, 0), (0, 1)]
    ]
    again = sampling.chain_rounds(seen(L), range(1), seed=0, device=torch.device("cpu"))[1]
    assert torch.equal(draws[0], again)
    assert not any(len(a) == len(b) and torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


@pytest.mark.parametrize("b", [6, 16])
def test_dead_neurons_spoil_nothing(b):
    L, _, truth = mixed(110, b)
    dead = torch.zeros(150, b, dtype=torch.float64)
    dead[torch.randperm(150, generator=generator())[:110]] = L
    rounds = itertools.islice(sampling.proposal_rounds(seen(dead), threshold=75), 16)
    found = torch.cat([proposals.directions for proposals in rounds])
    assert met(found, truth).all()


@pytest.mark.parametrize("b", [8, 16])
def test_gradients_in_single_precision_need_a_looser_tolerance(b):
    problem = make(b, 160, 60, seed=1, dtype=torch.float32)
    assert problem.observed.tolerance > 1e-6
    rounds = itertools.islice(sampling.proposal_rounds(problem.observed, threshold=55), 16)
    found = torch.cat([proposals.directions for proposals in rounds])
    assert bool(((found @ problem.q.mT).abs() > 1 - 1e-6).any(0).all())


def test_a_gpu_finds_what_the_cpu_finds():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    L, _, _ = mixed(110, 16)
    cpu = sampling.rounds(seen(L), range(2), threshold=20)
    gpu = sampling.rounds(seen(L.cuda()), range(2), threshold=20)
    assert gpu.directions.device.type == "cuda"
    assert same(cpu.directions, gpu.directions.cpu())


# --- polish


@pytest.mark.parametrize(("m", "b"), [(30, 3), (80, 9), (120, 16)])
def test_polished_directions_are_exact_and_independent_of_their_origin(m, b):
    L, mask, truth = mixed(m, b, seed=5)
    rough = truth + 1e-8 * torch.randn(2, b, b, dtype=torch.float64, generator=generator())
    first, second = (refine(L, each / each.norm(dim=1, keepdim=True)) for each in rough)
    assert float(1 - (first * truth).sum(1).abs().min()) < 1e-14
    torch.testing.assert_close((first * second).sum(1).abs(), torch.ones(b, dtype=torch.float64), rtol=0, atol=1e-14)
    assert float((L @ first.mT)[mask].abs().max()) < 1e-13


def test_a_direction_that_is_not_sparse_stays_as_it_is():
    L, _, _ = mixed(40, 6)
    q = torch.nn.functional.normalize(torch.randn(5, 6, dtype=torch.float64, generator=generator()), dim=1)
    assert torch.equal(refine(L, q), q)
    assert refine(L, q[:0]).shape == (0, 6)


def test_of_equal_directions_the_sparsest_stays():
    L, _, truth = mixed(40, 6)
    rough = truth + 1e-5 * torch.randn(6, 6, dtype=torch.float64, generator=generator())
    q = torch.nn.functional.normalize(torch.cat([rough, -truth, truth]), dim=1)
    kept = distinct(L, q, 1e-7)
    assert len(kept) == 6
    assert float((kept @ truth.mT).abs().amax(1).min()) > 1 - 1e-14


def test_a_direction_met_thousands_of_times_crowds_out_no_other():
    L, mask, truth = mixed(40, 6)
    sparsest = truth[mask.sum(0).argmax()]
    q = torch.cat([sparsest.repeat(MOST + 10, 1), truth])
    assert len(distinct(L, q, 1e-7)) == 6


# --- benchmark


def test_the_benchmark_prints_one_object_with_every_method(repository):
    arguments = ["--json", "--b", "4", "6", "--seconds", "0.01", "--seeds", "1", "--limit", "1"]
    command = [sys.executable, repository / "benchmarks" / "sampler.py", *arguments]
    facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = {(row["b"], row["method"]): row for row in facts["rows"]}
    assert list(rows) == list(itertools.product((4, 6), ("svd", "lu", "blocks", "uniform", "walks")))
    for (b, _), row in rows.items():
        assert row["proposals_ratio"] == pytest.approx(row["proposals"] / rows[b, "svd"]["proposals"])
        assert row["hits_ratio"] == pytest.approx(row["hits"] / rows[b, "svd"]["hits"])
        assert row["hits"] > 0
        assert row["share"] > 0
