"""What an update shows of itself stands in for what it is told to be: its sign, what it was computed in."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn

import spear
from spear.federated import SharedUpdate, gradient
from spear.federated.received import coarsest, rounding_unit
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


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.GELU])
@pytest.mark.parametrize("factor", [7.5, 20.7, 1024, 1e-4])
def test_a_factor_is_found_said_and_undone(factor: float, activation: type[nn.Module], seed: int) -> None:
    """Larger than a batch has samples, too: no sample's gradient looks possible then."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 120), activation(), nn.Linear(120, 120), activation(), nn.Linear(120, CLASSES))
    model.double()
    _, x = client(3, 6, "normal", seed)
    plain = gradient(model, x, labels(6, seed))
    for told in (plain, without_last_bias(plain)):
        result = spear.attack(model, each(told, lambda g: factor * g), method="network", time_limit=60)
        assert result.complete, result.reason
        assert f"the update is {factor:.6g} times their mean" in result.reason
        assert same(result.inputs, x, 1e-6)


def without_last_bias(update: SharedUpdate) -> SharedUpdate:
    """The same where the client kept the gradient of its output bias, or froze that."""
    kept = list(update.gradients)[:-1]
    return replace(update, gradients={name: update.gradients[name] for name in kept})


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
    change = difference(model, before, after, learning_rate=0.1)
    assert coarsest(model, change) == torch.float32
    assert rounding_unit(model, change) >= torch.finfo(torch.float32).eps
    assert coarsest(model.double(), change) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_what_they_are_stored_in_where_nothing_coarser_holds_them(dtype: torch.dtype) -> None:
    noise = torch.randn(500, generator=Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert computed_in(SharedUpdate({"a": noise})) == dtype
    assert computed_in(SharedUpdate({"a": torch.ones(20, dtype=dtype)})) == dtype


def decayed(model: nn.Module, sent: SharedUpdate, decay: float, *, biases: bool) -> SharedUpdate:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with_decay = {n: g + decay * weights[n] * (biases or weights[n].ndim > 1) for n, g in sent.gradients.items()}
    return replace(sent, gradients=with_decay)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("biases", [True, False], ids=["all", "weights"])
@pytest.mark.parametrize("decay", [1e-2, 1e-4])
def test_weight_decay_is_estimated_said_and_taken_off(decay: float, biases: bool, law: str, seed: int) -> None:
    model, x = client(3, 8, law, seed)
    sent = decayed(model, gradient(model, x, labels(8, seed)), decay, biases=biases)
    result = spear.attack(model, sent, time_limit=60)
    assert result.complete, result.reason
    assert same(result.inputs, x, 1e-6)
    assert f"a weight decay of {decay:g} was taken off" in result.reason
    assert ("none was on" in result.reason) != biases


@pytest.mark.parametrize("law", LAWS)
def test_weight_decay_of_a_step_in_single_precision(law: str) -> None:
    model, x = client(3, 8, law, 0, torch.float32)
    sent = decayed(model, gradient(model, x, labels(8, 0)), 1e-2, biases=True)
    before = {name: p.detach() for name, p in model.named_parameters()}
    after = {name: p - 0.1 * sent.gradients[name] for name, p in before.items()}
    result = spear.attack(model, difference(model, before, after, learning_rate=0.1, count=8), time_limit=60)
    assert len(result.inputs) == 8, result.reason
    assert same(result.inputs, x, 1e-2)
    assert "a weight decay of 0.0" in result.reason


def test_a_decay_that_was_told_is_held_against_the_update() -> None:
    model, x = client(3, 8, "normal", 0)
    plain = gradient(model, x, labels(8, 0))
    sent = replace(decayed(model, plain, 1e-2, biases=True), weight_decay=5e-2)
    assert "a weight decay of 0.01 was taken off, told was 0.05" in spear.attack(model, sent, time_limit=60).reason
    assert spear.attack(model, replace(sent, weight_decay=1e-2), time_limit=60).complete


@pytest.mark.parametrize("sigma", [0.0, 1e-3])
def test_without_decay_nothing_is_taken_off(sigma: float) -> None:
    model, x = client(3, 8, "normal", 0)
    generator = Generator().manual_seed(1)
    sent = each(
        gradient(model, x, labels(8, 0)),
        lambda g: g + sigma * torch.randn(g.shape, generator=generator, dtype=g.dtype),
    )
    assert "decay" not in spear.attack(model, sent, time_limit=10).reason


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_another_loss_than_told_is_tried_and_named(loss: str, seed: int) -> None:
    model, x = client(3, 6, "normal", seed)
    y = labels(6, seed)
    sent = gradient(model, x, y, loss=loss)
    result = spear.attack(model, replace(sent, loss="cross_entropy"), time_limit=60)
    assert result.complete, result.reason
    assert sorted(result.labels.tolist()) == sorted(y.tolist())
    assert f"the update fits the loss {loss}, told was cross_entropy" in result.reason


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("loss", ["class weights", "likelihood of the softmax"])
def test_a_loss_that_is_not_known_leaves_inputs_without_labels(loss: str, seed: int) -> None:
    model, x = client(3, 4, "normal", seed)
    y, names = labels(4, seed), [name for name, _ in model.named_parameters()]
    weight = torch.arange(1.0, CLASSES + 1, dtype=torch.float64) if loss == "class weights" else None
    logits = model(x)
    value = nn.functional.nll_loss(logits.softmax(1) if weight is None else logits.log_softmax(1), y, weight=weight)
    sent = SharedUpdate(dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True)))
    result = spear.attack(model, sent, time_limit=60)
    assert same(result.inputs, x, 1e-6)
    assert result.labels is None
    assert not result.certified.any()
    assert "another loss than cross_entropy" in result.reason


def test_adams_first_step_is_the_gradient_in_other_clothes() -> None:
    model, x = client(3, 8, "normal", 0)
    after, _ = client(3, 8, "normal", 0)
    optimizer = torch.optim.Adam(after.parameters(), lr=1e-3)
    nn.functional.cross_entropy(after(x), labels(8, 0)).backward()
    optimizer.step()
    sides = (dict(side.named_parameters()) for side in (model, after))
    result = spear.attack(model, difference(model, *sides, learning_rate=1e-3, count=8), time_limit=60)
    assert "a first step of Adam's kind" in result.reason
    assert same(result.inputs, x, 1e-4)
    assert not result.certified.any()
