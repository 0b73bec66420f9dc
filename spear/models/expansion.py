"""What a model makes of one sample, found from shapes alone: a small file may ask for any amount of memory and time."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

FREE = 2**26  # entries that all values between input and output may have together, whatever the model
RATIO = 64  # the same for each byte of the model's weights


def computes(model: fx.GraphModule, shape: tuple[int, ...]) -> bool:
    """Whether the model can be computed for an input of that shape. No value is computed, no memory taken.

    Raises `ValueError` for a model that makes more of it than its weights and a usual network justify.
    """
    try:
        _Shapes(model).run(torch.empty(shape, device="meta", dtype=next(model.parameters()).dtype))
    except TooLarge:
        raise
    except Exception:  # whatever torch says of shapes and types that do not fit
        return False
    return True


class TooLarge(ValueError):
    """A model that expands its input beyond measure."""


class _Shapes(fx.Interpreter):
    """Runs a graph on the device `meta`, whose tensors have a shape and no content, and adds up how large they are."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        stored = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        self.room, self.made = FREE + RATIO * stored, 0

    def run_node(self, node: fx.Node) -> Any:
        made = super().run_node(node)
        if node.op.startswith("call"):
            self.made += sum(part.numel() for part in _tensors(made))
        if self.made > self.room:
            raise TooLarge(f"the model makes more than {self.room:,} numbers of a sample or two, at {node.name}")
        return made

    def fetch_attr(self, target: str) -> Any:
        found = super().fetch_attr(target)
        return found.to("meta") if isinstance(found, Tensor) else found

    def call_module(self, target: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        stored = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}
        return functional_call(module, stored, args, kwargs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []
