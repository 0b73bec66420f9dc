"""The README's tables, written from the CSV files that stand beside the figures.

A table stands between two comments, the first of which names its file and, optionally, the columns that it shows::

    <!-- table figures/06_attack-batches.csv: data set, batch, recall -->
    <!-- end -->
"""

import re
from pathlib import Path

import pandas as pd

TABLE = re.compile(r"(<!-- table (\S+?)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, root: Path) -> str:
    """The text with each of its tables written anew; file names are relative to `root`.

    Raises `FileNotFoundError` for a file that is not there and `ValueError` for a column that it does not have.
    """

    def table(match: re.Match[str]) -> str:
        head, name, columns, end = match.groups()
        return head + _markdown(pd.read_csv(root / name), name, columns) + end

    return TABLE.sub(table, text)


def _markdown(frame: pd.DataFrame, name: str, columns: str | None) -> str:
    chosen = [c.strip() for c in columns.split(",")] if columns else list(frame.columns)
    missing = [c for c in chosen if c not in frame.columns]
    if missing:
        raise ValueError(f"{name} has no column {', '.join(missing)}; it has {', '.join(frame.columns)}")
    rows = [chosen, ["---"] * len(chosen), *([_cell(v) for v in row] for row in frame[chosen].itertuples(index=False))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
