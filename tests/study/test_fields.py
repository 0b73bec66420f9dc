"""Tables: the stand-in, scores by field, and the TabLeak-like baseline."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer

from spear import attack, models
from spear.baselines import tableak
from spear.data import tables
from spear.data.adult import Column
from spear.federated import gradient
from spear.reconstruction import Reconstruction, Stats
from spear.study.fields import compare

COLUMNS = (Column("size", 0, ()), Column("colour", 1, ("red", "green", "blue")), Column("weight", 4, ()))


def result(rows):
    k = len(rows)
    return Reconstruction(
        rows, None, k, torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.bool), False, "", Stats(0.0)
    )


def rows(*fields):
    """Rows of COLUMNS from (size, place of the colour, weight)."""
    size, colour, weight = (torch.tensor(part) for part in zip(*fields, strict=True))
    return torch.cat([size[:, None].double(), F.one_hot(colour, 3).double(), weight[:, None].double()], 1)


def victim(count=3, seed=0):
    table = tables.load("cancer", count=count, seed=seed)
    model = models.fcnn((table.inputs.shape[1],), 60, 3, 2, seed=seed)
    return table, model, gradient(model, table.inputs, table.labels)


def test_the_stand_in_is_scikit_learns_table():
    table = tables.load("cancer", count=569)
    values, labels = load_breast_cancer(return_X_y=True, as_frame=True)
    order = torch.randperm(569, generator=torch.Generator().manual_seed(0))
    assert torch.equal(table.labels, torch.tensor(labels.to_numpy())[order])
    assert [column.name for column in table.columns] == list(values)
    assert [c.start for c in table.columns[1:]] == [c.stop for c in table.columns[:-1]]
    assert table.columns[-1].stop == table.inputs.shape[1] == 10 + 20 * 4
    for column in table.columns:
        part, original = (
            table.inputs[:, column.start : column.stop],
            torch.tensor(values[column.name].to_numpy())[order],
        )
        if column.categories:
            assert (part.sum(1) == 1).all()
            assert part.sum(0).min() > 100
            quarter = part.argmax(1)
            for low, high in itertools.pairwise(range(4)):
                assert original[quarter == low].max() < original[quarter == high].min()
        else:
            torch.testing.assert_close(part[:, 0], (original - original.mean()) / original.std())


def test_a_larger_count_extends_the_smaller_one():
    small, large = (tables.load("cancer", count=count, seed=3) for count in (4, 9))
    assert torch.equal(large.inputs[:4], small.inputs)
    assert not torch.equal(tables.load("cancer", count=4, seed=4).inputs, small.inputs)


def test_bad_tables(tmp_path):
    with pytest.raises(ValueError, match="unknown table 'wine': use 'adult' or 'cancer'"):
        tables.load("wine", count=3)
    with pytest.raises(ValueError, match="cancer has 569 rows, so count must be 1 to 569, not 570"):
        tables.load("cancer", count=570)
    with pytest.raises(FileNotFoundError, match="spear data fetch adult"):
        tables.load("adult", count=3, root=tmp_path)


def test_adult_is_that_of_the_data_root(real_data):
    if not (real_data / "adult.csv").is_file():
        pytest.skip("no adult.csv under the data root")
    table = tables.load("adult", count=5, root=real_data)
    assert table.inputs.shape == (5, table.columns[-1].stop)


def test_fields_are_counted_one_by_one():
    truth = rows((0.0, 0, 8.0), (3.0, 1, -2.0), (9.0, 2, 5.0))
    guess = rows((3.2, 1, -2.5), (0.0, 2, 8.0))  # of the second and the first row, in this order
    fallback = rows((9.1, 0, 4.0))[0]
    fields = compare(result(guess), truth, COLUMNS, fallback=fallback)
    assert fields.categorical == pytest.approx(1 / 3)
    errors = [0.2, 0.5, 0.0, 0.0, 0.1, 1.0]
    assert fields.error == pytest.approx(sum(errors) / 6)
    assert fields.continuous == pytest.approx(sum(e <= 0.319 for e in errors) / 6)


def test_the_typical_row_is_made_of_modes_and_means():
    table = tables.Rows(rows((1.0, 0, 2.0), (2.0, 2, 4.0), (6.0, 2, 0.0)), torch.zeros(3, dtype=torch.long), COLUMNS)
    assert torch.equal(tables.typical(table), rows((3.0, 2, 2.0))[0])


def test_an_exact_recovery_knows_every_field():
    table, model, update = victim()
    everything = tables.load("cancer", count=200)
    fields = compare(attack(model, update), table.inputs, table.columns, fallback=tables.typical(everything))
    assert (fields.categorical, fields.continuous) == (1, 1)
    assert fields.error < 1e-9


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
