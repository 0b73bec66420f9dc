"""The census table, read from its file: rows tell the original, damage is named by line."""

import pytest
from data_files import ROW

from spear import data
from spear.data import adult


def test_an_encoded_row_tells_the_original(tmp_path):
    (tmp_path / "adult.csv").write_text(ROW + "\n" + ROW.replace("<=", ">").replace("State-gov", "?") + "\n\n")
    inputs, labels = data.load("adult", count=2, root=tmp_path)
    assert sorted(labels.tolist()) == [0, 1]
    raw = data.unnormalize(inputs, "adult")[labels == 0][0]
    fields = [
        column.categories[int(raw[column.start : column.stop].argmax())]
        if column.categories
        else f"{raw[column.start]:.0f}"
        for column in adult.COLUMNS
    ]
    assert fields == ROW.split(", ")[:-1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no rows"),
        (ROW + "\n" + ROW[:60], "line 2: 7 fields, not 15"),
        (ROW.replace("39", "old"), "line 1: could not convert string to float: 'old'"),
        (ROW.replace("39", "nan"), "line 1: 'nan' is no finite age"),
        (ROW.replace("Bachelors", "Bachelor"), "line 1: 'Bachelor' is no education"),
        (ROW.replace("<=50K", "<=50K."), "line 1: '<=50K.' is no income"),
        ("\x00\x89PNG", "line 1"),
    ],
)
def test_a_damaged_table_is_refused_by_file_and_line(content, reason, tmp_path):
    (tmp_path / "adult.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="adult.csv") as refused:
        data.load("adult", count=1, root=tmp_path)
    assert reason in str(refused.value)


def test_bytes_that_are_no_text_are_no_table(tmp_path):
    (tmp_path / "adult.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="adult.csv"):
        data.load("adult", count=1, root=tmp_path)
