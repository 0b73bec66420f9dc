"""Samples behind the tokens of a transformer's first block."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import spear
from spear import federated
from spear.blocks import images
from spear.models.sublayers import sublayer
from spear.models.tracing import traced_model

SIDE, PATCH, ENTRIES, WIDTH, CLASSES = 8, 4, 32, 80, 5


class Attention(nn.Module):
    """Of two heads."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(ENTRIES, 3 * ENTRIES), nn.Linear(ENTRIES, ENTRIES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        read = (q @ k.transpose(2, 3) / (ENTRIES / 2) ** 0.5).softmax(-1) @ v
        return self.out(read.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then feed-forward layers, each normalised before it and with a branch around it."""

    def __init__(self, bias: bool = True, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.first, self.second, self.attention = norm(ENTRIES), norm(ENTRIES), Attention(bias)
        self.up, self.activation, self.down = nn.Linear(ENTRIES, WIDTH), nn.GELU(), nn.Linear(WIDTH, ENTRIES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(self.activation(self.up(self.second(x))))


class ViT(nn.Module):
    """Patches of a grey picture, positions, two blocks, a mean or a token of its own for the class."""

    def __init__(
        self, *, own: bool = False, positions: float = 0.02, entries: int = ENTRIES, bias: bool = True
    ) -> None:
        super().__init__()
        tokens = (SIDE // PATCH) ** 2 + own
        self.patches = nn.Conv2d(1, entries, PATCH, PATCH)
        self.position = nn.Parameter(positions * torch.randn(1, tokens, entries))
        self.token = nn.Parameter(torch.randn(1, 1, entries)) if own else None
        self.blocks = nn.Sequential(Block(bias), Block(bias))
        self.norm, self.head = nn.LayerNorm(entries), nn.Linear(entries, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        e = self.patches(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            e = torch.cat([self.token.expand(e.shape[0], -1, -1), e], 1)
        e = self.norm(self.blocks(e + self.position))
        return self.head(e[:, 0] if self.token is not None else e.mean(1))


def encoder() -> nn.Module:
    """The same of torch's own layers."""
    model = ViT()
    one = nn.TransformerEncoderLayer(ENTRIES, 2, WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
    model.blocks = nn.TransformerEncoder(one, 2, enable_nested_tensor=False)
    return model


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def batch(seed: int, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    x = torch.rand(size, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def t5() -> nn.Module:
    """The same with RMSNorm, ReLU and no biases in its blocks."""
    model = ViT()
    model.blocks = nn.Sequential(*(Block(False, lambda d: nn.RMSNorm(d, 1e-6)) for _ in range(2)))
    for block in model.blocks:
        block.up, block.down = nn.Linear(ENTRIES, WIDTH, bias=False), nn.Linear(WIDTH, ENTRIES, bias=False)
        block.activation = nn.ReLU()
    return model


MODELS = (ViT, lambda: ViT(own=True), lambda: ViT(bias=False), encoder, t5)


@pytest.mark.parametrize(("make", "seed"), [(make, k) for k, make in enumerate(MODELS)])
def test_every_image_comes_back(make: Callable[[], nn.Module], seed: int) -> None:
    model, (x, y) = made(make, seed), batch(seed)
    result = spear.attack(model, federated.gradient(model, x, y), method="block")
    assert result.complete, result.reason
    assert not result.features_of
    assert result.inputs.shape == x.shape
    distance = torch.cdist(result.inputs.flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    off, nearest = distance.min(1)
    assert bool((off <= result.error_bound * x[nearest].flatten(1).norm(dim=1)).all())
    assert sorted(nearest.tolist()) == [0, 1, 2]
    assert torch.equal(result.labels, y[nearest])


@pytest.mark.parametrize("own", [False, True])
def test_without_positions_tokens_come_back(own: bool) -> None:
    model, (x, y) = made(lambda: ViT(positions=0.0), 0), batch(0)
    if own:  # the stream is no affine function of a sample
        model.patches = nn.Sequential(model.patches, nn.Tanh())
    result = spear.attack(model, federated.gradient(model, x, y), method="block")
    assert result.features_of == "blocks.0.up"
    assert result.complete
    assert ("not affine" if own else "does not show its position") in result.reason


def test_another_gradient_certifies_no_image() -> None:
    """The block's gradients are sound, that of what computes the tokens is not."""
    model, (x, y) = made(ViT, 1), batch(1)
    update = federated.gradient(model, x, y)
    update.gradients["patches.weight"] *= 1 + 1e-4
    result = spear.attack(model, update, method="block")
    assert not result.features_of
    assert not bool(result.certified.any())
    assert not result.complete


@pytest.mark.parametrize("seed", range(2))
def test_steps_down(seed: int) -> None:
    """Each step gives what the model computed: the stream up to its mean, positions, samples."""
    model, x = made(ViT, seed), batch(seed)[0]
    part = sublayer(traced_model(model, (1, SIDE, SIDE)), "blocks.0.up")
    stream = images.stream_of(part, (1, SIDE, SIDE), x)
    with torch.no_grad():
        e = model.patches(x).flatten(2).transpose(1, 2) + model.position
    torch.testing.assert_close(torch.einsum("tnk,bk->btn", stream.slope, x.flatten(1)) + stream.start, e)
    place, alone = images.positions(stream, e.flatten(0, 1) - e.flatten(0, 1).mean(1, keepdim=True))
    assert alone
    assert torch.equal(place, torch.arange(4).repeat(3))
    found, missing = images.samples(stream, e + torch.randn(3, 4, 1, dtype=torch.float64), (1, SIDE, SIDE))
    assert not missing
    torch.testing.assert_close(found, x)
    with torch.no_grad():
        c = (part.branch(e) - part.out.bias) @ torch.linalg.inv(part.out.weight).T
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = images.Streamed(e.flatten(0, 1)[order], c.flatten(0, 1)[order])
    index = images.members(part.branch, part, shuffled, place[order], stream)
    assert {tuple(row) for row in order[index].tolist()} == {tuple(range(k, k + 4)) for k in (0, 4, 8)}
