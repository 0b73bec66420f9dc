"""A front with ReLU and max-pools made smooth, so that its derivative sees both sides of a kink."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from spear.models.traced import Traced, operation, source_of

RELUS = {"relu"}
POOLS = {"max_pool2d", "boolean_dispatch"}
LEAST = 30.0  # temperatures under the largest value: what weighs nothing


class Softness:
    """How smooth a front is: the temperature (k,) of each sample's ReLUs and max-pools, relative to the spread of what
    enters them for inputs that were `measured`; sharp without one."""

    def __init__(self) -> None:
        self.temperature: Float[Tensor, " k"] | None = None
        self.measuring = False


class Soft(nn.Module):
    """A part that is as smooth as its `softness` says."""

    def __init__(self, softness: Softness) -> None:
        super().__init__()
        self.softness = softness
        self.spread = torch.ones(())

    def forward(self, z: Float[Tensor, "k *shape"]) -> Float[Tensor, "k *made"]:
        if self.softness.measuring:
            self.spread = z.flatten(1).std(1, correction=0)
        if self.softness.temperature is None:
            return self.sharp(z)
        t, spread = self.softness.temperature, self.spread
        t = t * spread if len(t) == len(spread) else (t.mean() * spread.mean()).reshape(1)  # rows that are no samples
        return self.smooth(z, t.clamp_min(1e-30).reshape(-1, *[1] * (z.ndim - 1)))

    def sharp(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def smooth(self, z: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError


class SoftReLU(Soft):
    """t log(1 + exp(z / t))."""

    def sharp(self, z: Tensor) -> Tensor:
        return z.relu()

    def smooth(self, z: Tensor, t: Tensor) -> Tensor:
        return t * F.softplus((z / t).clamp_min(-LEAST))


class SoftMaxPool(Soft):
    """The mean of a window, weighted by exp(z / t)."""

    def __init__(self, pool: nn.MaxPool2d, softness: Softness) -> None:
        super().__init__(softness)
        self.pool = pool

    def sharp(self, z: Tensor) -> Tensor:
        return self.pool(z)

    def smooth(self, z: Float[Tensor, "k c h w"], t: Tensor) -> Float[Tensor, "k c h1 w1"]:
        (kh, kw), (sh, sw), (ph, pw) = (_pair(x) for x in (self.pool.kernel_size, self.pool.stride, self.pool.padding))
        if ph or pw:
            z = F.pad(z, (pw, pw, ph, ph), value=float(z.detach().min() - LEAST * t.max()))
        bottom, right = z.shape[2] - kh + 1, z.shape[3] - kw + 1
        entries = torch.stack([z[:, :, i : i + bottom : sh, j : j + right : sw] for i in range(kh) for j in range(kw)])
        under = (entries - entries.detach().amax(0)) / t
        return (torch.softmax(under.clamp_min(-LEAST), 0) * entries).sum(0)


def measured(front: nn.Module, softness: Softness, inputs: Float[Tensor, "k *shape"]) -> None:
    """Takes the spread of what enters the soft parts from these inputs, each sample's own."""
    softness.temperature, softness.measuring = None, True
    with torch.no_grad():
        front(inputs)
    softness.measuring = False


def _pair(size: Any) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def softened(front: fx.GraphModule) -> tuple[fx.GraphModule, Softness]:
    """A copy that is as smooth as the `Softness` says; max-pools with dilation stay as they are."""
    made, softness = copy.deepcopy(front), Softness()
    traced = Traced(made, training=False)
    for node in traced.nodes:
        part = _soft(traced, node, softness)
        if part is not None:
            name = f"soft_{node.name}"
            made.add_submodule(name, part)
            with made.graph.inserting_before(node):
                node.replace_all_uses_with(made.graph.call_module(name, (source_of(node),)))
            made.graph.erase_node(node)
    made.recompile()
    return made, softness


def is_relu(traced: Traced, node: fx.Node) -> bool:
    return isinstance(traced.part(node), nn.ReLU) or operation(node) in RELUS


def _soft(traced: Traced, node: fx.Node, softness: Softness) -> nn.Module | None:
    if is_relu(traced, node):
        return SoftReLU(softness)
    pool = _pool(traced, node)
    plain = pool is not None and pool.dilation in (1, (1, 1)) and not pool.ceil_mode and not pool.return_indices
    return SoftMaxPool(pool, softness) if plain else None


def _pool(traced: Traced, node: fx.Node) -> nn.MaxPool2d | None:
    """The max-pool of a node, however it is called."""
    part = traced.part(node)
    if isinstance(part, nn.MaxPool2d):
        return part
    if node.op != "call_function" or not (node.target is F.max_pool2d or operation(node) == "max_pool2d"):
        return None
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = dict(zip(names, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k != "input"}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return nn.MaxPool2d(**{k: v or None if k == "stride" else v for k, v in given.items()})
