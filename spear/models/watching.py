"""What passes through a module of a model: kept while the model is used, by a forward hook."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the context: what enters the module and what leaves it, in a list, use by use."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _module, given, result: seen.append((given[0], result)))
    try:
        yield seen
    finally:
        handle.remove()


def linear_layer(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name. Raises `ValueError` where there is none."""
    linear = {known: module for known, module in model.named_modules() if isinstance(module, nn.Linear)}
    if name not in linear:
        raise ValueError(f"no linear layer named {name!r}; the model has {', '.join(linear) or 'none'}")
    return linear[name]
