"""Updates of which entries are not known, told or not: everything back, certified by what is known, or nothing."""

from dataclasses import replace

import pytest
import torch
from problems import batch

from spear import SharedUpdate, attack, metrics, models
from spear.federated import gradient
from spear.federated.update import difference

B = 5


def _client(seed: int = 0, dtype: torch.dtype = torch.float64):
    inputs, labels = batch(B, 100, seed=seed, dtype=dtype)
    return models.fcnn((100,), 120, 3, 10, seed=seed, dtype=dtype), inputs, labels


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _quantile(update: SharedUpdate, share: float) -> float:
    return float(torch.cat([g.abs().flatten() for g in update.gradients.values()]).quantile(share))


def _cut(update: SharedUpdate) -> SharedUpdate:
    """The largest hundredth cut to one bound."""
    bound = _quantile(update, 0.99)
    return replace(update, gradients={name: g.clamp(-bound, bound) for name, g in update.gradients.items()})


def _few_cut(update: SharedUpdate) -> SharedUpdate:
    """The largest five entries."""
    bound = float(torch.cat([g.abs().flatten() for g in update.gradients.values()]).sort().values[-5])
    return replace(update, gradients={name: g.clamp(-bound, bound) for name, g in update.gradients.items()})


def _percentiles(update: SharedUpdate) -> SharedUpdate:
    """The smallest tenth set to zero, the largest hundredth cut: NVFlare's PercentilePrivacy."""
    least = _quantile(update, 0.1)
    sent = _cut(update)
    return replace(sent, gradients={name: torch.where(g.abs() < least, 0, g) for name, g in sent.gradients.items()})


def _masked(update: SharedUpdate) -> SharedUpdate:
    """A tenth of the entries said not to be known, and rubbish in them."""
    known = {name: torch.rand(g.shape, generator=_generator()) < 0.9 for name, g in update.gradients.items()}
    rubbish = {name: torch.where(known[name], g, 3.0) for name, g in update.gradients.items()}
    return replace(update, gradients=rubbish, known=known)


def _holes(update: SharedUpdate) -> SharedUpdate:
    """A dozen entries of every matrix NaN."""
    sent = {name: g.clone() for name, g in update.gradients.items()}
    for k, g in enumerate(sent.values()):
        g.view(-1)[torch.randperm(g.numel(), generator=_generator(k))[: 12 if g.ndim == 2 else 1]] = torch.nan
    return replace(update, gradients=sent)


CHANGES = (_cut, _few_cut, _percentiles, _masked, _holes)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("count", [B, None])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_batch_comes_back_certified_where_its_size_is_told(change, count, sign, dtype):
    model, inputs, labels = _client(dtype=dtype)
    update = gradient(model, inputs, labels)
    signed = replace(update, gradients={name: sign * g for name, g in update.gradients.items()}, count=count)
    result = attack(model, change(signed))
    seen = metrics.evaluate(result, inputs, labels)
    assert (seen.recall, seen.label_accuracy) == (1, 1), result.reason
    assert bool(result.certified.all()) == (count is not None)
    assert (seen.relative_error < result.limit).all()
    if count is not None:
        assert (seen.relative_error <= result.error_bound[seen.match]).all()
    assert ("opposite sign" in result.reason) == (sign < 0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(2))
def test_one_wrong_entry_among_the_known_certifies_nothing(change, seed):
    model, inputs, labels = _client(seed)
    sent = change(gradient(model, inputs, labels))
    tensors = {name: g.clone() for name, g in sent.gradients.items()}
    rows = tensors["fc1.weight"]
    place = (~rows.isnan() & (rows != 0)).nonzero()[40 + seed]
    rows[tuple(place)] *= 1.01
    result = attack(model, replace(sent, gradients=tensors), time_limit=2)
    seen = metrics.evaluate(result, inputs, labels)
    assert seen.precision == 1
    assert not result.certified.any() or (seen.relative_error < result.limit).all()


@pytest.mark.parametrize("seed", range(2))
def test_full_weights_that_were_cut(seed):
    model, inputs, labels = _client(seed, torch.float32)
    g = gradient(model, inputs, labels).gradients
    before = {name: p.detach() for name, p in model.named_parameters()}
    after = {name: (before[name] - 0.1 * g[name]).clamp(-0.08, 0.08) for name in before}
    update = difference(model, before, after, learning_rate=0.1, count=B)
    result = attack(model, update)
    seen = metrics.evaluate(result, inputs, labels)
    assert (seen.recall, seen.label_accuracy, result.complete) == (1, 1, True), result.reason
    assert (seen.relative_error <= result.error_bound[seen.match]).all()


def test_a_common_factor_and_missing_entries():
    model, inputs, labels = _client()
    update = gradient(model, inputs, labels)
    sent = _holes(replace(update, gradients={name: 0.37 * g for name, g in update.gradients.items()}))
    result = attack(model, sent)
    seen = metrics.evaluate(result, inputs, labels)
    assert (seen.recall, seen.label_accuracy) == (1, 1), result.reason
    assert "the update is 0.37 times their mean" in result.reason


def test_what_nobody_can_complete_says_so():
    model, inputs, labels = _client()
    update = gradient(model, inputs, labels)
    matrices = {name: g for name, g in update.gradients.items() if g.ndim == 2}
    known = {name: torch.rand(g.shape, generator=_generator()) < 0.01 for name, g in matrices.items()}
    result = attack(model, replace(update, known=known))
    assert not len(result.inputs)
    assert "entries of" in result.reason
    nowhere = {name: torch.full_like(g, torch.nan) for name, g in update.gradients.items()}
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        attack(model, replace(update, gradients=nowhere))
    endless = dict(_holes(update).gradients)
    endless["fc2.weight"][5, 5] = torch.inf
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        attack(model, replace(update, gradients=endless))


def test_methods_of_one_layer_say_what_they_need():
    model, inputs, labels = _client()
    sent = _holes(gradient(model, inputs, labels))
    with pytest.raises(ValueError, match="entries of the gradient of fc1.weight are not known"):
        attack(model, sent, method="sampling")
