"""Biases with a learning rate of their own: x is explained as x fW / fB too, where only they tell its length."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from network_problems import case
from torch import Tensor, nn

import spear
from spear import models
from spear.certificate import BY_BIASES, SAFETY, length_by_labels
from spear.federated import SharedUpdate, gradient
from spear.federated.losses import activate
from spear.metrics import evaluate
from spear.network.check import AS_MEASURED
from spear.network.error_bounds import softened
from spear.network.problem import Targets, passes

N, CLASSES = 30, 10
SINGLE, DOUBLE = torch.float32, torch.float64
METHODS = ("network", "layer", "dictionary", "sampling", "pruning")
RATES = [(0.5, 1), (1, 2)]  # of weights and biases, each in units of what was told
LOCAL = [(1, 2, 1), (2, 4, 1), (2, 4, 2)]  # samples of a mini-batch, of the client, epochs


def silent(kind: str, seed: int, dtype: torch.dtype, margin: float = 10) -> nn.Sequential:
    """A model without biases to speak of, whose softmax does not move with the length of its inputs: it is near 1 / c
    of all classes, or 1 of one."""
    model, generator = models.fcnn((N,), 80, 3, CLASSES, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
                if kind == "saturated":
                    layer.weight.normal_(0, (2 / layer.in_features) ** 0.5, generator=generator)
        model.fc3.weight.mul_({"tiny": 1e-10 if dtype == DOUBLE else 1e-5, "saturated": margin}[kind])
    return model.to(dtype)


def batch(kind: str, b: int, seed: int, model: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Gaussian inputs, or raw pixels of classes that the model does not see in them."""
    generator, dtype = torch.Generator().manual_seed(100 + seed), model.fc1.weight.dtype
    x, y = torch.randn(b, N, generator=generator, dtype=DOUBLE), torch.randint(CLASSES, (b,), generator=generator)
    if kind == "saturated":
        x = torch.randint(0, 256, (b, N), generator=generator)
        y = model(x.to(dtype)).argmin(1)
    return x.to(dtype), y


def at_rates(update: SharedUpdate, weights: float, biases: float) -> SharedUpdate:
    scaled = {name: (biases if name.endswith("bias") else weights) * g for name, g in update.gradients.items()}
    return replace(update, gradients=scaled)


def attacked(method: str, model: nn.Sequential, update: SharedUpdate, seed: int) -> spear.Reconstruction:
    if method == "pruning":
        generator = torch.Generator().manual_seed(seed)
        known = {name: torch.rand(g.shape, generator=generator) > 0.05 for name, g in update.gradients.items()}
        update, method = replace(update, known=known), "auto"
    return spear.attack(model, update, method=method, time_limit=200)


def trained(
    model: nn.Sequential, x: Tensor, y: Tensor, rates: tuple[float, float], told: float, size: int, epochs: int = 1
) -> SharedUpdate:
    """What a client sends that takes some steps, its weights and biases each at a rate of its own."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    values, order = list(parameters), list(torch.arange(len(x)).split(size)) * epochs
    for index in order:
        loss = F.cross_entropy(
            torch.func.functional_call(model, dict(zip(names, values, strict=True)), x[index]), y[index]
        )
        steps = torch.autograd.grad(loss, values)
        values = [
            (v - told * rates[name.endswith("bias")] * g).detach().requires_grad_()
            for name, v, g in zip(names, values, steps, strict=True)
        ]
    change = {name: (p - v).detach() for name, p, v in zip(names, parameters, values, strict=True)}
    said = {"local_steps": len(order), "learning_rate": told, "mini_batch": size, "input_shape": (N,)}
    return SharedUpdate(change, count=len(x), **said)


def certified(result: spear.Reconstruction, x: Tensor, y: Tensor) -> None:
    report = evaluate(result, x, y)
    assert result.complete, result.reason
    assert report.label_accuracy == 1
    assert bool((report.relative_error <= result.error_bound[report.match]).all())


def open_lengths(result: spear.Reconstruction, x: Tensor, words: str = BY_BIASES) -> None:
    """Every direction, half as long; none of them certain, which is said."""
    assert len(result.inputs) == len(x), result.reason
    assert not result.certified.any()
    assert not result.complete
    assert words in result.reason
    found = F.cosine_similarity(result.inputs[:, None].double(), x.double(), dim=2).max(1)
    assert float(found.values.min()) > 1 - 1e-6
    shorter = result.inputs.double().norm(dim=1) / x.double().norm(dim=1)[found.indices]
    torch.testing.assert_close(shorter, torch.full_like(shorter, 0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("kind", ["tiny", "saturated"])
@pytest.mark.parametrize("method", METHODS)
def test_lengths_that_only_the_biases_tell(method, kind, dtype, rates, seed):
    model = silent(kind, seed, dtype)
    x, y = batch(kind, 2 if method == "sampling" else 3, seed, model)
    result = attacked(method, model, at_rates(gradient(model, x, y), *rates), seed)
    unsure = (method, kind, dtype) == ("network", "saturated", SINGLE) and AS_MEASURED in result.reason
    open_lengths(result, x, AS_MEASURED if unsure else BY_BIASES)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("biases", "dtype"), [("usual", SINGLE), ("usual", DOUBLE), ("zero", DOUBLE)])
def test_lengths_that_the_labels_or_other_biases_tell(biases, dtype, method, seed):
    model = models.fcnn((N,), 80, 3, CLASSES, seed=seed).to(dtype)
    if biases == "zero":
        with torch.no_grad():
            for layer in (model.fc1, model.fc2, model.fc3):
                layer.bias.zero_()
    x, y = batch("usual", 2 if method == "sampling" else 3, seed, model)
    certified(attacked(method, model, gradient(model, x, y), seed), x, y)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("size", "b", "epochs"), LOCAL)
def test_local_training_on_raw_pixels(size, b, epochs, seed):
    """Steps so short that the biases stay near zero."""
    model = silent("saturated", seed, DOUBLE, margin=2)
    x, y = batch("saturated", b, seed, model)
    open_lengths(spear.attack(model, trained(model, x, y, (0.5, 1), 1e-8, size, epochs), time_limit=200), x)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("size", "b", "epochs"), LOCAL)
@pytest.mark.parametrize("biases", ["usual", "zero"])
def test_local_training_as_it_was_told(biases, size, b, epochs, seed):
    model = models.fcnn((N,), 80, 3, CLASSES, seed=seed)
    with torch.no_grad():
        for layer in (model.fc1, model.fc2, model.fc3):
            layer.bias.mul_(biases == "usual")
    x, y = batch("usual", b, seed, model)
    result = spear.attack(model, trained(model, x, y, (1, 1), 0.1, size, epochs), time_limit=200)
    assert result.method == "local training"
    certified(result, x, y)


def beside(moved: Tensor, own: Tensor) -> Tensor:
    """How far `moved` is from every multiple of `own`, row by row."""
    return (moved - (moved * own).sum(1, keepdim=True) / own.square().sum(1, keepdim=True) * own).norm(dim=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "binary_cross_entropy"])
@pytest.mark.parametrize("whole", [True, False])
def test_inputs_longer_by_that_share_have_gradients_as_far_off_as_they_may_be(whole, loss, seed):
    """By hand, with inputs that are longer; of one sample so far, of none farther."""
    made = case((20, 40, 5), 6, seed=seed, loss=loss)
    targets = Targets(F.one_hot(made.labels, 5).double(), made.problem.unit(6), 0.0)
    along, own = softened(made.problem, passes(made.problem, made.inputs, targets), targets)
    error = 1e-6 * torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    share = length_by_labels(own, along, error, whole=whole)
    errors = partial(_errors, made.problem, loss, made.labels)
    torch.testing.assert_close(own, errors(made.inputs))
    for sign in (1, -1):
        moved = errors((1 + sign * share) * made.inputs)
        off = (moved - own).norm(dim=1) if whole else beside(moved, own)
        used = off / (SAFETY * error * own.norm(dim=1))
        assert float(used.max()) == pytest.approx(1, rel=1e-3)


def _errors(problem, loss, labels, x):
    """p - e of each sample; the problem's linear layers hold biases."""
    for k, (weight, bias) in enumerate(zip(problem.weights, problem.biases, strict=True)):
        x = F.linear(x.relu() if k else x, weight, bias)
    return activate(loss, x) - F.one_hot(labels, x.shape[1])


def test_what_tells_no_length():
    own, along = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    error, nothing = torch.full((4,), 1e-9, dtype=DOUBLE), torch.zeros_like(along)
    shares = [length_by_labels(own[k, None], along[k, None], error[:1], whole=True) for k in range(4)]
    assert length_by_labels(own, along, error, whole=True) == min(shares)
    one = torch.where(torch.arange(4)[:, None] == 2, along, 0)
    assert length_by_labels(own, one, error, whole=True) == shares[2]
    assert length_by_labels(own, nothing, error, whole=True) == float("inf")
    assert length_by_labels(own, nothing, error, whole=False) == float("inf")
    assert length_by_labels(nothing, nothing, error, whole=True) == float("inf")
    assert length_by_labels(own, 3 * own, error, whole=True) < 1e-7
    assert length_by_labels(own, 3 * own, error, whole=False) > 1e3  # but for rounding, infinite
    turned = own[:, :2].flip(1) * torch.tensor([1.0, -1.0])  # at right angles
    assert length_by_labels(own[:, :2], turned + 5 * own[:, :2], error, whole=False) == pytest.approx(
        length_by_labels(own[:, :2], turned, error, whole=True)
    )
