"""Tokens that enter a transformer's feed-forward block, from one gradient: exact and certified tokens, images, seconds.

    python benchmarks/blocks.py [--cases NAME ...] [--seeds S ...] [--limit SECONDS] [--csv FILE]

Of a `block` case the tokens are those of CIFAR-10 patches in a fresh transformer, and the gradient by what the block
adds is drawn at random: d entries a token, m units, n tokens. A `vit` is attacked whole, by `spear.attack` told
nothing: its images are what comes back where its first block determines them; a `t5` is one of RMSNorm and ReLU,
without biases. Seconds are those of the processor. Data sets that are not there are skipped; `--csv` writes one row a
case and seed, as benchmarks/blocks.csv.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import seeded
import torch
from torch import Tensor, nn

from spear import data, federated
from spear.federated.update import SharedUpdate
from spear.inversion import attack
from spear.reconstruction import Reconstruction

PATCH, SIDE, HEADS, DEPTH = 8, 32, 4, 2
EXACT = 1e-6  # relative error


class Attention(nn.Module):
    def __init__(self, entries: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.out = nn.Linear(entries, 3 * entries, bias), nn.Linear(entries, entries, bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Normalised before each of its layers; `bare`, as T5's and LLaMA's, by RMSNorm, and without biases."""

    def __init__(
        self, entries: int, width: int, activation: Callable[[], nn.Module], bare: bool = False, gated: bool = False
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(entries, 1e-6) if bare else nn.LayerNorm(entries) for _ in range(2))
        self.attention, self.activation = Attention(entries, HEADS, not bare), activation()
        self.up, self.down = nn.Linear(entries, width, not bare), nn.Linear(width, entries, not bare)
        self.gate = nn.Linear(entries, width, not bare) if gated else None

    def feed(self, x: Tensor) -> Tensor:
        a = self.activation(self.up(x))
        return self.down(a if self.gate is None else a * self.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class ViT(nn.Module):
    """Patches, learned positions, blocks, the mean of the tokens."""

    def __init__(
        self, entries: int, width: int, activation: Callable[[], nn.Module], bare: bool = False, gated: bool = False
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, entries, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2, entries))
        self.blocks = nn.Sequential(*(Block(entries, width, activation, bare, gated) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(entries), nn.Linear(entries, 10)

    def embed(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.position

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


class Feed(nn.Module):
    """The two layers of a block alone."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.up, self.activation, self.down = block.up, block.activation, block.down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


@dataclass(frozen=True)
class Case:
    """Entries d of a token, units m, an activation; n tokens of a block, or b images of a transformer, whose blocks
    may be `bare` (T5's) and `gated` (with it, LLaMA's)."""

    entries: int
    width: int
    activation: Callable[[], nn.Module]
    tokens: int = 0
    images: int = 0
    bare: bool = False
    gated: bool = False
    dtype: torch.dtype = torch.float64


CASES = {
    f"{name}-{width}-{tokens}": Case(entries, width, activation, tokens)
    for name, activation in (("gelu", nn.GELU), ("relu", nn.ReLU))
    for entries, width, tokens in ((192, 400, 64), (192, 400, 133), (256, 768, 256))
}
CASES |= {
    "vit-256-gelu-4": Case(256, 1024, nn.GELU, images=4),
    "vit-256-relu-4": Case(256, 1024, nn.ReLU, images=4),
    "vit-192-gelu-4": Case(192, 768, nn.GELU, images=4),
    "t5-400-64": Case(192, 400, nn.ReLU, images=4, bare=True),
    "llama-400-64": Case(192, 400, nn.SiLU, images=4, bare=True, gated=True),
    "vit-256-gelu-4-float32": Case(256, 1024, nn.GELU, images=4, dtype=torch.float32),
}


@dataclass(frozen=True)
class Row:
    """What one run measured: of tokens, or of images where they came back; seconds of the processor."""

    case: str
    seed: int
    returned: str
    sent: int
    exact: int
    worst_error: float
    certified: int
    labels_right: float
    cpu_seconds: float
    reason: str


def model_of(case: Case, seed: int) -> ViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(case.entries, case.width, case.activation, case.bare, case.gated).to(case.dtype).eval()


def of_block(case: Case, seed: int) -> tuple[nn.Module, SharedUpdate, Tensor]:
    """A block, the gradients of its two layers, and the tokens that entered it."""
    model, patches = model_of(case, seed), (SIDE // PATCH) ** 2
    x, _ = data.load("cifar10", count=-(-case.tokens // patches), seed=seed)
    block = model.blocks[0]
    with torch.no_grad():
        e = model.embed(x.to(case.dtype))
        tokens = block.norm2(e + block.attention(block.norm1(e))).flatten(0, 1)[: case.tokens]
    generator = torch.Generator().manual_seed(seed)
    by_output = torch.randn(len(tokens), case.entries, generator=generator, dtype=torch.float64).to(tokens)
    feed = Feed(block)
    names, parameters = zip(*feed.named_parameters(), strict=True)
    gradients = torch.autograd.grad(feed(tokens), parameters, by_output)
    told = {"count": 1, "input_shape": tuple(tokens.shape)}
    return feed, SharedUpdate(dict(zip(names, gradients, strict=True)), **told), tokens


def error_of(found: Tensor, truth: Tensor) -> Tensor:
    """The relative distance of each true row to the nearest found one."""
    if not len(found):
        return torch.ones(len(truth))
    apart = torch.cdist(truth.double(), found.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return apart.amin(1) / truth.double().norm(dim=1)


def measure(name: str, case: Case, seed: int, limit: float) -> Row:
    """One attack on the gradient of a batch of real images."""
    if case.tokens:
        model, update, truth = of_block(case, seed)
        return _row(name, seed, *_timed(model, update, limit, seed, layer="up", method="block"), truth)
    x, y = data.load("cifar10", count=case.images, seed=seed)
    model, x = model_of(case, seed), x.to(case.dtype)
    found, seconds = _timed(model, federated.gradient(model, x, y), limit, seed)
    if not found.features_of:
        return _row(name, seed, found, seconds, x.flatten(1), y)
    with torch.no_grad():
        e, block = model.embed(x), model.blocks[0]
        tokens = block.norm2(e + block.attention(block.norm1(e))).flatten(0, 1)
    return _row(name, seed, found, seconds, tokens)


def _timed(
    model: nn.Module, update: SharedUpdate, limit: float, seed: int, **told: str
) -> tuple[Reconstruction, float]:
    begin = time.process_time()
    found = attack(model, update, time_limit=limit, seed=seed, **told)
    return found, time.process_time() - begin


def _row(
    name: str, seed: int, found: Reconstruction, seconds: float, truth: Tensor, labels: Tensor | None = None
) -> Row:
    off, right = error_of(found.inputs.flatten(1), truth), 0.0
    if labels is not None and found.labels is not None:
        nearest = torch.cdist(truth.double(), found.inputs.flatten(1).double()).argmin(1)
        right = float((found.labels[nearest] == labels).double().mean())
    returned = "images" if labels is not None else f"tokens of {found.features_of or 'the block'}"
    exact, certified = int((off < EXACT).sum()), int(found.certified.sum())
    return Row(name, seed, returned, len(truth), exact, float(off.max()), certified, right, seconds, found.reason)


if __name__ == "__main__":
    seeded.run(measure, CASES, limit=600.0, about=__doc__)
