"""Tokens that enter a feed-forward block, from the gradients of its two layers alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from t5_problems import derivatives_hold
from torch import Tensor, nn

import spear
from spear import federated
from spear.blocks.view import open_block
from spear.federated.update import SharedUpdate
from spear.models.tracing import find_block, linear_layers

WIDTH, ENTRIES, CLASSES = 60, 24, 5


class Attention(nn.Module):
    """Of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(ENTRIES, 3 * ENTRIES), nn.Linear(ENTRIES, ENTRIES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2) / ENTRIES**0.5).softmax(-1) @ v)


class Block(nn.Module):
    """Attention, then feed-forward layers, each with a branch around it."""

    def __init__(self, activation: nn.Module, biases: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(ENTRIES), nn.LayerNorm(ENTRIES)
        self.attention = Attention()
        self.up, self.down = nn.Linear(ENTRIES, WIDTH, biases[0]), nn.Linear(WIDTH, ENTRIES, biases[1])
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(self.activation(self.up(self.second(x))))


class Transformer(nn.Module):
    """Blocks over the tokens of a sample, and a head that reads their mean."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Conv1d(1, ENTRIES, 6, 6), nn.Sequential(*blocks), nn.Linear(ENTRIES, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x[:, None]).transpose(1, 2)).mean(1))


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def transformer(activation: nn.Module, seed: int, biases: tuple[bool, bool] = (True, True)) -> nn.Module:
    return made(lambda: Transformer(Block(activation, biases), Block(activation, biases)), seed)


def batch(seed: int, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    x = torch.randn(size, 18, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def entering(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """The tokens that enter a layer."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda _m, given, _out: seen.append(given[0].detach()))
    model(x)
    hook.remove()
    return seen[0].flatten(0, -2)


def apart(found: Tensor, truth: Tensor) -> Tensor:
    """The relative distance of each found token to the nearest true one."""
    distance = torch.cdist(found, truth, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return distance / found.norm(dim=1)


ACTIVATIONS = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.1))


@pytest.mark.parametrize(("activation", "seed"), [(one, k) for k, one in enumerate(ACTIVATIONS)])
def test_every_token_comes_back(activation: nn.Module, seed: int) -> None:
    model, (x, y) = transformer(activation, seed), batch(seed)
    update = federated.gradient(model, x, y)
    result = spear.attack(model, update, method="block" if seed else "auto", seed=seed)
    assert result.method == "block"
    assert result.features_of == "blocks.0.up"
    assert result.complete
    assert result.labels is None
    assert result.inputs.shape == (9, ENTRIES)
    truth = entering(model, "blocks.0.up", x)
    assert bool((apart(result.inputs, truth) <= result.error_bound).all())
    assert float(apart(truth, result.inputs).max()) < 1e-9


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_s_own_encoder(norm_first: bool) -> None:
    def make() -> nn.Module:
        one = nn.TransformerEncoderLayer(ENTRIES, 2, WIDTH, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        return Transformer(nn.TransformerEncoder(one, 2, enable_nested_tensor=False))

    model, (x, y) = made(make, 0), batch(0)
    result = spear.attack(model, federated.gradient(model, x, y), method="block")
    assert result.complete
    name = "blocks.0.layers.0.linear1"
    assert result.features_of == name
    assert float(apart(entering(model, name, x), result.inputs).max()) < 1e-9


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("biases", [(False, True), (True, False), (False, False)])
def test_without_biases(activation: nn.Module, biases: tuple[bool, bool]) -> None:
    """A ReLU between layers that have none leaves the length of a token to the normalisation, up to its epsilon where
    attention's gradient is of fewer dimensions than there are tokens, and a bias of the second layer alone to a factor
    of that bias's gradient: nothing is certified."""
    model, (x, y) = transformer(activation, 1, biases), batch(1)
    result = spear.attack(model, federated.gradient(model, x, y), method="block")
    truth, found = entering(model, "blocks.0.up", x), result.inputs
    open_length = not biases[0] and isinstance(activation, nn.ReLU)
    assert result.complete != open_length
    if open_length:
        assert "length" in result.reason
        assert not bool(result.certified.any())
    assert len(found) == len(truth)
    assert float(apart(truth, found).max()) < (1e-4 if open_length else 1e-8)


def test_a_layer_by_name() -> None:
    """A later block is as good as the first; what is no block is refused, by name."""
    model, (x, y) = made(lambda: Transformer(*(Block(nn.ReLU()) for _ in range(3))), 2), batch(2)
    update = federated.gradient(model, x, y)
    result = spear.attack(model, update, layer="blocks.1.up", method="block")
    assert result.features_of == "blocks.1.up"
    assert result.complete
    assert float(apart(entering(model, "blocks.1.up", x), result.inputs).max()) < 1e-8
    with pytest.raises(ValueError, match=r"behind blocks\.0\.down"):
        spear.attack(model, update, layer="blocks.0.down", method="block")
    with pytest.raises(ValueError, match="no linear layer named 'none'"):
        spear.attack(model, update, layer="none", method="block")


def test_one_layer_of_a_transformer() -> None:
    """A ReLU's layer alone gives its tokens too, as many as the samples have."""
    model, (x, y) = transformer(nn.ReLU(), 3), batch(3)
    result = spear.attack(model, federated.gradient(model, x, y), layer="blocks.0.up", method="layer", time_limit=30)
    assert result.complete
    assert float(apart(entering(model, "blocks.0.up", x), result.inputs).max()) < 1e-8


def test_a_chain_is_no_block_unless_it_is_named() -> None:
    x, y = batch(0)
    model = spear.models.fcnn((18,), width=30, depth=4, classes=CLASSES, seed=0)
    update = federated.gradient(model, x, y)
    with pytest.raises(ValueError, match="several tokens"):
        spear.attack(model, update, method="block")
    result = spear.attack(model, update, method="block", layer="fc1")
    assert result.complete
    assert not result.features_of
    assert float(apart(result.inputs, x).max()) < 1e-9


@pytest.mark.parametrize(("count", "wrong"), [(None, "not known"), (4, "9 tokens were found, 12"), (2, "9 tokens")])
def test_the_number_of_tokens_must_be_right(count: int | None, wrong: str) -> None:
    model, (x, y) = transformer(nn.GELU(), 4), batch(4)
    update = replace(federated.gradient(model, x, y), count=count)
    result = spear.attack(model, update, method="block", time_limit=20)
    assert not bool(result.certified.any())
    assert not result.complete
    assert wrong in result.reason


def test_too_many_tokens() -> None:
    """As many tokens as a token has entries: the gradients have no room for them, and the reason says so."""
    model, (x, y) = transformer(nn.GELU(), 5), batch(5, size=9)
    update = federated.gradient(model, x, y)
    with pytest.raises(ValueError, match=r"27 tokens \(3 of each sample\)"):
        spear.attack(model, update, method="block")
    with pytest.raises(ValueError, match="full rank"):
        spear.attack(model, replace(update, count=None), method="block")


def test_a_gradient_that_is_not_the_tokens() -> None:
    model, (x, y) = transformer(nn.GELU(), 6), batch(6)
    update = federated.gradient(model, x, y)
    update.gradients["blocks.0.up.weight"] *= 1 + 1e-4
    result = spear.attack(model, update, method="block")
    assert not bool(result.certified.any())


def test_the_last_of_a_mean() -> None:
    """Behind the last block a mean reads the tokens: their gradients are one, and no token is told from the others."""
    model, (x, y) = transformer(nn.GELU(), 7), batch(7)
    with pytest.raises(ValueError, match=r"down 3: tokens"):
        spear.attack(model, federated.gradient(model, x, y), method="block", layer="blocks.1.up")


def test_single_precision() -> None:
    model, (x, y) = transformer(nn.GELU(), 8).float(), batch(8)
    result = spear.attack(model, federated.gradient(model, x.float(), y), method="block")
    truth = entering(model, "blocks.0.up", x.float()).double()
    assert len(result.inputs) == len(truth)
    off = apart(result.inputs.double(), truth)
    assert bool((off <= result.error_bound).all())
    assert torch.equal(result.certified, result.error_bound <= result.limit) or not result.complete


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
def test_derivatives_of_the_curves(activation: nn.Module) -> None:
    """Forth is the derivative of the residual, back its transpose, the matrix holds both; true tokens leave none."""
    model, (x, y) = transformer(activation, 9), batch(9)
    view = open_block(model, federated.gradient(model, x, y))
    derivatives_hold(view, torch.cat([entering(model, "blocks.0.up", x), torch.ones(9, 1, dtype=torch.float64)], 1))


def test_rows_of_each_layer() -> None:
    model = transformer(nn.GELU(), 0)
    rows = {layer.name: layer.rows for layer in linear_layers(model, (18,))}
    assert rows["blocks.0.up"] == rows["blocks.1.down"] == 3
    assert rows["head"] == 1
    block = find_block(model, shape=(18,))
    assert (block.first.name, block.second.name) == ("blocks.0.up", "blocks.0.down")


def test_update_without_a_shape() -> None:
    """Without a sample's shape the number of tokens is not known: they come, uncertified."""
    model, (x, y) = transformer(nn.ReLU(), 10), batch(10)
    update = SharedUpdate(federated.gradient(model, x, y).gradients, count=len(x))
    result = spear.attack(model, update, method="block", layer="blocks.0.up")
    assert "not known" in result.reason
    assert not bool(result.certified.any())
    assert float(apart(entering(model, "blocks.0.up", x), result.inputs).max()) < 1e-8


def test_counting_rows_leaves_a_model_as_it_is() -> None:
    """Rows are counted by running the model: its mode, its buffers and torch's generator stay as they were."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    buffers, state = {k: v.clone() for k, v in model.named_buffers()}, torch.get_rng_state()
    assert [layer.rows for layer in linear_layers(model, (6,))] == [1, 1]
    assert model.training
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
