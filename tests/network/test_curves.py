"""Activations other than ReLU: curves at the last hidden layer, whole batches, and what certifies them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from spear import federated, metrics, models
from spear.inversion import attack
from spear.network.curved_bounds import curved_bounds, levers
from spear.network.curves.layer import Curves, Known, Layer
from spear.network.curves.normal import Normal, Taken
from spear.network.curves.reflections import freed, nearest, reflect
from spear.network.curves.search import CurveSearch
from spear.network.curves.together import Coupling
from spear.network.derivatives import Derivatives
from spear.network.newton import correct
from spear.network.problem import NetworkView, Targets, open_network, passes
from spear.reconstruction import Refusal

CURVED = [nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.Hardswish]
FLAT = [nn.LeakyReLU, nn.PReLU, nn.ReLU6]


class Quick(nn.Module):
    """GELU as some models write it."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Steep(nn.LeakyReLU):
    """Slopes that are not far apart."""

    def __init__(self) -> None:
        super().__init__(0.3)


def batch(size: int, n: int = 60, classes: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = Generator().manual_seed(seed)
    x = torch.randn(size, n, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (size,), generator=generator)


def network(activations: list, n: int = 60, m: int = 150, classes: int = 10, seed: int = 0, bias: bool = True):
    torch.manual_seed(seed)
    sizes = [n, *[m] * len(activations), classes]
    layers = [nn.Flatten()]
    for k, activation in enumerate(activations):
        layers += [nn.Linear(sizes[k], sizes[k + 1], bias=bias), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], classes)).double()


def view(model: nn.Module, x, y, **options) -> NetworkView:
    return open_network(model, federated.gradient(model, x, y, **options), batch_size=len(x))


@pytest.mark.parametrize("activation", CURVED)
def test_a_sample_is_a_point_of_the_curve(activation):
    x, y = batch(12)
    problem = view(network([activation]), x, y)
    layer = Layer.of(problem, problem.factors(0))
    curves = Curves.of(problem, layer)
    z = problem.apply(0, x)
    at = curves.at(curves.coordinates_of(z), y)
    assert float(at.sine.max()) < 1e-12
    torch.testing.assert_close(at.z, z)
    torch.testing.assert_close(curves.samples(at.w) @ layer.lift.T, z)
    torch.testing.assert_close(curves.coordinates_of(layer.pre_activations(curves.samples(at.w))), at.w)
    known = Known(curves.samples(at.w), at.unit @ layer.basis, y)
    weight = layer.weight(known) / (at.size[:, 0] * problem.unit(12))
    torch.testing.assert_close(weight, torch.ones_like(weight))
    rest = layer.without(known[torch.arange(5)])
    assert rest.samples == 7
    curves = Curves.of(problem, rest)
    assert float(curves.at(curves.coordinates_of(z[5:]), y[5:]).sine.max()) < 1e-10
    assert float(curves.at(curves.coordinates_of(z[:5]), y[:5]).sine.min()) > 1e-3


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh])
def test_derivatives_along_the_curve(activation, loss):
    x, y = batch(8)
    problem = view(network([activation]), x, y, loss=loss)
    curves = Curves.of(problem, Layer.of(problem, problem.factors(0)))
    generator = Generator().manual_seed(1)
    w, v = torch.randn(2, 5, curves.frame.shape[1], generator=generator, dtype=torch.float64)
    u = torch.randn(5, 150, generator=generator, dtype=torch.float64)
    u = u - (u @ curves.basis) @ curves.basis.T
    at, step = curves.at(w, y[:5]), 1e-6
    slope = (curves.at(w + step * v, y[:5]).rest - curves.at(w - step * v, y[:5]).rest) / (2 * step)
    torch.testing.assert_close(curves.forth(at, v), slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((curves.forth(at, v) * u).sum(1), (v * curves.back(at, u)).sum(1))


@pytest.mark.parametrize("kind", ["layer", "rms", "taken"])
@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh])
def test_derivatives_beside_a_normalisation(activation, kind):
    x, y = batch(8)
    problem = view(network([activation]), x, y)
    generator = Generator().manual_seed(1)
    scale, shift, a, b = torch.randn(4, 150, generator=generator, dtype=torch.float64)
    taken = Taken(torch.stack([a, b]), torch.stack([shift, b]))
    normal = Normal("rms" if kind == "rms" else "layer", 1 + 0.3 * scale, 0.3 * shift, 1e-5)
    parts = {"taken": taken} if kind == "taken" else {"normal": normal}
    curves = Curves.of(problem, Layer.of(problem, problem.factors(0), **parts))
    w, v = torch.randn(2, 5, curves.frame.shape[1], generator=generator, dtype=torch.float64)
    u = torch.randn(5, 150, generator=generator, dtype=torch.float64)
    u = u - (u @ curves.basis) @ curves.basis.T
    at, step = curves.at(w, y[:5]), 1e-6
    slope = (curves.at(w + step * v, y[:5]).rest - curves.at(w - step * v, y[:5]).rest) / (2 * step)
    torch.testing.assert_close(curves.forth(at, v), slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close((curves.forth(at, v) * u).sum(1), (v * curves.back(at, u)).sum(1))
    along = torch.einsum("kqm,kq->km", curves.matrix(at), v)
    torch.testing.assert_close(along, curves.forth(at, v))


@pytest.mark.parametrize("activation", [nn.SELU, nn.Hardswish, nn.Hardtanh])
def test_nearest_point_of_the_pieces(activation):
    x, y = batch(4)
    phi = view(network([activation]), x, y).activations[0]
    u, z, h = torch.randn(3, 6, 150, generator=Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.full((6, 1), 0.7, dtype=torch.float64)
    point = nearest(phi, u, 3 * z, h, weight)
    torch.testing.assert_close(point.u, h * phi.slope(point.z))
    assert torch.equal(point.piece, phi.piece(point.z))
    cost = (u - point.u) ** 2 + weight * (3 * z - point.z) ** 2
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    slope = phi.slope(grid.repeat(1, 150))[:, :1]
    every = (u.flatten() - h.flatten() * slope) ** 2 + 0.7 * (3 * z.flatten() - grid) ** 2
    near = cost < every.amin(0).reshape(6, 150) + 1e-2
    assert float(near.double().mean()) > 0.9  # three steps of Newton's do not reach all


def run(model, x, y, **options):
    update = federated.gradient(model, x, y)
    result = attack(model, update, method="network", time_limit=300, **{"batch_size": len(x)} | options)
    return result, metrics.evaluate(result, x, y)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("activation", [*CURVED, *FLAT, Quick, Steep])
def test_whole_batches(activation, seed):
    x, y = batch(16, seed=seed)
    result, report = run(network([activation], seed=seed), x, y, seed=seed)
    assert report.recall == report.label_accuracy == 1
    assert result.complete
    assert bool(result.certified.all())
    error = (result.inputs[:, None] - x).norm(dim=2).amin(1) / result.inputs.norm(dim=1)
    assert bool((error <= result.error_bound).all())


@pytest.mark.parametrize(
    "activations",
    [[nn.GELU, nn.GELU], [nn.SiLU, nn.Tanh, nn.GELU], [nn.ReLU, nn.GELU], [nn.GELU, nn.ReLU], [nn.ReLU6, nn.LeakyReLU]],
)
def test_several_hidden_layers_of_any_kind(activations):
    x, y = batch(12)
    result, report = run(network(activations), x, y)
    assert report.recall == report.label_accuracy == 1
    assert bool(result.certified.all())


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_other_losses(loss):
    x, y = batch(10)
    model = network([nn.GELU])
    update = federated.gradient(model, x, y, loss=loss)
    result = attack(model, update, method="network", batch_size=10, time_limit=300)
    report = metrics.evaluate(result, x, y)
    assert report.recall == report.label_accuracy == 1


def test_slopes_of_channels_that_were_learnt():
    model = network([lambda: nn.PReLU(150)])
    generator = Generator().manual_seed(3)
    model[2].weight.data.uniform_(-0.2, 0.7, generator=generator)
    x, y = batch(16)
    result, report = run(model, x, y)
    assert report.recall == 1
    assert bool(result.certified.all())


@pytest.mark.parametrize("activation", [nn.GELU, nn.LeakyReLU])
def test_single_precision(activation):
    x, y = batch(10)
    model = network([activation]).float()
    update = federated.gradient(model, x.float(), y)
    result = attack(model, update, method="network", batch_size=10, time_limit=300)
    error = (result.inputs.double()[:, None] - x).norm(dim=2).amin(0) / x.norm(dim=1)
    assert float(error.max()) < 1e-3
    assert bool(result.certified.all())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.ELU])
def test_bounds_hold_for_gradients_with_noise(activation, depth):
    """The derivative of the whole pass, and the error that a noisy gradient's batch really has."""
    x, y = batch(9)
    model = network([activation] * depth, m=80)
    problem = view(model, x, y)
    targets = Targets(F.one_hot(y, 10).double(), problem.unit(9), 0.0)
    run_ = passes(problem, x, targets)
    v = torch.randn(9, 60, generator=Generator().manual_seed(4), dtype=torch.float64)
    step = 1e-6
    change = [passes(problem, x + side * step * v, targets).deltas[0] for side in (1, -1)]
    dz = (v @ problem.weights[0].T)[:, None]
    along = Derivatives.of(problem, run_, targets).along(dz, torch.arange(9))[:, 0]
    torch.testing.assert_close(along, (change[0] - change[1]) / (2 * step), rtol=1e-5, atol=1e-9)

    moved = x + 1e-7 * v  # a batch that explains its own gradient, held against this one
    bound = curved_bounds(problem, passes(problem, moved, targets), targets)
    assert bool(((moved - x).norm(dim=1) / x.norm(dim=1) <= bound).all())
    assert float(curved_bounds(problem, run_, targets).max()) < 1e-9


def test_samples_that_fit_as_well_are_noticed():
    x, y = batch(12)
    problem = view(network([nn.GELU]), x, y)
    whole = Layer.of(problem, problem.factors(0))
    run_ = CurveSearch(problem, whole, Generator().manual_seed(0))
    while run_.left:
        run_.round()
    assert CurveSearch(problem, whole, Generator().manual_seed(1)).strangers(run_.known) == 0
    half = run_.known[torch.arange(6)]
    assert CurveSearch(problem, whole, Generator().manual_seed(1)).strangers(half) > 0
    turned = Known(run_.known.s, run_.known.t, (run_.known.labels + 1) % 10)
    assert CurveSearch(problem, whole, Generator().manual_seed(1)).strangers(turned) > 0


@pytest.mark.parametrize("activations", [[nn.GELU], [nn.Softplus], [nn.Tanh, nn.ReLU], [nn.ReLU, nn.SiLU]])
def test_newton_makes_a_nearly_right_batch_exact(activations):
    x, y = batch(9)
    problem = view(network(activations, m=80), x, y)
    targets = Targets(F.one_hot(y, 10).double(), problem.unit(9), 0.0)
    inside = torch.randn(9, 9, generator=Generator().manual_seed(5), dtype=torch.float64) @ x
    found, levers = correct(problem, x + 1e-5 * inside, targets)
    assert float((found - x).norm(dim=1).max()) < 1e-9
    bounds = [curved_bounds(problem, passes(problem, found, targets), targets, known) for known in (levers, None)]
    torch.testing.assert_close(*bounds, rtol=1e-2, atol=0)


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.Softplus, nn.LeakyReLU])
@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-6, 1e-4, 1e-2])
def test_near_copies_are_never_certified_wrongly(activation, distance):
    x, y = batch(8)
    y[1] = y[0]
    x[1] = x[0] + distance * x[1]
    result, _ = run(network([activation]), x, y)
    error = (result.inputs[:, None] - x).norm(dim=2).amin(1) / result.inputs.norm(dim=1)
    assert bool((error[result.certified] <= result.error_bound[result.certified].clamp_max(1e-6)).all())
    if distance < 1e-8:
        assert not bool(result.certified.any())


@pytest.mark.parametrize("activation", [nn.GELU, nn.LeakyReLU])
def test_nothing_is_certified_of_an_undisclosed_size(activation):
    x, y = batch(8)
    model = network([activation])
    update = federated.gradient(model, x, y)
    update = federated.SharedUpdate(update.gradients)
    result = attack(model, update, method="network", time_limit=300)
    assert metrics.evaluate(result, x, y).recall == 1
    assert not bool(result.certified.any())


def test_odd_activation_of_a_layer_without_bias_is_refused():
    """tanh without biases: x with one label and -x with the other leave the same gradient."""
    model = network([nn.Tanh], classes=2, bias=False)
    x, y = batch(6, classes=2)
    first, second = (federated.gradient(model, s * x, c).gradients["1.weight"] for s, c in ((1, y), (-1, 1 - y)))
    model[3].bias.data.zero_()
    first, second = (federated.gradient(model, s * x, c).gradients["1.weight"] for s, c in ((1, y), (-1, 1 - y)))
    torch.testing.assert_close(first, second)
    with pytest.raises(Refusal, match="no bias"):
        attack(model, federated.gradient(model, x, y), method="network")


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh])
def test_derivatives_of_samples_together(activation):
    """The coupling vanishes at the batch; its derivative is that of differences, and `back` is its transpose."""
    x, y = batch(8)
    problem = view(network([activation]), x, y)
    layer = Layer.of(problem, problem.factors(0))
    curves = Curves.of(problem, layer)
    coupling = Coupling.of(curves, layer, problem.unit(8))
    truth = curves.coordinates_of(problem.apply(0, x))
    assert coupling.at(truth, y).cost < 1e-20
    assert coupling.at(truth, y.roll(1)).cost > 1e-3
    generator = Generator().manual_seed(1)
    w, v = torch.randn(2, 5, truth.shape[1], generator=generator, dtype=torch.float64)
    rest, across = torch.randn(5, 150, generator=generator, dtype=torch.float64), torch.randn(5, 5).double()
    rest = rest - (rest @ curves.basis) @ curves.basis.T
    at, step = coupling.at(w, y[:5]), 1e-6
    ends = [coupling.at(w + side * step * v, y[:5]) for side in (1, -1)]
    moved, turned = coupling.forth(at, v)
    torch.testing.assert_close(moved, (ends[0].points.rest - ends[1].points.rest) / (2 * step), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(turned, (ends[0].across - ends[1].across) / (2 * step), rtol=1e-6, atol=1e-5)
    product = (moved * rest).sum() + (turned * across).sum()
    torch.testing.assert_close(product, (v * coupling.back(at, rest, across)).sum())


@pytest.mark.parametrize(("activation", "seed"), [(nn.GELU, 0), (nn.SiLU, 1)])
def test_a_batch_past_half_the_width_is_found_together(activation, seed):
    """25 equations for 26 unknowns of a sample alone: whole, and not certified."""
    x, y = batch(27, n=50, seed=seed)
    result, report = run(network([activation], n=50, m=52, seed=seed), x, y, seed=seed)
    assert report.recall == report.label_accuracy == 1
    assert not bool(result.certified.any())
    assert "past half the width" in result.reason


def test_a_batch_near_the_width_is_refused():
    x, y = batch(84, n=100)
    model = network([nn.GELU], n=100, m=90)
    with pytest.raises(Refusal, match="90 equations for 83 unknowns"):
        attack(model, federated.gradient(model, x, y), method="network", batch_size=84)


def test_saturated_units_leave_an_input_undetermined():
    """Where tanh has no slope left, inputs move freely: no certificate may say otherwise."""
    model = network([nn.Tanh])
    model[1].weight.data *= 60
    x, y = batch(8)
    result, _ = run(model, x, y)
    error = (result.inputs[:, None] - x).norm(dim=2).amin(1) / result.inputs.norm(dim=1)
    assert bool((error[result.certified] < 1e-6).all())


def test_slopes_that_do_not_tell_the_sign():
    """Hardtanh's slope is 0 on both sides: pieces are told apart by u and z together."""
    model = network([nn.Hardtanh])
    x, y = batch(8)
    result, report = run(model, 2 * x, y)
    assert report.recall == report.label_accuracy == 1
    assert bool(result.certified.all())


def test_time_limit_is_kept():
    import time

    x, y = batch(60, n=80)
    model = network([nn.SELU], n=80, m=150)
    begin = time.process_time()
    result = attack(model, federated.gradient(model, x, y), method="network", batch_size=60, time_limit=1.0)
    assert time.process_time() - begin < 3.5
    assert not bool(result.certified.any()) or result.complete


def test_models_of_the_catalogue_take_any_activation():
    model = models.fcnn((4, 15), 150, 2, 10, activation=nn.SiLU)
    x, y = batch(8)
    result, report = run(model, x.reshape(8, 4, 15), y)
    assert report.recall == 1
    assert result.inputs.shape == (8, 4, 15)


def test_a_clock_that_has_run_out_ends_reflections_after_one_step():
    problem = view(network([nn.GELU], m=40), *batch(4))
    curves = Curves.of(problem, Layer.of(problem, problem.factors(0)))
    starts = torch.randn(3, curves.frame.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w, pieces = reflect(curves, starts, torch.tensor([0, 1, 2]), steps=50, until=0.0)
    assert w.shape == starts.shape
    assert len(pieces) == 3


def test_outputs_that_no_unit_tells_are_freed_to_nothing():
    """Where every slope is zero, any gradient at the outputs gives none at the units."""
    problem = view(network([nn.ReLU6], m=40), *batch(4))
    curves = Curves.of(problem, Layer.of(problem, problem.factors(0)))
    w = torch.randn(2, curves.frame.shape[1], generator=Generator().manual_seed(0), dtype=torch.float64)
    at = curves.at(w, torch.tensor([0, 1]))
    dead = replace(at, slope=torch.zeros_like(at.slope))
    free = torch.eye(10, dtype=torch.float64)[:, :3]
    taken = Taken(torch.zeros(2, 40, dtype=torch.float64), torch.zeros(2, 40, dtype=torch.float64))
    assert not bool(freed(replace(curves, taken=taken), dead, free).any())


def test_rows_that_depend_on_each_other_have_no_inverse_norm():
    rows = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1, 2] = 2 * rows[1, 0]
    rows[3] = 0
    found = levers(rows @ rows.mT, torch.ones(4, 2, 6, dtype=torch.float64)).inverse
    expected = torch.linalg.pinv(rows).norm(dim=(1, 2))
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert bool(found[[1, 3]].isinf().all())
