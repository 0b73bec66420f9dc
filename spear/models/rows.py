"""How many inputs each linear layer has of a sample: tokens, patches; counted by running the model."""

import torch
from torch import fx

from spear.models.graphs import evaluating, like
from spear.models.layers import Shape
from spear.models.memory import once
from spear.models.traced import Traced

SAMPLES = 2  # of the batch that is run


def row_counts(traced: Traced, shape: Shape) -> dict[str, int]:
    """How many inputs each linear layer has of a sample, by its node's name; none where that cannot be tried."""
    return {} if shape is None else once(("rows", id(traced.module), shape), lambda: _counted(traced, shape))


def _counted(traced: Traced, shape: tuple[int, ...]) -> dict[str, int]:
    for dtype in (like(torch.zeros(0), traced.module).dtype, torch.long):  # tokens of a vocabulary are numbers
        counter = RowCounter(traced)
        try:
            with torch.no_grad(), evaluating(traced.module):
                counter.run(torch.zeros(SAMPLES, *shape, dtype=dtype, device=next(traced.module.parameters()).device))
        except Exception:  # another type, or the model's own code: it may raise anything
            continue
        return counter.rows
    return {}


class RowCounter(fx.Interpreter):
    """Runs a model and counts the rows that enter each linear layer, for each sample."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.module)
        self.traced, self.rows = traced, {}

    def run_node(self, n: fx.Node) -> object:
        """As the interpreter does."""
        value = super().run_node(n)
        if self.traced.is_linear(n):
            self.rows[n.name] = max(1, value.numel() // value.shape[-1] // SAMPLES)
        return value
