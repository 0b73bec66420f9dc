"""Tokens of blocks without biases: their lengths, from the normalisation before the block."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from t5_problems import CLASSES, LENGTH, NAME, T5Norm, given, nearest, sent
from torch import Tensor, nn

import spear
from spear import federated
from spear.blocks.view import open_block
from spear.federated.update import SharedUpdate
from spear.models.sublayers import added, normalised
from spear.models.tracing import traced_model
from spear.reconstruction import Reconstruction


def attacked(model: nn.Module, update: SharedUpdate, name: str = NAME, seed: int = 0) -> Reconstruction:
    return spear.attack(model, update, layer=name, method="block", seed=seed)


def check_certified(result: Reconstruction, truth: Tensor, exact: float = 1e-9) -> None:
    assert result.complete, result.reason
    assert "lengths by the normalisation" in result.reason
    assert bool((nearest(result.inputs, truth) <= result.error_bound).all())
    assert float(nearest(truth, result.inputs).max()) < exact


def check_open(result: Reconstruction, truth: Tensor) -> None:
    """Every direction, and nothing certified."""
    assert "length of each token" in result.reason
    assert not bool(result.certified.any())
    assert not result.complete
    truth, found = (x / x.norm(dim=1, keepdim=True) for x in (truth, result.inputs))
    assert len(found) == len(truth)
    assert float(nearest(truth, found).max()) < 1e-8


NORMS = {
    "T5": T5Norm,
    "RMSNorm": lambda d: nn.RMSNorm(d, 1e-6),
    "no bias": lambda d: nn.LayerNorm(d, bias=False),
    "LayerNorm": nn.LayerNorm,
}


@pytest.mark.parametrize(("kind", "seed"), [("T5", 0), ("T5", 1), ("T5", 2), *((kind, 3) for kind in NORMS)])
def test_every_token_at_its_length(kind: str, seed: int) -> None:
    model, ids, y = sent(seed, norm=NORMS[kind])
    result = spear.attack(model, federated.gradient(model, ids, y), method="block", seed=seed)
    assert result.features_of == NAME
    check_certified(result, given(model, NAME, ids))


class Own(nn.Module):
    """Of torch's own layers, opened by `torch.export`."""

    def __init__(self, norm_first: bool, d: int = 32) -> None:
        super().__init__()
        kind = {"batch_first": True, "norm_first": norm_first, "bias": False}
        one = nn.TransformerEncoderLayer(d, 2, 4 * d, 0.0, "relu", **kind)
        self.embed, self.head = nn.Linear(24, d), nn.Linear(d, CLASSES)
        self.encoder = nn.TransformerEncoder(one, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_s_own_encoder(norm_first: bool) -> None:
    """Where the normalised tokens themselves go past the block, no gradient tells r."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Own(norm_first).double().eval(), torch.randn(2, 6, 24, dtype=torch.float64)
    name = "encoder.layers.0.linear1"
    result = attacked(model, federated.gradient(model, x, torch.tensor([1, 2])), name)
    (check_certified if norm_first else check_open)(result, given(model, name, x))


@pytest.mark.parametrize(("d", "count"), [(64, 7), (96, 8)])
def test_as_many_tokens_as_there_is_room_for(d: int, count: int) -> None:
    model, ids, y = sent(d, count, d=d)
    check_certified(attacked(model, federated.gradient(model, ids, y)), given(model, NAME, ids))


@pytest.mark.parametrize("norm", [T5Norm, nn.LayerNorm])
def test_trained_gains_and_shifts(norm: Callable[[int], nn.Module]) -> None:
    model, ids, y = sent(0, norm=norm)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.layers:
            for p in layer.norm.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    check_certified(attacked(model, federated.gradient(model, ids, y)), given(model, NAME, ids))
    check_certified(attacked(model, federated.gradient(model, ids, y), "layers.1.wi"), given(model, "layers.1.wi", ids))


@pytest.mark.parametrize("norm", [T5Norm, nn.LayerNorm])
def test_small_streams(norm: Callable[[int], nn.Module]) -> None:
    """Epsilon is then no small part: the mean of the squares is far from 1, and known all the same."""
    model, ids, y = sent(1, norm=norm)
    with torch.no_grad():
        model.shared.weight *= 0.01
        model.layers[0].attention.o.weight *= 0.01
    truth = given(model, NAME, ids)
    assert float((1 - truth.square().mean(1)).max()) > 1e-3
    check_certified(attacked(model, federated.gradient(model, ids, y)), truth)


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), Squared()])
def test_other_activations_that_leave_the_length_open(activation: nn.Module) -> None:
    model, ids, y = sent(2, 2, d=32, activation=activation)
    update = federated.gradient(model, ids, y)
    assert not open_block(model, update).is_scaled
    check_certified(attacked(model, update), given(model, NAME, ids))
    del update.gradients["layers.0.attention.o.weight"]
    check_open(attacked(model, update), given(model, NAME, ids))


def test_a_norm_in_single_precision() -> None:
    """What it leaves in a length is in the bound."""
    model, ids, y = sent(3, norm=lambda d: T5Norm(d, coarse=True))
    result = attacked(model, federated.gradient(model, ids, y))
    check_certified(result, given(model, NAME, ids), exact=1e-6)
    assert float(result.error_bound.min()) > 1e-8


def test_single_precision() -> None:
    model, ids, y = sent(4)
    model = model.float()
    result = attacked(model, federated.gradient(model, ids, y))
    off = nearest(result.inputs.double(), given(model, NAME, ids).double())
    assert len(off) == ids.numel()
    assert bool((off <= result.error_bound).all())
    assert bool(result.certified.any())


@pytest.mark.parametrize("wrong", ["not sent", "twice", "too many", "noise"])
def test_lengths_up_to_epsilon(wrong: str) -> None:
    """Where r is not known the length is, up to a share of epsilon / 2r²: said, not certified."""
    model, ids, y = sent(5, 6 if wrong == "too many" else 4)
    model.layers[0].past = 2 if wrong == "twice" else 1
    update = federated.gradient(model, ids, y)
    name = "layers.0.attention.o.weight"
    if wrong == "not sent":
        del update.gradients[name]
    if wrong == "noise":
        noise = torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        update.gradients[name] += 0.01 * update.gradients[name].norm() * noise / noise.norm()
    result, truth, h = attacked(model, update), given(model, NAME, ids), given(model, "layers.0.norm", ids)
    check_open(result, truth)
    assert "1e-06 / 2r²" in result.reason
    nearest_to = torch.cdist(result.inputs, truth).argmin(1)
    share = 1e-6 / (2 * h.square().mean(1)[nearest_to])
    longer = result.inputs.norm(dim=1) / truth[nearest_to].norm(dim=1) - 1
    torch.testing.assert_close(longer, share, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("between", [nn.Linear(48, 48, bias=False), nn.Tanh()])
def test_something_between_the_norm_and_the_block(between: nn.Module) -> None:
    model, ids, y = sent(6, between=between)
    update = federated.gradient(model, ids, y)
    assert open_block(model, update, layer=NAME).before is None
    check_open(attacked(model, update), given(model, NAME, ids))


@pytest.mark.parametrize(("gain", "shift", "why"), [(0.0, 0.0, "1 entries of"), (1.0, 9.0, "adds is larger")])
def test_entries_that_tell_no_length(gain: float, shift: float, why: str) -> None:
    model, ids, y = sent(7, norm=nn.LayerNorm)
    with torch.no_grad():
        model.layers[0].norm.weight[3], model.layers[0].norm.bias[3] = gain, shift
    result = attacked(model, federated.gradient(model, ids, y))
    check_open(result, given(model, NAME, ids))
    assert why in result.reason


def test_what_stands_before_a_block() -> None:
    """Norms are known by what they compute; a stream that is read elsewhere too is none of a block alone."""
    kinds = {}
    for kind, norm in NORMS.items():
        traced = traced_model(sent(0, norm=norm)[0], (LENGTH,))
        found = normalised(traced, NAME)
        assert found.rounding < 1e-14
        assert [str(out.target) for out in added(traced, found, [NAME], "layers.0.wo")] == ["layers.0.attention.o"]
        assert added(traced, found, [NAME], "layers.1.wo") == []
        kinds[kind] = found.norm.kind, round(found.norm.eps, 9)
    assert kinds["T5"] == kinds["RMSNorm"] == ("rms", 1e-6)
    assert kinds["no bias"] == kinds["LayerNorm"] == ("layer", 1e-5)
    model = sent(0)[0]
    model.layers[0].past = 3
    traced = traced_model(model, (LENGTH,))
    assert added(traced, normalised(traced, NAME), [NAME], "layers.0.wo") == []


def test_the_number_of_tokens_must_be_disclosed() -> None:
    model, ids, y = sent(8)
    result = attacked(model, replace(federated.gradient(model, ids, y), count=None))
    assert "not known" in result.reason
    assert not bool(result.certified.any())
    assert float(nearest(given(model, NAME, ids), result.inputs).max()) < 1e-9


class Mixed(nn.Module):
    """A block of ReLU with biases, whose tokens are averaged."""

    def __init__(self, seed: int, *, zero: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.head = nn.Linear(8, 64), nn.Linear(64, 24), nn.Linear(24, CLASSES)
        if zero:
            nn.init.zeros_(self.first.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))).tanh().mean(1))


@pytest.mark.parametrize(("zero", "factor"), [(False, 1.0), (True, 1.0), (True, 2.0)])
@pytest.mark.parametrize("seed", range(2))
def test_biases_that_are_zero_do_not_tell_lengths(seed: int, factor: float, zero: bool) -> None:
    model = Mixed(seed, zero=zero)
    x = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    update = federated.gradient(model, x, torch.tensor([0, 1, 1]))
    sent = {name: g * factor if name.endswith("bias") else g for name, g in update.gradients.items()}
    result = attacked(model, replace(update, gradients=sent), "first")
    assert float(nearest(x.flatten(0, 1), result.inputs * factor).max()) < 1e-8
    assert bool(result.certified.all()) is not zero
    assert result.complete is not zero
    assert zero is ("may have a factor of their own" in result.reason)


class Gauss(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.exp(-(z**2))


@pytest.mark.parametrize("activation", [nn.Tanh, Gauss, nn.GELU])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_a_token_and_its_mirror_image(seed: int, b: int, activation: type[nn.Module]) -> None:
    """Behind an odd or even activation without biases -x gives both gradients: its sign is not certain."""
    torch.manual_seed(seed)
    parts = nn.Linear(20, 48, bias=False), activation(), nn.Linear(48, 30, bias=False), nn.ReLU(), nn.Linear(30, 5)
    model = nn.Sequential(*parts).double()
    x = torch.randn(b, 20, dtype=torch.float64)
    update = federated.gradient(model, x, torch.randint(5, (b,)))
    result = spear.attack(model, update, method="block", layer="0", seed=seed, time_limit=20)
    if activation is nn.GELU:
        assert result.complete, result.reason
        assert bool((nearest(result.inputs, x) <= result.error_bound).all())
    else:
        assert not result.certified.any()
        assert not result.complete
