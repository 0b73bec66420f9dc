"""Weights that a model computes from other parameters: their gradient follows from those of these, and hides nothing.

Weight normalisation, W = g v / |v| row by row (Salimans, Kingma, NeurIPS 2016), takes from dL/dW its part along v,
which it sends as dL/dg:

    dL/dW = |v| / g dL/dv + dL/dg v / |v|

A pruned weight is W = mask * W_0: where the mask is zero nothing arrives, and the entry is not known.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from spear.federated.update import Lazy, SharedUpdate


@dataclass(frozen=True)
class Normalised:
    """A weight g v / |v|, by the names of g and v; the norm is over all dimensions but `dim`."""

    length: str
    direction: str
    dim: int

    def gradient(self, model: nn.Module, received: Mapping[str, Tensor]) -> Tensor | None:
        """dL/dW; NaN where g is zero, and `None` where a gradient did not come."""
        if self.length not in received or self.direction not in received:
            return None
        g, v = (model.get_parameter(name).detach() for name in (self.length, self.direction))
        size = torch.norm_except_dim(v, 2, self.dim)
        made = size / g * received[self.direction] + received[self.length] / size * v
        return torch.where(g == 0, torch.nan, made)


@dataclass(frozen=True)
class Pruned:
    """A weight mask * W_0, by the names of both."""

    original: str
    mask: str

    def gradient(self, model: nn.Module, received: Mapping[str, Tensor]) -> Tensor | None:
        """dL/dW, NaN where the mask is zero; `None` where the gradient did not come."""
        if self.original not in received:
            return None
        mask = model.get_buffer(self.mask).to(received[self.original].device)
        return torch.where(mask == 0, torch.nan, received[self.original])


def plain(model: nn.Module, update: SharedUpdate) -> tuple[nn.Module, SharedUpdate, str]:
    """The model with plain weights, the update with the gradients by them, and what that was, in words.

    The model is left unchanged; one without such weights is returned as it is, and no words.
    """
    places = list(_found(model))
    if not places or update.local_steps > 1:
        return model, update, ""
    found = {f"{name}.{weight}".lstrip("."): way for name, weight, way in places}
    computed = [getattr(model.get_submodule(name), weight) for name, weight, _ in places]  # no leaves, in older ways
    made = copy.deepcopy(model, {id(value): value.detach() for value in computed})
    for name, weight, way in places:
        _remove(made, name, weight, way)
    received = update.gradients
    parts = {part for way in found.values() for part in vars(way).values()}
    gradients = {name: g for name, g in received.items() if name not in parts}
    gradients |= {name: g for name, way in found.items() if (g := way.gradient(model, received)) is not None}
    if isinstance(received, Lazy):  # which knows of rounding and noise
        gradients = replace(received, names=tuple(gradients), compute=gradients.__getitem__)
    kinds = {Normalised: "normalised", Pruned: "pruned"}
    said = " or ".join(sorted({kinds[type(way)] for way in found.values()}))
    return made, replace(update, gradients=gradients), f"weights that the model holds {said} were put together"


def _found(model: nn.Module) -> Iterator[tuple[str, str, Normalised | Pruned]]:
    """Every computed weight: its module's name, its own, and how it is computed."""
    for name, module in model.named_modules():
        at = f"{name}." if name else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield name, hook.name, Normalised(f"{at}{hook.name}_g", f"{at}{hook.name}_v", hook.dim)
            elif isinstance(hook, prune.BasePruningMethod):
                own = hook._tensor_name
                yield name, own, Pruned(f"{at}{own}_orig", f"{at}{own}_mask")
        lists = getattr(module, "parametrizations", {})
        known = all(len(parts) == 1 and isinstance(parts[0], _WeightNorm) for parts in lists.values())
        for own, parts in lists.items() if known else ():
            where = f"{at}parametrizations.{own}.original"
            yield name, own, Normalised(f"{where}0", f"{where}1", parts[0].dim)


def _remove(model: nn.Module, name: str, weight: str, way: Normalised | Pruned) -> None:
    """A plain parameter in place of a computed one, and of all others of its module that are parametrized."""
    module = model.get_submodule(name)
    if isinstance(way, Pruned):
        prune.remove(module, weight)
    elif parametrize.is_parametrized(module):
        # torch's own way takes the weight from the class, which a copy shares with the model itself
        values = {own: getattr(module, own).detach() for own in module.parametrizations}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for own, value in values.items():
            module.register_parameter(own, nn.Parameter(value))
    elif weight not in dict(module.named_parameters(recurse=False)):
        remove_weight_norm(module, weight)
