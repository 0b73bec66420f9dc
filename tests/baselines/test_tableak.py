"""The TabLeak-like baseline: gradient matching for rows of a table."""

import pytest
import torch
import torch.nn.functional as F

from spear import models
from spear.baselines import tableak
from spear.data import tables
from spear.federated import gradient
from spear.study.fields import compare


def victim(count=3, seed=0):
    table = tables.load("cancer", count=count, seed=seed)
    model = models.fcnn((table.inputs.shape[1],), 60, 3, 2, seed=seed)
    return table, model, gradient(model, table.inputs, table.labels)


@pytest.mark.parametrize("seed", range(2))
def test_gradient_matching_finds_most_fields_and_vouches_for_none(seed):
    table, model, update = victim(2, seed)
    found = tableak.tableak(model, update, table.columns, steps=150, restarts=3, seed=seed)
    fields = compare(found, table.inputs, table.columns, fallback=torch.zeros(90, dtype=torch.float64))
    assert fields.categorical > 0.7
    assert not found.certified.any()
    assert torch.equal(found.inputs, tables.discrete(found.inputs, table.columns))
    again = tableak.tableak(model, update, table.columns, steps=150, restarts=3, seed=seed)
    assert torch.equal(found.inputs, again.inputs)
    assert all(p.grad is None for p in model.parameters())


def test_the_distance_is_the_cosine_of_the_gradients():
    table, model, update = victim()
    distance = tableak._Distance(model, update, table.labels, table.columns)
    z = torch.randn(3, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = torch.cat([v.flatten() for v in gradient(model, distance.relax(z), table.labels).gradients.values()])
    seen = torch.cat([v.flatten() for v in update.gradients.values()])
    torch.testing.assert_close(distance(z), 1 - F.cosine_similarity(g, seen, dim=0))
    torch.testing.assert_close(torch.vmap(distance)(z[None])[0], distance(z))


def test_relaxed_fields_are_softmaxes():
    table, model, update = victim()
    distance = tableak._Distance(model, update, table.labels, table.columns)
    z = torch.randn(2, 3, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    relaxed = distance.relax(z)
    for column in table.columns:
        part = z[..., column.start : column.stop]
        expected = part.softmax(-1) if column.categories else part
        torch.testing.assert_close(relaxed[..., column.start : column.stop], expected)


def test_pooling_ignores_the_order_of_rows_and_outliers():
    best = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    starts = torch.stack([best, best[[2, 0, 3, 1]] + 1e-3, best[[3, 1, 2, 0]] - 1e-3, best * torch.nan, best + 50])
    distance = torch.tensor([0.1, 0.2, 0.2, torch.nan, 0.9], dtype=torch.float64)
    torch.testing.assert_close(tableak.pool(starts, distance), best, atol=2e-3, rtol=0)
