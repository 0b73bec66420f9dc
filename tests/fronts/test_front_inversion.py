"""Inputs behind convolutions, from the features that a fully connected head gives away."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spear
from spear import data, federated
from spear.federated.update import SharedUpdate
from spear.fronts.check import SOLVED, determined
from spear.fronts.descent import Cost, Descent
from spear.fronts.least_squares import Linearised, residual
from spear.fronts.problem import FrontProblem, without_last_relu
from spear.fronts.softened import SoftMaxPool, Softness, SoftReLU, measured, softened
from spear.fronts.spectrum import Spectrum
from spear.fronts.steps import folding
from spear.models.fronts import cut

CLASSES, WIDTH = 5, 60


class Residual(nn.Module):
    """A block with a branch around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(torch.relu(self.first(x)))))


def strided() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())


def stack() -> nn.Module:
    second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), second, nn.ReLU(), nn.Flatten())


def averaged() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())


def residual_block() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(first, Residual(16), nn.AdaptiveAvgPool2d(4), nn.Flatten())


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())


def narrow() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())


def blind() -> nn.Module:
    """Many features, none of which sees the last column."""
    return nn.Sequential(nn.Conv2d(1, 40, 3, stride=2), nn.ReLU(), nn.Flatten())


FRONTS = (strided, stack, averaged, residual_block)


def with_head(front: Callable[[], nn.Module], seed: int, side: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = front().eval()
        for norm in (part for part in made.modules() if isinstance(part, nn.BatchNorm2d)):
            for values in (norm.running_mean, norm.bias.data):
                values.normal_(0, 0.1)
            for values in (norm.running_var, norm.weight.data):
                values.uniform_(0.7, 1.4)
        with torch.no_grad():
            n = made(torch.zeros(1, 1, side, side)).shape[1]
        return nn.Sequential(made, nn.Linear(n, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)).double().eval()


def batch(seed: int, size: int = 4, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    x = torch.randn(size, 1, side, side, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def apart(found: Tensor, truth: Tensor) -> Tensor:
    """The relative distance of each true sample to the nearest found one."""
    distance = torch.cdist(truth.flatten(1), found.flatten(1)).amin(1)
    return distance / torch.linalg.vector_norm(truth.flatten(1), dim=1)


def problem_of(model: nn.Module, x: Tensor, y: Tensor) -> FrontProblem:
    parts = cut(model, tuple(x.shape[1:]))
    front, floored = without_last_relu(copy.deepcopy(parts.front), tuple(x.shape[1:]))
    features = parts.front(x).detach().requires_grad_()
    slopes = torch.autograd.grad(F.cross_entropy(parts.head(features), y), features)[0]
    gradients = parts.of_front(federated.gradient(model, x, y).gradients)
    return FrontProblem(front, Softness(), floored, tuple(x.shape[1:]), features.detach(), slopes, gradients, 1e-9)


@pytest.mark.parametrize(("front", "seed"), [(front, k) for k, front in enumerate(FRONTS)])
def test_every_input_comes_back(front: Callable[[], nn.Module], seed: int) -> None:
    model, (x, y) = with_head(front, seed), batch(seed)
    result = spear.attack(model, federated.gradient(model, x, y), seed=seed)
    assert result.complete
    assert bool(result.certified.all())
    assert not result.features_of
    assert bool((apart(result.inputs, x) <= result.error_bound.max()).all())
    assert float(result.error_bound.max()) < 1e-6
    nearest = torch.cdist(x.flatten(1), result.inputs.flatten(1)).argmin(1)
    assert torch.equal(result.labels[nearest], y)


def test_behind_a_max_pool() -> None:
    x, y = data.load("digits", count=3, seed=0)
    model = with_head(pooled, 0)
    result = spear.attack(model, federated.gradient(model, x, y % CLASSES))
    assert result.complete
    assert float(apart(result.inputs, x).max()) < 1e-9


def test_single_precision() -> None:
    """The front amplifies the rounding of features: the bound says by how much, and nothing beyond is certified."""
    model, (x, y) = with_head(strided, 0).float(), batch(0)
    result = spear.attack(model, federated.gradient(model, x.float(), y))
    assert not result.features_of
    nearest = torch.cdist(x.flatten(1), result.inputs.double().flatten(1)).argmin(1)
    assert bool((apart(result.inputs.double(), x) <= result.error_bound[nearest]).all())
    assert torch.equal(result.certified, result.error_bound <= result.limit)


@pytest.mark.parametrize("seed", range(3))
def test_too_few_equations(seed: int) -> None:
    """Features are exact; what they do not tell is counted, and no image is made up."""
    model, (x, y) = with_head(narrow, seed), batch(seed)
    result = spear.attack(model, federated.gradient(model, x, y))
    assert result.features_of == "1"
    assert not result.complete
    assert "numbers are missing" in result.reason
    assert bool(result.certified.all())
    assert float(apart(result.inputs, model[0](x).detach()).max()) < 1e-9


def padded() -> nn.Module:
    return nn.Sequential(nn.ZeroPad2d(1), nn.Flatten())


def averages() -> nn.Module:
    """More of them than entries, and no weights."""
    return nn.Sequential(nn.AvgPool2d(2, stride=1, padding=1), nn.Flatten())


@pytest.mark.parametrize("front", [padded, averages])
def test_affine_fronts_need_no_more_equations_than_unknowns(front: Callable[[], nn.Module]) -> None:
    model, (x, y) = with_head(front, 0), batch(3)
    result = spear.attack(model, federated.gradient(model, x, y), seed=0)
    assert result.complete
    assert not result.features_of
    assert apart(result.inputs, x).max() < 1e-6


def cut_off() -> nn.Module:
    return nn.Sequential(nn.Hardtanh(-50, 50), nn.Flatten())


@pytest.mark.parametrize(
    ("front", "size", "affine"), [(padded, 1.0, True), (cut_off, 1.0, True), (cut_off, 40.0, False)]
)
def test_what_is_affine_is_tried_at_the_size_of_the_inputs(front: Callable, size: float, affine: bool) -> None:
    assert problem_of(with_head(front, 0), *batch(0)).is_affine(size) == affine


def test_indices_are_no_real_numbers() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(20, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    model = nn.Sequential(nn.Embedding(30, 5), nn.Flatten(), *head).double()
    words, names = torch.randint(30, (3, 4)), [name for name, _ in model.named_parameters()]
    loss = F.cross_entropy(model(words), torch.tensor([0, 1, 2]))
    gradients = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    result = spear.attack(model, SharedUpdate(gradients, count=3, input_shape=(4,)), seed=0)
    assert (result.features_of, result.complete) == ("2", False)
    assert "does not take real numbers" in result.reason
    assert apart(result.inputs, model[:2](words).detach()).max() < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_what_no_feature_sees_is_not_certified(seed: int) -> None:
    model, (x, y) = with_head(blind, seed), batch(seed)
    result = spear.attack(model, federated.gradient(model, x, y), time_limit=20)
    assert not result.complete
    assert result.features_of or not bool(result.certified.any())


@pytest.mark.parametrize("front", [strided, residual_block])
def test_a_gradient_that_is_not_the_batch_s(front: Callable[[], nn.Module]) -> None:
    """The head's gradient is sound, the front's is not: the inputs fit their features, and are not certified."""
    model, (x, y) = with_head(front, 0), batch(0)
    update = federated.gradient(model, x, y)
    name = next(iter(update.gradients))
    update.gradients[name] *= 1 + 1e-4
    result = spear.attack(model, update)
    assert not bool(result.certified.any())
    assert not result.complete
    assert "reproduces the front's gradients" in result.reason


def test_the_count_must_be_disclosed() -> None:
    model, (x, y) = with_head(strided, 0), batch(0)
    told = federated.gradient(model, x, y)
    update = SharedUpdate(told.gradients, input_shape=told.input_shape)
    result = spear.attack(model, update)
    assert not bool(result.certified.any())
    assert float(apart(result.inputs, x).max()) < 1e-6


def test_without_a_shape_there_are_features() -> None:
    model, (x, y) = with_head(strided, 0), batch(0)
    update = SharedUpdate(federated.gradient(model, x, y).gradients, count=len(x))
    result = spear.attack(model, update)
    assert result.features_of == "1"
    assert "shape" in result.reason
    assert float(apart(result.inputs, model[0](x).detach()).max()) < 1e-9


def test_batch_statistics_leave_features() -> None:
    """Batch normalisation in training mode before the head mixes the samples: what enters the head is exact."""
    model, (x, y) = with_head(residual_block, 0), batch(0)
    model[0].train()
    features = model[0](x).detach()
    loss = F.cross_entropy(model(x), y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    result = spear.attack(model, SharedUpdate(gradients, count=len(x), input_shape=tuple(x.shape[1:])))
    assert result.features_of == "1"
    assert "batch normalisation" in result.reason
    assert float(apart(result.inputs, features).max()) < 1e-9


def test_one_layer_is_enough() -> None:
    """The head's first layer alone leads to the inputs as well; named, it gives its own."""
    model, (x, y) = with_head(strided, 0), batch(0)
    result = spear.attack(model, federated.gradient(model, x, y), method="layer", time_limit=30)
    assert result.complete
    assert float(apart(result.inputs, x).max()) < 1e-9
    named = spear.attack(model, federated.gradient(model, x, y), method="layer", layer="1", time_limit=30)
    assert named.features_of == "1"
    assert float(apart(named.inputs, model[0](x).detach()).max()) < 1e-9


@pytest.mark.parametrize("shape", [(3, 8, 6), (1, 5, 5), (2, 9), (7,)])
def test_spectra_are_coordinates(shape: tuple[int, ...]) -> None:
    x, y = (torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(2))
    spectrum = Spectrum.of(shape, torch.tensor([1.5, 0, 0.3], dtype=torch.float64))
    torch.testing.assert_close(spectrum.inputs(spectrum.coordinates(x)), x)
    torch.testing.assert_close((spectrum.inputs(x) * y).sum(), (x * spectrum.adjoint(y)).sum())
    torch.testing.assert_close(spectrum.inputs(x)[1].norm(), x[1].norm())  # without decay they are orthonormal


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("front", [*FRONTS, pooled])
def test_derivatives(front: Callable[[], nn.Module], joint: bool) -> None:
    """The transpose is one, and the derivative is that of the residual within one piece of the front."""
    model, (x, y) = with_head(front, 1), batch(1)
    problem = problem_of(model, x, y)
    v, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1e-7
    at = x + 0.01 * v.flip(0)
    here = Linearised(problem, at, joint)
    made = here.times(v)
    u = [torch.randn(one.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) for one in made]
    torch.testing.assert_close(sum((a * b).sum() for a, b in zip(made, u, strict=True)), (here.transposed(u) * v).sum())
    there = residual(problem, at + step * v, joint)
    torch.testing.assert_close((there.features - here.residual.features) / step, made[0], rtol=1e-4, atol=1e-6)
    for a, b, c in zip(there.gradients, here.residual.gradients, made[1:], strict=True):
        torch.testing.assert_close((a - b) / step, c, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("front", [*FRONTS, pooled, narrow])
def test_the_truth_leaves_nothing(front: Callable[[], nn.Module]) -> None:
    model, (x, y) = with_head(front, 2), batch(2)
    found = residual(problem_of(model, x, y), x, joint=True)
    assert float(found.samples.max()) < 1e-13
    assert found.parameters < 1e-12


@pytest.mark.parametrize(("front", "told"), [(strided, True), (averaged, True), (blind, False), (narrow, False)])
def test_rank(front: Callable[[], nn.Module], told: bool) -> None:
    """The test of rank agrees with the singular values of the whole Jacobian."""
    model, (x, y) = with_head(front, 3), batch(3)
    problem = problem_of(model, x, y)
    found = determined(problem, x, False, torch.Generator().manual_seed(0), float("inf"))
    for k in range(len(x)):
        J = torch.autograd.functional.jacobian(lambda one: problem.front(one[None])[0], x[k]).flatten(1)
        own = torch.linalg.svdvals(J[problem.positive[k]] / torch.linalg.vector_norm(problem.features[k]))
        full = len(own) == x[k].numel() and bool(own[-1] > 1e-9 * own[0])
        assert full == told == bool(found.solved[k] <= SOLVED)
        if told:
            assert float(found.least[k]) < float(own[-1])


@pytest.mark.parametrize("front", [stack, pooled])
def test_a_cold_front_is_sharp(front: Callable[[], nn.Module]) -> None:
    model, (x, y) = with_head(front, 4), batch(4)
    own = problem_of(model, x, y).front
    soft, softness = softened(own)
    assert torch.equal(soft(x), own(x))
    measured(soft, softness, x)
    differences = []
    for t in (1.0, 0.1, 0.01):
        softness.temperature = torch.full((len(x),), t, dtype=torch.float64)
        differences.append(float((soft(x) - own(x)).detach().norm()))
    assert differences == sorted(differences, reverse=True)
    assert 0 < differences[-1] < 0.02 * differences[0]


def test_temperatures_are_each_sample_s() -> None:
    model, (x, y) = with_head(pooled, 4), batch(4)
    soft, softness = softened(problem_of(model, x, y).front)
    t = torch.tensor([0.5, 0.1, 0.02, 0.3], dtype=torch.float64)
    measured(soft, softness, x)
    softness.temperature = t
    together = soft(x)
    for k in range(len(x)):
        measured(soft, softness, x[k : k + 1])
        softness.temperature = t[k : k + 1]
        torch.testing.assert_close(soft(x[k : k + 1])[0], together[k])


def test_rows_that_are_no_samples() -> None:
    softness = Softness()
    made = SoftReLU(softness)
    z = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured(made, softness, z)
    softness.temperature = torch.full((3,), 1e-6, dtype=torch.float64)
    torch.testing.assert_close(made(z), z.relu(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3), 1)])
def test_soft_pools_have_their_pool_s_windows(pool: nn.MaxPool2d) -> None:
    z = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    softness = Softness()
    made = SoftMaxPool(pool, softness)
    measured(made, softness, z)
    softness.temperature = torch.full((2,), 1e-4, dtype=torch.float64)
    torch.testing.assert_close(made(z), pool(z), rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_descent_solves_squares_each_sample_by_itself(seed: int) -> None:
    """Convex squares of several conditions: all reach zero, and one alone goes the way it goes among others."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(3, 12, 8, dtype=torch.float64, generator=generator) * torch.logspace(0, -1, 8, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, generator=generator)

    def cost(A: Tensor, x: Tensor) -> Cost:
        def of(c: Tensor) -> tuple[Tensor, Tensor]:
            r = torch.einsum("kij,kj->ki", A, c - x)
            return r.square().sum(1), 2 * torch.einsum("kij,ki->kj", A, r)

        return of

    together = Descent(cost(A, x), torch.zeros_like(x)).run(80, math.inf)
    torch.testing.assert_close(together, x, rtol=0, atol=1e-5)
    for k in range(3):
        alone = Descent(cost(A[k : k + 1], x[k : k + 1]), torch.zeros_like(x[:1])).run(10, math.inf)
        among = Descent(cost(A, x), torch.zeros_like(x)).run(10, math.inf)
        torch.testing.assert_close(alone[0], among[k])


class Mapped(nn.Module):
    """A convolution of what `map` makes of the pixels."""

    def __init__(self, map: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.map, self.after, self.first = map, after, nn.Conv2d(1, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.first(self.map(x))).flatten(1)


def magnitudes(x: Tensor) -> Tensor:
    return torch.fft.fft2(x).abs()


FOLDS = {"squares": torch.square, "products": lambda x: x * x, "sizes": torch.abs, "GELU": F.gelu, "cosines": torch.cos}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FOLDS)
def test_pixels_that_could_be_mirrored_are_not_certified(name: str, seed: int) -> None:
    """Each pixel of either sign, or of either side of a minimum, gives the same features and gradients."""
    model, (x, y) = with_head(lambda: Mapped(FOLDS[name]), seed), batch(seed, size=3)
    result = spear.attack(model, federated.gradient(model, x, y), seed=seed)
    assert not bool(result.certified.any()) or result.features_of
    assert not result.complete
    if "each input from its features" in result.reason:
        assert "can give the same for inputs that are mirrored" in result.reason or "do not determine" in result.reason


def summed(pool: Callable[[], nn.Module]) -> nn.Module:
    """Every pixel by itself, and then all of them."""
    return nn.Sequential(nn.Conv2d(1, 120, 1), nn.ReLU(), pool(), nn.Flatten())


@pytest.mark.parametrize("seed", range(2))
def test_pixels_in_another_order_are_not_certified(seed: int) -> None:
    model = with_head(lambda: summed(lambda: nn.AdaptiveAvgPool2d(1)), seed, side=4)
    x, y = batch(seed, size=3, side=4)
    result = spear.attack(model, federated.gradient(model, x, y), seed=seed, time_limit=20)
    assert not bool(result.certified.any()) or result.features_of
    assert not result.complete


@pytest.mark.parametrize(
    ("made", "folds"),
    [
        (lambda: summed(lambda: nn.AdaptiveAvgPool2d(1)), True),
        (lambda: summed(lambda: nn.AdaptiveAvgPool2d((1, 8))), True),
        (lambda: summed(nn.Identity), False),
        (lambda: Mapped(lambda x: x.flatten(1).sort(1)[0].view_as(x)), True),
        *((lambda fold=fold: Mapped(fold), True) for fold in (*FOLDS.values(), magnitudes)),
        *((lambda after=after: Mapped(lambda x: (x - 0.1) / 2, after), False) for after in (F.relu, F.gelu, F.silu)),
        *(
            (lambda after=after: Mapped(nn.Identity(), after), False)
            for after in (torch.tanh, F.softplus, F.leaky_relu)
        ),
        (lambda: Mapped(nn.Identity(), torch.abs), True),
        (lambda: Mapped(nn.Identity(), lambda z: torch.cat(z.relu().chunk(2, 1), 1)), False),
        (lambda: Mapped(nn.Identity(), lambda z: z.chunk(2, 1)[0] * z.chunk(2, 1)[1]), True),
        *((front, False) for front in (*FRONTS, pooled)),
    ],
)
def test_steps_that_could_fold_are_seen(made: Callable[[], nn.Module], folds: bool) -> None:
    parts = cut(with_head(made, 0), (1, 8, 8))
    assert bool(folding(parts.front, (1, 8, 8), 2.0)) is folds
    assert bool(folding(parts.front, (1, 8, 8), 2e-3)) is folds
