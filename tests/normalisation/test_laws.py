"""What holds of every batch behind a normalisation: the derivative, σ by epsilon, the spaces, the plane."""

from dataclasses import replace

import pytest
import torch
from normalised_problems import sent
from torch import nn

from spear.network.problem import Targets
from spear.normalisation import replay, statistics
from spear.normalisation.batch_bounds import difference_bounds
from spear.normalisation.opening import open_normalised
from spear.normalisation.sample_bounds import sample_bounds
from spear.normalisation.sample_search import columns
from spear.normalisation.spaces import Found, open_spaces, plane

CASES = [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm), ("rms", lambda m: nn.RMSNorm(m, eps=1e-6))]
SIZES, B = (40, 90, 80, 6), 9


def opened(norm, seed):
    case = sent(SIZES, B, norm, seed=seed, spread=0.3)
    view = open_normalised(case.model, case.update)
    targets = Targets(torch.nn.functional.one_hot(case.labels, 6).double(), 1 / B, 0.0)
    return case, view, replay.run(view, case.inputs, targets, (None, None)), targets


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_the_batch_reproduces_its_update(kind, norm, seed):
    case, view, own, targets = opened(norm, seed)
    assert replay.misfit(view, own) < 1e-12
    shifted = replay.run(view, case.inputs + 1, targets, (None, None))
    assert (replay.misfit(view, shifted) < 1e-11) == (kind == "batch")
    inputs = replay.solve_inputs(view, 0, own.deltas[0])
    truth = case.inputs - case.inputs.mean(0) if kind == "batch" else case.inputs
    assert torch.allclose(inputs, truth, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_epsilon_tells_what_the_buffers_tell(seed):
    _, view, own, _ = opened(nn.BatchNorm1d, seed)
    for k, norm in enumerate(view.norms):
        arguments = (norm, view.network.weights[k], view.network.weight_gradients[k], 2.0**-52)
        alone, told = statistics.from_epsilon(*arguments), statistics.from_buffers(norm, 2.0**-52, B)
        z = view.network.apply(k, own.inputs[k])
        assert torch.allclose(told.sigma, (z.var(0, unbiased=False) + norm.eps).sqrt(), rtol=1e-12)
        off = (alone.sigma / told.sigma - 1).abs()
        assert bool((off < statistics.CONSISTENT * (alone.error + told.error)).all())
        assert float(off[alone.known].max()) < 1e-8
        assert statistics.deviation(*arguments, B).told


@pytest.mark.parametrize("seed", [0, 1])
def test_every_sample_lies_in_the_plane_of_the_others(seed):
    _, view, own, _ = opened(nn.BatchNorm1d, seed)
    network, k = view.network, view.network.last
    low, unit = network.factors(k), network.unit(B)
    known = statistics.from_buffers(view.norms[k], 2.0**-52, B)
    spaces = open_spaces(network, view.norms[k], k, low, known)
    x = own.inputs[k] - own.inputs[k].mean(0)
    t, s = own.deltas[k] / unit @ low.L, x @ spaces.rows.mT
    assert spaces.batch == B
    assert torch.allclose(spaces.gradients(t, s), (own.slopes[k] / unit)[:, spaces.live], atol=1e-9)
    assert torch.allclose(spaces.outputs(s), own.outputs[k][:, spaces.live], atol=1e-10)
    duality = (t / spaces.singular) @ s.mT
    assert torch.allclose(duality, torch.eye(B, dtype=torch.float64) - 1 / B, atol=1e-9)
    for f in range(B):
        found = Found(t[:f], s[:f], t[:f, :0], t[:f, :0].bool())
        here = plane(spaces, found, 1.0)
        assert here.g_basis.shape[1] == 2 * max(B - 1 - f, 1)
        point = torch.cat([(t[-1] - here.t0) @ here.t_basis, (s[-1] - here.s0) @ here.s_basis])
        assert torch.allclose(here.g0 + here.g_basis @ point, own.slopes[k][-1, spaces.live] / unit, atol=1e-8)
        assert torch.allclose(here.y0 + here.y_basis @ point, own.outputs[k][-1, spaces.live], atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "norm"), CASES[1:])
def test_known_directions_hold_every_gradient(kind, norm, seed):
    _, view, own, _ = opened(norm, seed)
    for k, found in enumerate(view.norms):
        span = torch.linalg.qr(columns(found, view.network.factors(k), view.network.affine(k)))[0]
        g = found.scale * own.slopes[k]
        assert torch.allclose(g @ span @ span.mT, g, atol=1e-12 * float(g.norm()))
        assert span.shape[1] == 2 * B + (kind == "layer")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("kind", "norm"), CASES)
@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-7])
def test_bounds_hold(kind, norm, size, seed):
    """Inputs that solve a gradient with noise on it are no further off than the bound of that noise says."""
    case, view, own, _ = opened(norm, seed)
    network, generator = view.network, torch.Generator().manual_seed(seed)
    first = network.weight_gradients[0]
    noise = size * first.square().mean().sqrt() * torch.randn(first.shape, generator=generator, dtype=torch.float64)
    spoilt = replace_gradient(view, first + noise)
    inputs = replay.solve_inputs(spoilt, 0, own.deltas[0])
    truth = case.inputs - case.inputs.mean(0) if kind == "batch" else case.inputs
    off = (inputs - truth).norm(dim=1) / truth.norm(dim=1)
    lows = [network.factors(k) for k in range(len(view.norms))]
    if kind == "batch":
        known = [statistics.from_buffers(n, 2.0**-52, B) for n in view.norms]
        bound = difference_bounds(view, own, lows, known, size)
    else:
        bound = sample_bounds(view, own, lows, size)
    assert bool(bound.isfinite().all())
    assert bool((off <= bound).all())


@pytest.mark.parametrize(("kind", "norm"), CASES[1:])
def test_a_sample_without_gradient_bounds_nothing(kind, norm):
    """Were no unit to pass one sample on, its g were zero: no theorem, and no exception."""
    _, view, own, _ = opened(norm, 0)
    last = own.slopes[-1].clone()
    last[0] = 0
    lows = [view.network.factors(k) for k in range(len(view.norms))]
    bound = sample_bounds(view, replace(own, slopes=(*own.slopes[:-1], last)), lows, 1e-15)
    assert bool(bound.isinf().all())


def replace_gradient(view, first):
    gradients = (first, *view.network.weight_gradients[1:])
    return replace(view, network=replace(view.network, weight_gradients=gradients))
