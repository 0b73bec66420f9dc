"""Tables in Markdown pages, README.md and figures/README.md, written from CSV files.

A table stands between two comments, the first of which names its file and, optionally, the columns that it shows::

    <!-- table figures/06_attack-batches.csv: data set, batch, recall -->
    <!-- end -->
"""

import contextlib
import csv
import math
import re
from pathlib import Path

TABLE = re.compile(r"(<!-- table (\S+?)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, root: Path) -> str:
    """The text with each of its tables written anew; file names are relative to `root`.

    Raises `FileNotFoundError` for a file that is not there and `ValueError` for a column that it does not have.
    """

    def table(match: re.Match[str]) -> str:
        head, name, columns, end = match.groups()
        return head + _markdown(root / name, name, columns) + end

    return TABLE.sub(table, text)


def _markdown(path: Path, name: str, columns: str | None) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    frame = {title: _values([row[place] for row in rows]) for place, title in enumerate(header)}
    chosen = [c.strip() for c in columns.split(",")] if columns else header
    missing = [c for c in chosen if c not in frame]
    if missing:
        raise ValueError(f"{name} has no column {', '.join(missing)}; it has {', '.join(header)}")
    cells = zip(*(map(_cell, frame[title]) for title in chosen), strict=True)
    return "".join(f"| {' | '.join(row)} |\n" for row in (chosen, ["---"] * len(chosen), *cells))


def _values(column: list[str]) -> list[int] | list[float] | list[str]:
    """The cells of a column as integers, or else as numbers (an empty one is none), or else as they stand."""
    with contextlib.suppress(ValueError):
        return [int(cell) for cell in column]
    with contextlib.suppress(ValueError):
        return [float(cell or "nan") for cell in column]
    return column


def _cell(value: float | int | str) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
