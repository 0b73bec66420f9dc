"""How long inputs are: certified only where more tells it than the biases' gradients, which may have another rate."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import spear
from spear.certificate import BY_BIASES, SAFETY, length_by_labels
from spear.federated import SharedUpdate, gradient
from spear.federated.clients import local_training
from spear.federated.losses import activate, activate_along

N, B, CLASSES = 64, 3, 10
RATES = [(1.0, 2.0), (0.5, 1.0)]  # of weights and biases, over that which was told


def client(depth: int, seed: int, dtype: torch.dtype, *, zero: bool = True, head: float = 1.0, raw: bool = False):
    """A network, and pixels in [0, 1], or `raw` up to 255, of random labels."""
    torch.manual_seed(seed)
    sizes = [N] + [96] * (depth - 1) + [CLASSES]
    parts = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*parts[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            if zero and p.ndim == 1:
                p.zero_()
            elif raw and p.ndim > 1:
                nn.init.kaiming_normal_(p)
        model[-1].weight *= head
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(B, N, generator=generator, dtype=torch.float64)
    x = (255 * x).round() if raw else x
    return model.to(dtype), x.to(dtype), torch.randint(CLASSES, (B,), generator=generator)


def at_rates(update: SharedUpdate, weights: float, biases: float) -> SharedUpdate:
    rates = {name: biases if name.endswith("bias") else weights for name in update.gradients}
    return replace(update, gradients={name: g * rates[name] for name, g in update.gradients.items()})


def off(result: spear.Reconstruction, x: Tensor) -> Tensor:
    """Of each certified input, the relative distance to the nearest true one over its bound."""
    apart = torch.cdist(result.inputs.flatten(1).double(), x.flatten(1).double()).amin(1) / x.double().norm(dim=1).min()
    return (apart / result.error_bound)[result.certified]


SILENT = [  # depth, precision, head, raw: labels that say nothing of lengths
    (3, torch.float64, 1e-10, False),
    (3, torch.float32, 1e-4, False),
    (8, torch.float32, 1.0, False),
    (3, torch.float64, 1.0, True),
    (3, torch.float32, 1.0, True),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("silent", SILENT)
@pytest.mark.parametrize("method", ["network", "layer", "dictionary", "auto"])
def test_biases_of_another_rate(method, silent, rates, seed):
    depth, dtype, head, raw = silent
    model, x, y = client(depth, seed, dtype, head=head, raw=raw)
    result = spear.attack(model, at_rates(gradient(model, x, y), *rates), method=method, time_limit=20)
    assert not result.certified.any()
    assert head == 1 or (len(result.inputs) == B and BY_BIASES in result.reason)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rates", RATES)
def test_entries_that_did_not_arrive(rates, seed):
    model, x, y = client(3, seed, torch.float64, raw=True)
    update = at_rates(gradient(model, x, y), *rates)
    generator = torch.Generator().manual_seed(seed)
    known = {name: torch.rand(g.shape, generator=generator) > 0.05 for name, g in update.gradients.items()}
    result = spear.attack(model, replace(update, known=known), time_limit=20)
    assert not result.certified.any()


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_several_local_steps(raw, honest):
    model, x, y = client(3, 0, torch.float64, raw=raw)
    x, y = x[:2], model(x[:2]).argmin(1) if raw else y[:2]  # raw: the softmax is sure of other classes
    update = local_training(model, x, y, mini_batch=1, learning_rate=1e-7 if raw else 1e-2)
    result = spear.attack(model, update if honest else at_rates(update, 0.5, 1.0), time_limit=20)
    assert bool((off(result, x) <= 1).all())
    assert result.complete is (honest and not raw)
    assert not (honest and raw) or BY_BIASES in result.reason


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("told", [{"zero": False}, {"zero": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["network", "layer", "dictionary"])
def test_what_tells_lengths_certifies_them(method, dtype, told, seed):
    """Biases that are not zero, by what reads the layer; logits that the softmax feels, by the labels."""
    model, x, y = client(3, seed, dtype, **told)
    result = spear.attack(model, gradient(model, x, y), method=method, time_limit=20)
    assert result.complete, result.reason
    assert bool((off(result, x) <= 1).all())


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("zero", [True, False])
def test_behind_a_normalisation(zero, activation, norm):
    """It takes the length of all that enters it away, but for its epsilon and the biases."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 96), norm(96), activation(), nn.Linear(96, 5)).float()
    if zero:
        nn.init.zeros_(model[0].bias)
    x, y = 10 * torch.randn(4, 20), torch.arange(4)
    update = gradient(model, x, y)
    twice = replace(update, gradients=update.gradients | {"0.bias": 2 * update.gradients["0.bias"]})
    for sent in (update, twice):
        result = spear.attack(model, sent, method="network", time_limit=20)
        assert bool((off(result, x) <= 1).all())
        if zero:
            assert len(result.inputs) == 4
            assert BY_BIASES in result.reason
    assert zero or spear.attack(model, update, method="network", time_limit=20).complete


@pytest.mark.parametrize(("outputs", "loss"), [(2, "cross_entropy"), (1, "binary_cross_entropy")])
def test_one_sample_of_two_classes_behind_dropout(outputs, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, outputs)).double().train()
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[3].bias)
    x = torch.randn(1, 20, dtype=torch.float64)
    update = at_rates(gradient(model, x, torch.tensor([1]), loss=loss), 1.0, 2.0)
    result = spear.attack(model, update, time_limit=20)
    assert not result.certified.any()
    assert "two classes" in result.reason


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize("seed", range(3))
def test_labels_tell_a_length_by_as_much_as_dlogits_move(seed, loss, whole):
    """By finite differences: an input longer by the share found moves dLoss/dlogits, up to its scale where that is not
    told, by about `SAFETY` times the error."""
    generator = torch.Generator().manual_seed(seed)
    W, x = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((5, 8), (4, 8)))
    wanted = torch.eye(5, dtype=torch.float64)[:4]
    own = lambda share: activate(loss, (1 + share) * x @ W.T) - wanted  # noqa: E731
    error = torch.full((4,), 1e-9, dtype=torch.float64)
    share = length_by_labels(own(0), activate_along(loss, x @ W.T, x @ W.T), error, whole=whole)
    moved, before = own(share), own(0)
    scale = 1 if whole else (moved * before).sum(1, keepdim=True) / before.square().sum(1, keepdim=True)
    seen = (moved - scale * before).norm(dim=1) / before.norm(dim=1)
    assert float(seen.max()) == pytest.approx(SAFETY * 1e-9, rel=1e-2)


def test_labels_that_do_not_feel_a_length():
    own, error = torch.ones(2, 3, dtype=torch.float64), torch.full((2,), 1e-12, dtype=torch.float64)
    assert length_by_labels(own, 0 * own, error, whole=True) == float("inf")
    assert length_by_labels(own, own, error, whole=False) > 1
