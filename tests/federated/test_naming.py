"""Names as wrappers and frameworks make them: what belongs to a parameter is found, what belongs to none is named."""

import pytest
import torch
from torch import Generator, Tensor, nn

import spear
from spear.federated import SharedUpdate, gradient
from spear.federated.naming import match, unwrapped
from spear.federated.update import difference, under_names_of

RATE = 0.25
PREFIXES = ["module.", "_orig_mod.", "_module.", "model.", "module._orig_mod.", "net.model.", "_orig_mod.module.net."]


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 90), nn.ReLU(), nn.Linear(90, 80), nn.ReLU(), nn.Linear(80, 5)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 40, generator=Generator().manual_seed(0), dtype=torch.float64), torch.arange(4)


def with_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double().eval()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_changes_nothing(prefix: str) -> None:
    model = chain()
    plain = gradient(model, *batch())
    sent = SharedUpdate({prefix + name: g for name, g in plain.gradients.items()}, count=4)
    found, _ = under_names_of(model, sent)
    assert found.gradients.keys() == plain.gradients.keys()
    assert all(torch.equal(found.gradients[name], g) for name, g in plain.gradients.items())
    assert spear.attack(model, sent, time_limit=60).complete


def test_a_prefix_that_is_no_wrappers_is_said() -> None:
    model = chain()
    sent = SharedUpdate({f"net.{name}": g for name, g in gradient(model, *batch()).gradients.items()}, count=4)
    assert "the names came with the prefix 'net.'" in spear.attack(model, sent, time_limit=60).reason


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_the_model(wrap: type) -> None:
    model = chain()
    assert unwrapped(wrap(model)) is model
    assert spear.attack(wrap(model), gradient(model, *batch()), time_limit=60).complete


def test_a_module_of_anybody_else_may_compute_more() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x / 2)

    model = Halved()
    assert unwrapped(model) is model
    assert match(model, dict(model.named_parameters())).names.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_buffers_and_counters_are_left_out(prefix: str) -> None:
    model = with_statistics()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()} | {"step": torch.tensor(7)}
    assert match(model, state).names == {name: prefix + name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("state", [False, True], ids=["parameters", "state"])
@pytest.mark.parametrize("arrays", [False, True], ids=["tensors", "arrays"])
def test_a_list_is_matched_by_shape_and_order(state: bool, arrays: bool) -> None:
    model = with_statistics()
    tensors = list((model.state_dict() if state else dict(model.named_parameters())).values())
    update, words = under_names_of(model, SharedUpdate([t.detach().numpy() if arrays else t for t in tensors]))
    assert words == ("tensors without names were matched by shape and order",)
    assert update.gradients.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(update.gradients[name], p) for name, p in model.named_parameters())


def test_a_list_that_does_not_fit_is_refused_with_both_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"tensors without names have shapes \(4,\), \(4, 6\); the model's are \(4, 6\)"
    ):
        under_names_of(with_statistics(), SharedUpdate([torch.zeros(4), torch.zeros(4, 6)]))


def test_what_belongs_to_nothing_is_named() -> None:
    model = chain()
    sent = dict(gradient(model, *batch()).gradients) | {"other.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="a gradient for 'other.weight', which the model does not have"):
        spear.attack(model, SharedUpdate(sent))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_of_a_wrapped_module(prefix: str) -> None:
    model = with_statistics()
    before = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    after = {name: t - RATE if t.is_floating_point() else t for name, t in model.state_dict().items()}
    change = difference(model, before, after, learning_rate=RATE).gradients
    assert change.keys() == dict(model.named_parameters()).keys()
    assert all(torch.allclose(g, torch.full_like(g, RATE)) for g in change.values())
