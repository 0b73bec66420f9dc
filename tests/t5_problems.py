"""Encoders as T5's, small, whose samples are tokens by number, and what enters their blocks."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spear.blocks.curves import TokenCurves
from spear.blocks.view import BlockView

VOCABULARY, CLASSES, LENGTH = 300, 5, 8
NAME = "layers.0.wi"


class T5Norm(nn.Module):
    """By the root mean square, in single precision if `coarse`, as T5 is written."""

    def __init__(self, d: int, coarse: bool = False) -> None:
        super().__init__()
        self.weight, self.coarse, self.eps = nn.Parameter(torch.ones(d)), coarse, 1e-6

    def forward(self, h: Tensor) -> Tensor:
        squares = (h.float() if self.coarse else h).pow(2).mean(-1, keepdim=True)
        return self.weight * (h * torch.rsqrt(squares + self.eps))


class Attention(nn.Module):
    """Of four heads, with biases by distance."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.distance = nn.Embedding(2 * LENGTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        at = torch.arange(LENGTH)
        scores = q @ k.transpose(2, 3) + self.distance(at[None] - at[:, None] + LENGTH).permute(2, 0, 1)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Of T5; `between` stands before the block, h goes past it `past` times."""

    def __init__(self, d: int, kind: "Kind") -> None:
        super().__init__()
        self.attention, self.before, self.norm = Attention(d), kind.norm(d), kind.norm(d)
        self.wi, self.wo = nn.Linear(d, kind.wide * d, kind.bias), nn.Linear(kind.wide * d, d, kind.bias)
        self.gate = nn.Linear(d, kind.wide * d, kind.bias) if kind.gated else None
        self.activation, self.between, self.drop, self.past = kind.activation, kind.between, nn.Dropout(0.1), 1

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.drop(self.attention(self.before(h)))
        x = self.between(self.norm(h))
        a = self.activation(self.wi(x))
        given = self.drop(self.wo(self.drop(a if self.gate is None else a * self.gate(x))))
        return h + given if self.past == 1 else self.past * h + given


@dataclass(frozen=True)
class Kind:
    """Of a layer: the block is `wide` times as wide as a token."""

    norm: Callable[[int], nn.Module] = T5Norm
    activation: nn.Module = field(default_factory=nn.ReLU)
    between: nn.Module = field(default_factory=nn.Identity)
    gated: bool = False
    bias: bool = False
    wide: int = 4


class Encoder(nn.Module):
    """Of tokens by number, and a head that reads their mean."""

    def __init__(self, d: int, kind: Kind) -> None:
        super().__init__()
        self.shared, self.norm, self.head = nn.Embedding(VOCABULARY, d), kind.norm(d), nn.Linear(d, CLASSES)
        self.layers = nn.ModuleList(Layer(d, kind) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.shared(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))


def sent(seed: int, count: int = 4, d: int = 48, **kind: object) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, a batch and its labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder(d, Kind(**kind)).double().eval()
        ids = torch.randint(VOCABULARY, (count, LENGTH))
        return model, ids, torch.randint(CLASSES, (count,))


def given(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """What is given to a module, one row a token."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach()))
    model(ids)
    hook.remove()
    return seen[0].flatten(0, 1)


def nearest(found: Tensor, truth: Tensor) -> Tensor:
    """The relative distance of each token found to a true one."""
    apart = torch.cdist(found, truth, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return apart / found.norm(dim=1)


def derivatives_hold(view: BlockView, truth: Tensor) -> None:
    """Forth is the derivative of the residual, back its transpose, the matrix holds both; true tokens leave none."""
    curves, labels = TokenCurves.of(view, *view.factors()), torch.zeros(len(truth), dtype=torch.long)
    assert float(curves.at(curves.coordinates(truth), labels).sine.max()) < 1e-12
    generator = torch.Generator().manual_seed(0)
    w, v = torch.randn(2, len(truth), curves.frame.shape[1], generator=generator, dtype=torch.float64)
    at, u = curves.at(w, labels), torch.randn(len(truth), len(curves.span), generator=generator, dtype=torch.float64)
    u = u - u @ curves.span @ curves.span.T
    step = 1e-6
    slope = (curves.at(w + step * v, labels).rest - curves.at(w - step * v, labels).rest) / (2 * step)
    torch.testing.assert_close(curves.forth(at, v), slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close((curves.forth(at, v) * u).sum(1), (v * curves.back(at, u)).sum(1))
    torch.testing.assert_close(torch.einsum("kqm,kq->km", curves.matrix(at), v), curves.forth(at, v))
