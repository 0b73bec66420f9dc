"""Whether a front could give the same features for other inputs: mirrored ones, by squares, absolute values,
magnitudes; or the same in another order, by sums over all pixels or tokens.

Full column rank says that no other inputs near give the same features and gradients. It says nothing of others far
away: x -> x² gives the same for each pixel with either sign. So every step of a front is tried by itself. Steps that
are affine, or keep the order of their inputs (ReLU, sigmoids, max-pools), do not fold; neither do others, as GELU, that
are not even and take more entries than a sample has, as no sample then makes them fold where they could. What all steps
together do to the order of pixels, rows and columns is tried on the whole.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, fx

CALLS = ("call_module", "call_function", "call_method")
CLOSE = 1e-9  # relative, of values in double precision that are equal


def folding(front: fx.GraphModule, shape: tuple[int, ...], size: float) -> str:
    """What could give the same for other inputs, in words; empty where nothing could. `size` is that of entries."""
    steps = _Steps(front)
    generator = torch.Generator().manual_seed(0)
    like = next(iter(front.parameters()), torch.zeros(0, dtype=torch.float64))
    x = (size * torch.randn(1, *shape, generator=generator, dtype=torch.float64)).to(like)
    with torch.no_grad():
        made = steps.run(x.clone())
        if steps.folds:
            return (
                f"the step {steps.folds} of what computes the features can give the same for inputs that are mirrored"
            )
        others = (front(other) - made for other in _in_other_order(x, generator))
        if any(bool(apart.abs().max() <= CLOSE * made.abs().max()) for apart in others):
            return "what computes the features gives the same for inputs in another order"
    return ""


def _in_other_order(x: Float[Tensor, "1 *shape"], generator: Generator) -> Iterator[Float[Tensor, "1 *shape"]]:
    """All entries, and the slices along each dimension, turned round, moved on by one, and at random."""
    yield x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].view_as(x)
    for k in (k for k in range(1, x.ndim) if x.shape[k] > 1):
        yield x.flip(k)
        yield x.roll(1, k)
        yield x.index_select(k, torch.randperm(x.shape[k], generator=generator).to(x.device))


class _Steps(fx.Interpreter):
    """Runs a front, and tries each step that takes what depends on the data."""

    def __init__(self, front: fx.GraphModule) -> None:
        super().__init__(front)
        self.generator, self.folds = torch.Generator().manual_seed(1), ""
        self.entries, self.of_data = 0, set()

    def run_node(self, n: fx.Node) -> Any:
        data = [node for node in n.all_input_nodes if node in self.of_data]
        values = [self.env[node].clone() for node in data if isinstance(self.env[node], Tensor)]
        made = super().run_node(n)
        if n.op == "placeholder":
            self.entries = made[0].numel()
            self.of_data.add(n)
        elif n.op in CALLS and data and _numbers(made) is not None:
            self.of_data.add(n)
            whole = len(values) == len(data)  # else one of several results of a step is taken
            if whole and not self.folds and self._could_fold(n, data, values):
                self.folds = n.name
        return made

    def _could_fold(self, n: fx.Node, data: list[fx.Node], values: list[Tensor]) -> bool:
        held = {node: self.env[node] for node in data}
        try:
            return self._is_bent(n, data, values)
        except (RuntimeError, ValueError, IndexError):  # it does not take any numbers: nothing is known of it
            return True
        finally:
            self.env.update(held)

    def _is_bent(self, n: fx.Node, data: list[fx.Node], values: list[Tensor]) -> bool:
        """Whether a step is neither affine, nor keeps the order, nor has entries to spare and is not even."""

        def step(inputs: list[Tensor]) -> Float[Tensor, " made"]:
            self.env.update(zip(data, (x.clone() for x in inputs), strict=True))
            return _numbers(super(_Steps, self).run_node(n))

        a, b = ([_drawn(x, self.generator) for x in values] for _ in range(2))
        both, more = ([x + y for x, y in zip(a, b, strict=True)], [x + y.abs() for x, y in zip(a, b, strict=True)])
        none, negative = [torch.zeros_like(x) for x in a], [-x for x in a]
        at = step(a)
        largest = at.abs().max()
        apart = step(both) + step(none) - at - step(b)
        if bool(apart.abs().max() <= CLOSE * largest) or bool((step(more) >= at - CLOSE * largest).all()):
            return False
        entries = sum(_numbers(x).numel() for x in values)
        return entries <= self.entries or bool((step(negative) - at).abs().max() <= CLOSE * largest)


def _drawn(like: Tensor, generator: Generator) -> Tensor:
    """Random numbers, some as large as what enters a step, some as activations bend at: about 1."""
    dtype = torch.complex128 if like.is_complex() else torch.float64
    size = torch.where(torch.rand(like.shape, generator=generator) < 0.5, float(like.abs().square().mean().sqrt()), 1.0)
    return (2 * size * torch.randn(like.shape, generator=generator, dtype=dtype)).to(like)


def _numbers(made: Any) -> Float[Tensor, " made"] | None:
    """All real numbers that a step makes, in one row; `None` where it makes none."""
    parts = made if isinstance(made, tuple | list) else [made]
    parts = [part for part in parts if isinstance(part, Tensor)]
    parts = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    real = [part.flatten() for part in parts if part.is_floating_point()]
    return torch.cat(real) if real else None
