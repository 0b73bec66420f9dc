"""First steps of adaptive optimisers: the gradient behind them comes back, in float64 whole, in float32 with noise."""

from collections.abc import Callable

import pytest
import torch
from problems import batch
from torch import Tensor, nn

import spear
from spear import models
from spear.federated import SharedUpdate, adam, decoding, gradient
from spear.federated.update import difference
from spear.metrics import evaluate
from spear.reconstruction import Reconstruction

RATE = 1e-3
OPTIMISERS: dict[str, Callable] = {
    "Adam": torch.optim.Adam,
    "eps 1e-3": lambda p, lr: torch.optim.Adam(p, lr=lr, eps=1e-3),
    "betas": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.5, 0.9)),
    "AMSGrad": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True),
    "decay in the gradient": lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=1e-2),
    "AdamW": torch.optim.AdamW,
    "AdamW, eps 1e-3": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, eps=1e-3),
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
}


def stepped(optimiser: Callable, seed: int = 0, dtype: torch.dtype = torch.float64, rate: float = RATE):
    """A model, the weights after one step, the batch."""
    x, y = batch(6, 40, 6, seed=seed, dtype=dtype)
    model, after = (models.fcnn((40,), 120, 3, 6, seed=seed, dtype=dtype) for _ in range(2))
    step = optimiser(after.parameters(), lr=rate)
    nn.functional.cross_entropy(after(x), y).backward()
    step.step()
    return model, after, x, y


def attacked(model: nn.Module, after: nn.Module, *, told: bool, rate: float = RATE, count: int = 6) -> Reconstruction:
    sides = (dict(side.named_parameters()) for side in (model, after))
    change = difference(model, *sides, learning_rate=rate, count=count)
    return spear.attack(model, change if told else SharedUpdate(dict(change.gradients), count=count), time_limit=30)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_gradient_comes_back(name: str) -> None:
    told = len(name) % 2 == 0  # the rate: half of them are told it
    model, after, x, y = stepped(OPTIMISERS[name])
    result = attacked(model, after, told=told)
    report = evaluate(result, x, y)
    assert len(result.inputs) == 6, result.reason
    assert float(report.relative_error.max()) < 1e-4
    assert report.label_accuracy == 1
    assert "the change is a first step of Adam's kind" in result.reason
    assert not result.certified.any()
    assert not result.complete


def test_constants_and_decays_are_said() -> None:
    model, after, *_ = stepped(torch.optim.AdamW, 1)
    assert "with a decay of 0.01 times the weights" in attacked(model, after, told=True).reason
    model, after, *_ = stepped(OPTIMISERS["decay in the gradient"], 1)
    assert "a weight decay of 0.01 was taken off" in attacked(model, after, told=True).reason
    model, after, *_ = stepped(torch.optim.RMSprop, 1)
    assert "of size 0.01 at a rate of 0.001" in attacked(model, after, told=True).reason


def test_biases_may_be_without_decay() -> None:
    def without(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        parameters = list(parameters)
        groups = [{"params": [p for p in parameters if (p.ndim > 1) == decayed]} for decayed in (True, False)]
        groups[1]["weight_decay"] = 0.0
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)

    model, after, x, _ = stepped(without)
    result = attacked(model, after, told=True)
    assert float(evaluate(result, x).relative_error.max()) < 1e-4, result.reason


@pytest.mark.parametrize("told", [True, False], ids=["rate told", "rate not told"])
@pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.AdamW])
def test_in_single_precision_noise_is_left(optimiser: Callable, told: bool) -> None:
    model, after, x, y = stepped(optimiser, dtype=torch.float32, rate=1e-2)
    result = attacked(model, after, told=told, rate=1e-2)
    report = evaluate(result, x, y)
    assert "the rounding of the weights leaves noise" in result.reason
    assert "claims" not in result.reason
    assert len(result.inputs) >= 3, result.reason
    assert bool((report.relative_error[report.match >= 0] < 0.5).all())
    assert result.expected_error is not None


def untouched(update: SharedUpdate, model: nn.Module) -> bool:
    return not any("Adam" in words for words in decoding.read(model, update).words)


@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.float64), (1, torch.float32)])
def test_other_updates_are_left_as_they_are(seed: int, dtype: torch.dtype) -> None:
    x, y = batch(6, 40, 6, seed=seed, dtype=dtype)
    model = models.fcnn((40,), 120, 3, 6, seed=seed, dtype=dtype)
    plain = gradient(model, x, y).gradients
    generator = torch.Generator().manual_seed(seed)
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda g: g,
        "noise": lambda g: g + 1e-3 * torch.randn(g.shape, generator=generator, dtype=dtype),
        "weak noise": lambda g: g + 1e-7 * torch.randn(g.shape, generator=generator, dtype=dtype),
        "pruned": lambda g: g * (torch.rand(g.shape, generator=generator) < 0.5),
        "rounded": lambda g: (g * 1e3).round() / 1e3,
        "half": lambda g: g.bfloat16().to(dtype),
    }
    for name, change in others.items():
        assert untouched(SharedUpdate({n: change(g) for n, g in plain.items()}), model), name
    for rate in (1e-1, 1e-4, 1e-6):
        change = {n: p.detach() - (p.detach() - rate * plain[n]) for n, p in model.named_parameters()}
        assert untouched(SharedUpdate(change, learning_rate=rate), model), rate


def test_what_is_left_of_signs_is_said() -> None:
    model, after, *_ = stepped(lambda p, lr: torch.optim.Adam(p, lr=lr, eps=1e-30))
    sides = (dict(side.named_parameters()) for side in (model, after))
    assert adam.SIGNS in decoding.read(model, difference(model, *sides, learning_rate=RATE)).words


def test_a_large_batch_is_shown_by_a_larger_part() -> None:
    x, y = batch(100, 150, 6)
    model, after = (models.fcnn((150,), 260, 3, 6, seed=0) for _ in range(2))
    step = torch.optim.Adam(after.parameters(), lr=RATE)
    nn.functional.cross_entropy(after(x), y).backward()
    step.step()
    sides = (dict(side.named_parameters()) for side in (model, after))
    at = adam.constants(model, difference(model, *sides, learning_rate=RATE))
    assert at is not None
    assert pytest.approx(RATE, rel=1e-10) == at.A
