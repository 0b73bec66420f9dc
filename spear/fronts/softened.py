"""A front with ReLU and max-pools made smooth, so that its derivative sees both sides of a kink."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from spear.models.traced import Traced, operation

RELUS = {"relu"}
POOLS = {"max_pool2d", "boolean_dispatch"}
LEAST = 50.0  # temperatures under the least value: what a pool's border counts as


class Softness:
    """How smooth a front is: the temperature of ReLU and max-pools, relative to the spread of what enters them."""

    def __init__(self) -> None:
        self.temperature = 0.0


class SoftReLU(nn.Module):
    """t log(1 + exp(z / t)), ReLU where t = 0."""

    def __init__(self, softness: Softness) -> None:
        super().__init__()
        self.softness = softness

    def forward(self, z: Tensor) -> Tensor:
        if not self.softness.temperature:
            return z.relu()
        t = (self.softness.temperature * z.detach().std()).clamp_min(torch.finfo(z.dtype).tiny)
        return t * F.softplus(z / t)


class SoftMaxPool(nn.Module):
    """The mean of a window, weighted by exp(z / t); its largest entry where t = 0."""

    def __init__(self, pool: nn.MaxPool2d, softness: Softness) -> None:
        super().__init__()
        self.pool, self.softness = pool, softness

    def forward(self, z: Float[Tensor, "k c h w"]) -> Float[Tensor, "k c h1 w1"]:
        if not self.softness.temperature:
            return self.pool(z)
        t = (self.softness.temperature * z.detach().std()).clamp_min(torch.finfo(z.dtype).tiny)
        (kh, kw), (sh, sw), (ph, pw) = (_pair(x) for x in (self.pool.kernel_size, self.pool.stride, self.pool.padding))
        if ph or pw:
            z = F.pad(z, (pw, pw, ph, ph), value=float(z.detach().min() - LEAST * t))
        windows = z.unfold(2, kh, sh).unfold(3, kw, sw).flatten(4)
        return (torch.softmax(windows / t, -1) * windows).sum(-1)


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
                given = node.args[0] if node.args else node.kwargs["input"]
                node.replace_all_uses_with(made.graph.call_module(name, (given,)))
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
