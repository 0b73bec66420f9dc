"""What an update shows of itself stands in for what it is told to be: its sign, what it was computed in."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn

import spear
from spear.federated import SharedUpdate, gradient
from spear.federated.update import computed_in, difference, each

SHAPE, CLASSES = (40,), 6
LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "sparse": lambda x: x * (x > 0.5),
    "bright": lambda x: 5 + x,
}
BATCHES = [(2, 4), (2, 9), (3, 4), (3, 14)]  # depth and size
STORED: dict[str, Callable[[Tensor], object]] = {
    "double": Tensor.double,
    "array": lambda g: g.double().numpy(),
    "text": lambda g: torch.tensor(g.tolist(), dtype=torch.float64),
}


def client(depth: int, count: int, law: str, seed: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    x = torch.randn(count, *SHAPE, generator=Generator().manual_seed(seed), dtype=torch.float64)
    return spear.models.fcnn(SHAPE, 120, depth, CLASSES, seed=seed, dtype=dtype), LAWS[law](x).to(dtype)


def labels(count: int, seed: int) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=Generator().manual_seed(seed))


def same(found: Tensor, truth: Tensor, error: float) -> bool:
    distance = torch.cdist(truth.double(), found.double()).amin(1)
    return bool((distance < error * truth.double().norm(dim=1)).all())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("depth", "count"), BATCHES)
@pytest.mark.parametrize(
    ("factor", "words"), [(-1, "the opposite sign"), (-2.5, "the update is -2.5 times their mean")]
)
def test_a_reversed_sign_is_found_said_and_undone(
    factor: float, words: str, depth: int, count: int, law: str, seed: int
) -> None:
    model, x = client(depth, count, law, seed)
    y = labels(count, seed)
    sent = each(gradient(model, x, y), lambda g: factor * g)
    result = spear.attack(model, sent, time_limit=60)
    assert result.complete, result.reason
    assert words in result.reason
    assert same(result.inputs, x, 1e-6)
    assert sorted(result.labels.tolist()) == sorted(y.tolist())
    assert result.weights is None or bool((result.weights > 0).all())


@pytest.mark.parametrize("law", LAWS)
def test_a_reversed_sign_without_a_count_certifies_nothing(law: str) -> None:
    model, x = client(3, 8, law, 0)
    sent = replace(each(gradient(model, x, labels(8, 0)), torch.neg), count=None)
    result = spear.attack(model, sent, time_limit=60)
    assert "the opposite sign" in result.reason
    assert len(result.inputs) == 8
    assert not result.certified.any()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("stored", STORED)
def test_single_precision_stored_in_double_is_single_precision(stored: str, law: str, seed: int) -> None:
    model, x = client(3, 8, law, seed, torch.float32)
    plain = gradient(model, x, labels(8, seed))
    wide = replace(plain, gradients={name: STORED[stored](g) for name, g in plain.gradients.items()})
    found, expected = (spear.attack(model, update, time_limit=60) for update in (wide, plain))
    assert computed_in(wide) == torch.float32
    assert expected.complete
    assert found.complete, found.reason
    assert (found.limit, len(found.inputs)) == (expected.limit, 8)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_stored_in_double_is_noise(kind: torch.dtype, seed: int) -> None:
    model, x = client(3, 8, "normal", seed, torch.float32)
    sent = each(gradient(model, x, labels(8, seed)), lambda g: g.to(kind).double())
    result = spear.attack(model, sent, time_limit=60)
    assert computed_in(sent) == kind
    assert result.expected_error is not None, result.reason
    assert not result.certified.any()
    assert same(result.inputs, x, 0.05)


def test_the_change_of_single_precision_weights_in_double() -> None:
    model, x = client(3, 8, "normal", 0, torch.float32)
    step = gradient(model, x, labels(8, 0)).gradients
    before = {name: p.detach() for name, p in model.named_parameters()}
    after = {name: (p - 0.1 * step[name]).double() for name, p in before.items()}
    before = {name: p.double() for name, p in before.items()}
    assert computed_in(difference(model, before, after, learning_rate=0.1)) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_what_they_are_stored_in_where_nothing_coarser_holds_them(dtype: torch.dtype) -> None:
    noise = torch.randn(500, generator=Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert computed_in(SharedUpdate({"a": noise})) == dtype
    assert computed_in(SharedUpdate({"a": torch.ones(20, dtype=dtype)})) == dtype
