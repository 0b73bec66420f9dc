"""BatchNorm behind ReLU, its buffers not sent: the gradient's own zeros tell the batch, and that its statistics."""

from dataclasses import replace

import pytest
import torch
from normalised_problems import Sent, nothing_certified_if_changed, sent
from torch import nn

import spear
from spear.metrics import evaluate
from spear.normalisation.columns import Columns, output_errors
from spear.normalisation.last_layer import searched
from spear.normalisation.opening import open_normalised
from spear.normalisation.recover import known_layers
from spear.reconstruction import Budget, Terms

ONE, DEEP, LOST = (60, 120, 10), (60, 150, 140, 10), (200, 120, 10)


def behind(m: int, **options: float) -> list[nn.Module]:
    return [nn.ReLU(), nn.BatchNorm1d(m, **options)]


def silent(case: Sent) -> Sent:
    """The client keeps its buffers."""
    return replace(case, update=replace(case.update, buffers=None))


def whole(case: Sent, result: spear.Reconstruction) -> None:
    assert result.complete, result.reason
    evaluation = evaluate(result, case.inputs, case.labels)
    assert evaluation.recall == evaluation.precision == 1
    assert bool((evaluation.relative_error < 1e-6).all())
    assert bool((evaluation.relative_error.sort().values <= result.error_bound.sort().values).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("sizes", "b"), [(ONE, 12), (ONE, 30), (ONE, 3), (DEEP, 10), (DEEP, 3), (LOST, 20)])
def test_the_whole_batch(sizes, b, seed):
    case = silent(sent(sizes, b, behind, seed=seed, spread=0.1))
    whole(case, spear.attack(case.model, case.update, time_limit=300))


@pytest.mark.parametrize("options", [{"eps": 1e-14}, {"eps": 1e-2}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("sizes", [ONE, DEEP])
def test_any_batch_norm(sizes, options):
    case = silent(sent(sizes, 12, lambda m: behind(m, **options), seed=3))
    whole(case, spear.attack(case.model, case.update, method="network", time_limit=300))


@pytest.mark.parametrize(("loss", "reduction"), [("binary_cross_entropy", "mean"), ("squared_error", "sum")])
def test_losses(loss, reduction):
    case = silent(sent((60, 160, 10), 8, behind, seed=1, loss=loss, reduction=reduction))
    whole(case, spear.attack(case.model, case.update, method="network", time_limit=300))


@pytest.mark.parametrize("norm", ["front", "sent", "smooth"])
def test_beside_other_layers(norm):
    """Another BatchNorm below: in front of the activation, behind one and with buffers, behind a smooth one with."""
    first = {
        "front": lambda m: [nn.BatchNorm1d(m), nn.ReLU()],
        "sent": behind,
        "smooth": lambda m: [nn.GELU(), nn.BatchNorm1d(m)],
    }[norm]
    case = sent(DEEP, 10, lambda m: first(m) if m == DEEP[1] else behind(m), seed=1, spread=0.1)
    named = {name: value for name, value in case.update.buffers.items() if norm != "front" and name.startswith("2.")}
    result = spear.attack(case.model, replace(case.update, buffers=named), method="network", time_limit=300)
    assert bool(result.differences.all()), result.reason
    assert result.complete == (norm != "front")


@pytest.mark.parametrize("seed", [0, 1])
def test_columns_and_errors_are_those_of_the_batch(seed):
    case = sent(ONE, 12, behind, seed=seed, spread=0.1)
    view = open_normalised(case.model, silent(case).update)
    run = searched(view, known_layers(view)[-1], Terms(Budget(60.0)))[1]
    assert isinstance(run, Columns)
    assert run.left == 0
    assert run.doubt == ""
    apart = torch.cdist(run.inputs, case.inputs, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(apart.amin(1).max()) < 1e-9
    a = case.model[1](case.model[0](run.inputs))
    told = open_normalised(case.model, case.update).afters[-1]
    assert torch.allclose(a.mean(0), told.mean, atol=1e-9)
    assert torch.allclose(a.var(0), told.variance, atol=1e-9)
    wanted = case.model(case.inputs).softmax(1) - nn.functional.one_hot(case.labels, ONE[-1])
    assert torch.allclose(output_errors(view, run.inputs), wanted[apart.argmin(1)] / 12, atol=1e-10)


def test_no_output_bias():
    case = sent(ONE, 12, behind, spread=0.1)
    case.model[-1].bias = None
    update = spear.federated.gradient(case.model, case.inputs, case.labels)
    case = silent(replace(case, update=update))
    view = open_normalised(case.model, case.update)
    wanted = (case.model(case.inputs).softmax(1) - nn.functional.one_hot(case.labels, ONE[-1])) / 12
    assert torch.allclose(output_errors(view, case.inputs), wanted, atol=1e-10)
    whole(case, spear.attack(case.model, case.update, method="network", time_limit=300))


@pytest.mark.parametrize("sizes", [ONE, DEEP])
def test_statistics_of_another_batch_change_nothing(sizes):
    """At the last hidden layer none are used; a wrong deviation further down is not confirmed."""
    case = sent(sizes, 10, behind, seed=5)
    wrong = {name: value * 1.1 for name, value in case.update.buffers.items() if value.is_floating_point()}
    result = spear.attack(case.model, replace(case.update, buffers=wrong), method="network", time_limit=300)
    assert result.complete == (sizes == ONE)
    assert bool(result.certified.all())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("seed", [0, 1])
def test_running_variances_over_all_samples(seed, activation):
    """As Flax and Keras take them."""
    case = sent((20, 96, 96, 5), 6, lambda m: [activation(), nn.BatchNorm1d(m)], seed=seed)
    told = {k: 0.9 + (v - 0.9) * 5 / 6 if k.endswith("var") else v for k, v in case.update.buffers.items()}
    for update in (case.update, replace(case.update, buffers=told)):
        whole(case, spear.attack(case.model, update, method="network", time_limit=300))


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"])
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_changed_update_is_not_certified(name, size):
    nothing_certified_if_changed(silent(sent((30, 80, 5), 8, behind, seed=6)), name, size)


@pytest.mark.parametrize(("b", "proposals"), [(12, 1), (60, 60)])
def test_a_part_of_the_batch_is_not_returned(b, proposals):
    case = silent(sent((100, 140, 10), b, behind))
    result = spear.attack(case.model, case.update, method="network", max_proposals=proposals)
    assert not len(result.inputs)
    assert not result.complete
    assert f"of {b} gradient directions" in result.reason


def test_two_samples_do_not_tell_the_first_of_two_layers():
    case = silent(sent(DEEP, 2, behind))
    result = spear.attack(case.model, case.update, method="network", time_limit=300)
    assert not len(result.inputs)
    assert "too few units of layer 1 are not active in two samples" in result.reason
