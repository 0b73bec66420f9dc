"""How the census table is laid out."""

import pytest
import torch

from spear import data
from spear.data import adult


def test_one_hot_entries_stay_and_numbers_are_scaled(real_data):
    if not data.available("adult", real_data):
        pytest.skip("no adult under the data root")
    inputs, labels = data.load("adult", count=2000, root=real_data)
    assert 0.1 < labels.double().mean() < 0.4
    for column in adult.COLUMNS:
        entries = inputs[:, column.start : column.stop]
        if column.categories:
            assert torch.equal(entries.sum(1), torch.ones(2000, dtype=torch.float64))
            assert set(entries.unique().tolist()) <= {0.0, 1.0}
        else:
            assert abs(entries.mean()) < 0.15
            assert 0.7 < entries.std() < 1.3


def test_columns_lie_side_by_side():
    assert [column.start for column in adult.COLUMNS[1:]] == [column.stop for column in adult.COLUMNS[:-1]]
    assert adult.COLUMNS[0].start == 0
    assert data.shape("adult") == (adult.COLUMNS[-1].stop,)
