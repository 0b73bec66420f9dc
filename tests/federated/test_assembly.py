"""Parts of samples come back as samples, where a layer that reads all parts of one tells which belong together."""

import pytest
import torch
from torch import Generator, Tensor, nn

import spear
from spear.federated import SharedUpdate, gradient
from spear.reconstruction import Reconstruction

SHAPE, BATCH, CLASSES = (2, 4, 8), 4, 6


class Parts(nn.Module):
    """A layer that reads parts of a sample, in its own units, and one that reads their `join`."""

    def __init__(self, rows: int, join: str) -> None:
        super().__init__()
        self.rows, self.join = rows, join
        self.embed, self.head = nn.Linear(64 // rows, 150), nn.Linear(150 * (rows if join == "cat" else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(((x - 0.3) / 0.5).reshape(-1, self.rows, 64 // self.rows)).relu()
        return self.head({"cat": h.flatten(1), "sum": h.sum(1), "mean": h.mean(1)}[self.join])


def attacked(rows: int, join: str, dtype: torch.dtype, *, private: bool = False) -> tuple[Tensor, Reconstruction]:
    torch.manual_seed(rows)
    model = Parts(rows, join).to(dtype)
    x = torch.randn(BATCH, *SHAPE, generator=Generator().manual_seed(0), dtype=dtype)
    sent = gradient(model, x, torch.arange(BATCH) % CLASSES)
    kept = {n: g for n, g in sent.gradients.items() if not private or n.startswith("embed")}
    update = SharedUpdate(kept, count=BATCH, input_shape=SHAPE)
    return x.double(), spear.attack(model, update, method="layer", time_limit=30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [2, 4])
def test_parts_side_by_side_are_samples_again(rows: int, dtype: torch.dtype) -> None:
    x, result = attacked(rows, "cat", dtype)
    assert result.inputs.shape == (BATCH, *SHAPE), result.reason
    assert float(torch.cdist(x.flatten(1), result.inputs.flatten(1)).amin(1).max()) < 1e-3
    assert f"the {rows} parts of each sample that embed reads were put together" in result.reason
    assert result.rank == BATCH == len(result.residuals) == len(result.error_bound)


@pytest.mark.parametrize("join", ["sum", "mean"])
def test_parts_that_are_summed_are_told_apart_but_not_ordered(join: str) -> None:
    x, result = attacked(2, join, torch.float64)
    pairs, truth = result.inputs.reshape(BATCH, 2, -1), (x.reshape(BATCH, 2, -1) - 0.3) / 0.5
    either = [torch.cdist(truth.flatten(1), one.flatten(1)) for one in (pairs, pairs.flip(1))]
    assert float(torch.stack(either).amin((0, 2)).max()) < 1e-6, result.reason
    assert "2 after one another are of one sample, in an order that nothing shows" in result.reason


def test_without_that_layers_gradient_parts_stay_parts() -> None:
    _, result = attacked(2, "cat", torch.float64, private=True)
    assert result.inputs.shape == (2 * BATCH, 32)
    assert "each is one of the 2 parts of a sample that embed reads" in result.reason
