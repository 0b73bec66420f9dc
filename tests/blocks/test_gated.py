"""Tokens that enter a gated block, as of T5 v1.1: an activation, times what another layer makes of the same token."""

from dataclasses import replace

import pytest
import torch
from t5_problems import LENGTH, NAME, derivatives_hold, given, nearest, sent
from torch import Tensor, nn

import spear
from spear import federated
from spear.audit.leaks import jointly
from spear.blocks.view import open_block
from spear.models.tracing import find_block

KINDS = {
    "T5 v1.1": {"activation": nn.GELU("tanh")},
    "LLaMA": {"activation": nn.SiLU(), "norm": lambda d: nn.RMSNorm(d, 1e-6)},
    "biases": {"activation": nn.GELU(), "norm": nn.LayerNorm, "bias": True},
    "ReLU": {"activation": nn.ReLU()},
    "Tanh, biases": {"activation": nn.Tanh(), "bias": True},
}


def gated(kind: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    return sent(seed, 2, d=32, gated=True, wide=3, **KINDS[kind])


@pytest.mark.parametrize(("kind", "seed"), [("T5 v1.1", 0), ("T5 v1.1", 1), *((kind, 2) for kind in KINDS)])
def test_every_token_comes_back(kind: str, seed: int) -> None:
    model, ids, y = gated(kind, seed)
    result = spear.attack(model, federated.gradient(model, ids, y), method="block", seed=seed)
    truth = given(model, NAME, ids)
    assert result.complete, result.reason
    assert result.features_of == NAME
    assert bool((nearest(result.inputs, truth) <= result.error_bound).all())
    assert float(nearest(truth, result.inputs).max()) < 1e-9


@pytest.mark.parametrize("name", [NAME, "layers.0.gate", "layers.1.wi"])
def test_a_block_by_the_name_of_either_layer(name: str) -> None:
    model, _ids, _y = gated("LLaMA", 3)
    block, layer = find_block(model, name, (LENGTH,)), name.rpartition(".")[0]
    assert [part.name for part in (*block.begins, block.second)] == [f"{layer}.wi", f"{layer}.gate", f"{layer}.wo"]
    assert find_block(sent(0)[0], shape=(LENGTH,)).gate is None


def test_an_audit_names_both_layers() -> None:
    model, _ids, _y = gated("LLaMA", 3)
    found = jointly(model, (LENGTH,))
    assert set(found) == {f"layers.{k}.{name}" for k in (0, 1) for name in ("wi", "gate")}
    assert found[NAME]["jointly"].endswith("together with layers.0.gate and layers.0.wo")
    assert found[NAME]["limit"] == 31 // LENGTH


def test_what_is_no_gated_block() -> None:
    """A gate that reads other inputs, or has an activation of its own; one whose gradient was not sent."""
    model, ids, y = gated("LLaMA", 4)
    update = federated.gradient(model, ids, y)
    del update.gradients["layers.0.gate.weight"]
    with pytest.raises(ValueError, match=r"no gradient for layers\.0\.gate\.weight"):
        spear.attack(model, update, layer=NAME, method="block")
    for between in (nn.Tanh(), nn.Linear(96, 96, bias=False)):
        model.layers[0].gate = nn.Sequential(nn.Linear(32, 96, bias=False), between).double()
        with pytest.raises(ValueError, match=rf"behind {NAME}"):
            find_block(model, NAME, (LENGTH,))


def test_a_gradient_that_is_not_the_tokens() -> None:
    model, ids, y = gated("T5 v1.1", 5)
    update = federated.gradient(model, ids, y)
    update.gradients["layers.0.gate.weight"] *= 1 + 1e-4
    assert not bool(spear.attack(model, update, layer=NAME, method="block").certified.any())


def test_the_number_of_tokens_must_be_right() -> None:
    model, ids, y = gated("T5 v1.1", 6)
    update = replace(federated.gradient(model, ids, y), count=3)
    result = spear.attack(model, update, layer=NAME, method="block", time_limit=10)
    assert not bool(result.certified.any())


@pytest.mark.parametrize("kind", ["T5 v1.1", "biases"])
def test_derivatives_of_the_curves(kind: str) -> None:
    """Forth is the derivative of the residual, back its transpose, the matrix holds both; true tokens leave none."""
    model, ids, y = gated(kind, 7)
    view, truth = open_block(model, federated.gradient(model, ids, y), layer=NAME), given(model, NAME, ids)
    extended = torch.cat([truth, torch.ones_like(truth[:, :1])], 1) if view.anchored[0] else truth
    derivatives_hold(view, extended)
