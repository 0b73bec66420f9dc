"""Single problems that once were certified although they were wrong, or ended in a traceback. Each is one of a kind."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spear
from spear import models
from spear.federated import SharedUpdate, gradient
from spear.federated.clients import local_training

METHODS = ["network", "sampling", "layer", "guided", "dictionary", "auto"]


def batch(b: int, n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (b,), generator=generator)


def judged(model: nn.Module, update: SharedUpdate, x: Tensor, y: Tensor, **options: object) -> spear.Reconstruction:
    """The attack's result: every certified sample is in the batch, to its bound."""
    result = spear.attack(model, update, **({"max_proposals": 2000, "time_limit": 10} | options))
    report = spear.metrics.evaluate(result, x, y)
    assert report.precision == 1, result.reason
    match, there = report.match[report.match >= 0], report.match >= 0
    within = report.relative_error[there] <= result.error_bound[match]
    assert bool(within[result.certified[match]].all())
    return result


def update_of(model: nn.Module, loss: Tensor, **disclosed: object) -> SharedUpdate:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return SharedUpdate(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)), **disclosed)


@pytest.mark.parametrize(("n", "m"), [(200, 64), (60, 64)])
@pytest.mark.parametrize("method", ["network", "layer"])
def test_copies_in_the_kernel_of_the_logits(n, m, method):
    """x + h and x - h in one linear region, A h = 0: exactly the gradient of twice x, whatever the residual's limit."""
    model, (x, y) = models.fcnn((n,), m, 3, 10, seed=0), batch(6, n, 10, 1)
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x[0])
    kernel = torch.linalg.svd(jacobian)[2][10:]
    h = kernel.T @ torch.randn(len(kernel), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    while not torch.equal(pattern(model, x[0] + h), pattern(model, x[0] - h)):
        h = h / 2
    twice = torch.stack([x[0], x[0], *x[1:5]]), torch.stack([y[0], y[0], *y[1:5]])
    x[0], x[5], y[5] = x[0] + h, x[0] - h, y[0]
    own, copies = gradient(model, x, y), gradient(model, *twice)
    for name, g in own.gradients.items():
        torch.testing.assert_close(g, copies.gradients[name], rtol=0, atol=1e-12 * float(g.abs().max()))
    result = judged(model, own, x, y, method=method)
    assert not result.certified.any()
    assert not result.complete


def pattern(model: nn.Sequential, x: Tensor) -> Tensor:
    first = model.fc1(x)
    return torch.cat([first > 0, model.fc2(first.relu()) > 0])


@pytest.mark.parametrize(("depth", "classes", "gap"), [(2, 2, 1.0), (3, 10, 1.0), (3, 10, 1e-2), (4, 5, 1e-4)])
@pytest.mark.parametrize("relabelled", [False, True])
@pytest.mark.parametrize("method", ["network", "auto"])
def test_copies_that_differ_where_no_weight_looks(depth, classes, gap, relabelled, method):
    model, (x, y) = models.fcnn((12,), 60, depth, classes, seed=0), batch(6, 12, classes)
    with torch.no_grad():
        model.fc1.weight[:, -1] = 0
    x[5], y[5] = x[0], (y[0] + relabelled) % classes
    x[5, -1] += gap
    result = judged(model, gradient(model, x, y), x, y, method=method)
    assert not result.complete
    assert "copies, or images that this model cannot tell apart: their mean" in result.reason or len(result.inputs) < 5


@pytest.mark.parametrize("distance", [1e-6, 2.5e-6, 2e-5, 2e-4, 2e-3])
@pytest.mark.parametrize(
    ("loss", "classes", "head"),
    [
        ("cross_entropy", 2, "fresh"),
        ("cross_entropy", 2, "sure and wrong"),
        ("cross_entropy", 10, "sure and wrong"),
        ("binary_cross_entropy", 1, "fresh"),
        ("squared_error", 1, "fresh"),
        ("squared_error", 1, "output bias"),
    ],
)
def test_images_that_nearly_agree(loss, classes, head, distance):
    """Two of one label leave, of copies of their mean, p (a.h)^2 / 2: nothing, where the head is sure of another."""
    for seed in range(3):
        model, (x, y) = models.fcnn((12,), 48, 2, classes, seed=seed), batch(6, 12, max(classes, 2), seed)
        with torch.no_grad():
            if head == "sure and wrong":
                z = model(x)
                model.fc2.weight *= 15 / (z - z.mean(1, keepdim=True)).abs().amax(1).median()
                y = model(x).argmin(1)
            if head == "output bias":
                model.fc2.bias += 1e3
        h = torch.randn(12, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
        x[5], y[5] = x[0] + distance * h / h.norm() * x[0].norm(), y[0]
        judged(model, gradient(model, x, y, loss=loss), x, y, method="network", max_proposals=256)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unused", [False, True])
def test_without_a_disclosed_count_nothing_is_certified(method, unused):
    """A pair of twins passes for a batch of one."""
    model, (x, _) = models.fcnn((20,), 60, 3, 10 if unused else 2, seed=0), batch(1, 20, 2)
    x = x.repeat(2, 1)
    with torch.no_grad():
        model.fc1.weight[:, -1] *= not unused
    x[1] += torch.eye(20, dtype=torch.float64)[-1] if unused else 1e-4
    update = replace(gradient(model, x, torch.tensor([1, 1])), count=None)
    result = judged(model, update, x, torch.tensor([1, 1]), method=method)
    assert len(result.inputs) == 1
    assert not result.certified.any()
    assert not result.complete
    assert "the number of samples is not disclosed" in result.reason


def weighted(model: nn.Module, x: Tensor, y: Tensor, weights: list[float], **disclosed: object) -> SharedUpdate:
    loss = (F.cross_entropy(model(x), y, reduction="none") * torch.tensor(weights, dtype=torch.float64)).sum()
    return update_of(model, loss, **disclosed)


@pytest.mark.parametrize("count", [4, 8, 22, 3, None])
@pytest.mark.parametrize("factor", [1.0, 4.0, 65536.0, 0.3])
def test_a_multiple_of_a_mean_gives_each_image_once(factor, count):
    """A summed loss, a loss scale that was left in, another learning rate; and a count that is not the batch's."""
    model, (x, y) = models.fcnn((12,), 60, 3, 5, seed=0), batch(4, 12, 5)
    update = weighted(model, x, y, [factor / 4] * 4, count=count)
    result = judged(model, update, x, y, method="network", max_proposals=256)
    assert len(result.inputs) == 4
    assert spear.metrics.evaluate(result, x, y).recall == 1
    assert bool(result.certified.all()) == bool(result.certified.any()) == (count == 4)
    if count in (4, None) and factor != 1:
        assert f"the update is {factor:.6g} times their mean" in result.reason


@pytest.mark.parametrize(
    ("weights", "count"),
    [([1, 0, 0, 0], 4), ([1 / 3, 1 / 6, 1 / 6, 1 / 3], None), ([1 / 2, 1 / 6, 1 / 6, 1 / 6], None)],
)
def test_weights_that_look_like_copies(weights, count):
    """Labels that are ignored, class weights, clients of unequal size."""
    model, (x, y) = models.fcnn((12,), 60, 3, 5, seed=0), batch(4, 12, 5)
    result = judged(model, weighted(model, x, y, weights, count=count), x, y, method="network", max_proposals=256)
    assert 0 < len(result.inputs) <= 4
    assert not result.certified.any()


@pytest.mark.parametrize(("classes", "smoothing"), [(10, 0.5), (10, 0.8), (3, 0.8), (3, 1.0)])
def test_a_complete_result_has_samples(classes, smoothing):
    """Strong label smoothing: the label is the largest count, whatever its size."""
    model, (x, y) = models.fcnn((12,), 60, 3, classes, seed=0), batch(4, 12, classes)
    update = update_of(model, F.cross_entropy(model(x), y, label_smoothing=smoothing), count=4)
    result = judged(model, update, x, y, method="network", max_proposals=512)
    assert result.complete == (len(result.inputs) == 4)
    assert (result.labels is None) == (smoothing == 1)  # then there are none


@pytest.mark.parametrize("factor", [1 + 1e-7, 1 + 1e-5, 1 + 1e-3, 2.0])
def test_one_layer_takes_no_length_on_trust(factor):
    """A factor on dL/dbeta: a learning rate of its own, a rounding. Every image has another length, no sign changes."""
    for seed in range(5):
        model, (x, y) = models.fcnn((20,), 60, 3, 5, seed=seed), batch(3, 20, 5, seed)
        sent = gradient(model, x, y).gradients
        update = SharedUpdate({"fc1.weight": sent["fc1.weight"], "fc1.bias": factor * sent["fc1.bias"]}, count=3)
        result = judged(model[:3], update, x, y, method="layer", max_proposals=32)
        lengths = result.inputs.norm(dim=1).sort().values
        assert not len(lengths) or torch.allclose(lengths * factor, x.norm(dim=1).sort().values, rtol=1e-6)


@pytest.mark.parametrize("rate", [1e-4, 1e-7, 1e-9, 1e-10])
@pytest.mark.parametrize("method", ["network", "layer"])
def test_a_tiny_learning_rate_is_held_to_the_limit_of_its_dtype(rate, method):
    """One limit for certificate and judge: 1e-6 for float64, however large the rounding of the step is."""
    for seed in range(5):
        model, (x, y) = models.fcnn((20,), 60, 3, 5, seed=seed), batch(4, 20, 5, seed)
        result = judged(model, local_training(model, x, y, learning_rate=rate), x, y, method=method, max_proposals=64)
        assert result.limit == 1e-6


def test_a_black_image():
    model, (x, y) = models.fcnn((10,), 40, 3, 5, seed=0), batch(4, 10, 5)
    x[3] = 0
    result = judged(model, gradient(model, x, y), x, y, method="network")
    assert result.certified.all()
    assert len(result.inputs) == 4


def narrow(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    parts = [nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 1 + seed % 2), nn.ReLU(), nn.Linear(1 + seed % 2, 2)]
    return nn.Sequential(*parts).double()


def dead(seed: int) -> nn.Module:
    model = models.fcnn((10,), 30, 2, 5, seed=seed)
    with torch.no_grad():
        model.fc1.bias[:29] = -1e3
    return model


@pytest.mark.parametrize("make", [narrow, dead])
@pytest.mark.parametrize("method", ["network", "auto"])
def test_bottlenecks_and_dead_neurons_end_with_a_reason(make, method):
    for seed in range(10):
        model, (x, y) = make(seed), batch(4, 10, 2, seed)
        update = gradient(model, x, y)
        if any(bool(value.any()) for value in update.gradients.values()):
            try:
                result = spear.attack(model, update, method=method, time_limit=5, max_proposals=64)
            except ValueError:
                continue
            assert result.complete or result.reason


@pytest.mark.parametrize("factor", [1e-310, 1e-200, 1e-60, 1e60, 1e200, 1e300])
@pytest.mark.parametrize("method", ["auto", "layer", "network"])
def test_extreme_gradients_end_with_a_reason(factor, method):
    model, (x, y) = models.fcnn((10,), 40, 2, 5, seed=0), batch(4, 10, 5)
    update = gradient(model, x, y)
    update = replace(update, gradients={name: factor * value for name, value in update.gradients.items()})
    if 1e-100 < factor < 1e100:
        judged(model, update, x, y, method=method, max_proposals=64)
        return
    with pytest.raises(ValueError, match="the gradients are out of range"):
        spear.attack(model, update, method=method)


def test_a_device_without_values_is_refused():
    model, (x, y) = models.fcnn((10,), 40, 2, 5, seed=0), batch(4, 10, 5)
    with pytest.raises(ValueError, match="meta"):
        spear.attack(model, gradient(model, x, y), device="meta")
