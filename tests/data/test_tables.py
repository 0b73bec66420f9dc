"""Tables: the stand-in is scikit-learn's, cut into fields."""

import itertools

import pytest
import torch
from sklearn.datasets import load_breast_cancer

from spear.data import tables
from spear.data.adult import Column


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


def test_the_typical_row_is_made_of_modes_and_means():
    columns = (Column("size", 0, ()), Column("colour", 1, ("red", "green", "blue")), Column("weight", 4, ()))
    inputs = [[1, 1, 0, 0, 2], [2, 0, 0, 1, 4], [6, 0, 0, 1, 0]]
    rows = tables.Rows(torch.tensor(inputs, dtype=torch.float64), torch.zeros(3, dtype=torch.long), columns)
    assert tables.typical(rows).tolist() == [3, 0, 0, 1, 2]
