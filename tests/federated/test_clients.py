"""Clients as deployments have them: each update against a slow textbook version."""

import copy
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from problems import batch

from spear import attack, metrics, models
from spear.federated import SharedUpdate, clients, gradient, privacy


def _assert_equal(update: SharedUpdate, other, **tolerance) -> None:
    for name, g in update.gradients.items():
        torch.testing.assert_close(g, other[name], **tolerance)


def _textbook(model, inputs, labels, steps, rate, momentum):
    """SGD by hand on the batches `steps`, lists of indices."""
    local, speed = copy.deepcopy(model), {}
    for index in steps:
        loss = F.cross_entropy(local(inputs[index]), labels[index])
        for (name, p), g in zip(
            local.named_parameters(), torch.autograd.grad(loss, list(local.parameters())), strict=True
        ):
            speed[name] = momentum * speed.get(name, 0) + g
            p.data -= rate * speed[name]
    return {n: a.data - b.data for (n, a), b in zip(model.named_parameters(), local.parameters(), strict=True)}


@pytest.mark.parametrize(("epochs", "size", "momentum"), list(itertools.product((1, 3), (2, 5, 7), (0.0, 0.9))))
def test_local_training_is_sgd_by_hand(epochs, size, momentum):
    inputs, labels = batch(7, 12)
    model = models.fcnn((12,), 9, 3, 10)
    before = copy.deepcopy(model.state_dict())
    update = clients.local_training(
        model, inputs, labels, epochs=epochs, mini_batch=size, learning_rate=0.2, momentum=momentum
    )
    steps = list(torch.arange(7).split(size)) * epochs
    _assert_equal(update, _textbook(model, inputs, labels, steps, 0.2, momentum))
    assert (update.local_steps, update.learning_rate, update.mini_batch, update.count) == (len(steps), 0.2, size, 7)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_one_full_step_is_the_gradient():
    inputs, labels = batch(5, 12)
    model = models.fcnn((12,), 9, 3, 10)
    update = clients.local_training(model, inputs, labels, learning_rate=0.25)
    _assert_equal(update, {n: 0.25 * g for n, g in gradient(model, inputs, labels).gradients.items()})


def test_shuffling_depends_on_the_generator_alone():
    inputs, labels = batch(6, 12)
    model = models.fcnn((12,), 9, 3, 10)
    draw = lambda seed: clients.local_training(  # noqa: E731
        model, inputs, labels, mini_batch=2, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )
    _assert_equal(draw(1), draw(1).gradients, rtol=0, atol=0)
    assert not torch.equal(draw(1).gradients["fc1.weight"], draw(2).gradients["fc1.weight"])


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"mini_batch": 0}, {"learning_rate": 0}, {"momentum": 1.0}, {"momentum": -0.1}]
)
def test_local_training_refuses(options):
    inputs, labels = batch(6, 12)
    with pytest.raises(ValueError, match="must be positive"):
        clients.local_training(models.fcnn((12,), 9, 3, 10), inputs, labels, **options)


def test_accumulation_is_the_batch_where_micro_batches_are_equal():
    inputs, labels = batch(6, 12)
    model = models.fcnn((12,), 9, 3, 10)
    update = clients.accumulated(model, inputs, labels, micro_batch=2)
    _assert_equal(update, gradient(model, inputs, labels).gradients)
    assert (update.count, update.clients) == (6, None)
    uneven = clients.accumulated(model, inputs, labels, micro_batch=4)
    parts = [gradient(model, inputs[k], labels[k]).gradients for k in (slice(0, 4), slice(4, 6))]
    _assert_equal(uneven, {n: (parts[0][n] + parts[1][n]) / 2 for n in parts[0]})
    with pytest.raises(ValueError, match="at least 1 sample, not 0"):
        clients.accumulated(model, inputs, labels, micro_batch=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_aggregation_by_samples_is_one_large_batch(reduction):
    inputs, labels = batch(9, 12)
    model = models.fcnn((12,), 9, 3, 10)
    parts = [gradient(model, x, y, reduction=reduction) for x, y in zip(inputs.split(4), labels.split(4), strict=True)]
    joined = clients.aggregated(parts)
    _assert_equal(joined, gradient(model, inputs, labels, reduction=reduction).gradients)
    assert (joined.count, joined.clients, joined.reduction) == (9, (4, 4, 1), reduction)
    again = clients.aggregated([parts[2], parts[0], parts[1]])
    _assert_equal(again, joined.gradients)


def test_aggregation_adds_noise_variances():
    one = SharedUpdate({"w": torch.ones(2)}, count=3, noise=0.3)
    assert clients.aggregated([one, one], by="clients").noise == pytest.approx(0.3 / 2**0.5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"gradients": {"v": torch.ones(2)}}, "the same parameters"),
        ({"learning_rate": 0.2}, "the same local training"),
        ({"count": None}, "disclose their counts"),
    ],
)
def test_aggregation_refuses(other, message):
    one = {"gradients": {"w": torch.ones(2)}, "count": 3}
    with pytest.raises(ValueError, match=message):
        clients.aggregated([SharedUpdate(**one), SharedUpdate(**(one | other))])
    with pytest.raises(ValueError, match="unknown weighting 'size'"):
        clients.aggregated([SharedUpdate(**one)], by="size")
    with pytest.raises(ValueError, match="disclose their counts"):
        clients.aggregated([])


@pytest.mark.parametrize("clip", [0.5, 1.0, 100.0])
def test_dp_sgd_clips_each_sample(clip):
    inputs, labels = batch(5, 12)
    model = models.fcnn((12,), 9, 3, 10)
    update = privacy.private(model, inputs, labels, clip=clip, noise_multiplier=0.0)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for k in range(5):
        own = gradient(model, inputs[k : k + 1], labels[k : k + 1]).gradients
        size = sum(g.norm() ** 2 for g in own.values()).sqrt()
        for n, g in own.items():
            total[n] += g * min(1.0, clip / float(size)) / 5
    _assert_equal(update, total, rtol=1e-5, atol=1e-8)  # Opacus adds 1e-6 to the norm
    assert (update.clip, update.noise, update.epsilon) == (clip, 0.0, float("inf"))
    assert all(not hasattr(p, "grad_sample") and p.grad is None for p in model.parameters())


def test_dp_sgd_noise_has_its_level_and_epsilon_falls_with_it():
    inputs, labels = batch(4, 300)
    model = models.fcnn((300,), 40, 3, 10)
    updates = [
        privacy.private(model, inputs, labels, clip=2.0, noise_multiplier=s, generator=torch.Generator().manual_seed(0))
        for s in (0.0, 0.1, 1.0)
    ]
    for update, s in zip(updates[1:], (0.1, 1.0), strict=True):
        added = torch.cat([(g - updates[0].gradients[n]).flatten() for n, g in update.gradients.items()])
        assert float(added.std()) == pytest.approx(s * 2.0 / 4, rel=0.03)
        assert update.noise == pytest.approx(s * 2.0 / 4)
    # One Gaussian release: epsilon = 1/(2 s^2) + sqrt(2 ln(1/delta)) / s, by the best Rényi order.
    assert updates[2].epsilon == pytest.approx(0.5 + (2 * 11.512925) ** 0.5, rel=0.2)
    assert updates[1].epsilon > updates[2].epsilon
    assert privacy.epsilon(1.0, sample_rate=0.01, steps=100) < updates[2].epsilon


@pytest.mark.parametrize("options", [{"clip": 0, "noise_multiplier": 1}, {"clip": 1, "noise_multiplier": -1}])
def test_dp_sgd_refuses(options):
    inputs, labels = batch(4, 12)
    with pytest.raises(ValueError, match="must be positive"):
        privacy.private(models.fcnn((12,), 9, 3, 10), inputs, labels, **options)


def test_without_opacus_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ImportError, match=r"spear\[privacy\]"):
        privacy.epsilon(1.0)


def test_one_local_step_is_attacked_as_its_gradient():
    inputs, labels = batch(4, 60)
    model = models.fcnn((60,), 80, 3, 10)
    update = clients.local_training(model, inputs, labels, learning_rate=0.01)
    found = metrics.evaluate(attack(model, update), inputs, labels)
    assert (found.recall, found.precision, found.label_accuracy) == (1, 1, 1)
