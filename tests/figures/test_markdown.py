"""Tables in Markdown pages are those of their CSV files."""

import pytest

from spear.figures.markdown import render


def test_a_table_is_rendered(tmp_path):
    (tmp_path / "a.csv").write_text("set,b,error,missing\nmnist,16,1.23456e-13,\ncifar10,1200,0.5,7\n")
    text = "x\n<!-- table a.csv: set, b, error, missing -->\nold\n<!-- end -->\ny"
    head, rule = "| set | b | error | missing |\n", "| --- | --- | --- | --- |\n"
    expected = head + rule + "| mnist | 16 | 1.23e-13 |  |\n| cifar10 | 1,200 | 0.5 | 7 |\n"
    assert expected in render(text, tmp_path)
    assert render(render(text, tmp_path), tmp_path) == render(text, tmp_path)
    assert "| set | b | error | missing |" in render(text.replace(": set, b, error, missing", ""), tmp_path)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.csv"):
        render("<!-- table a.csv -->\n<!-- end -->", tmp_path)
    (tmp_path / "a.csv").write_text("set\nmnist\n")
    with pytest.raises(ValueError, match="a.csv has no column b; it has set"):
        render("<!-- table a.csv: set, b -->\n<!-- end -->", tmp_path)
