"""Phase diagrams: what share of a batch comes back, over width and batch size.

Notebooks 09, 10 and 11.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pandas as pd

SHARE = "share recovered"
LAST = 0.05  # a cell of which no larger share came back is the last of its width
FAILED = 2  # batches of a cell: where of so many, the first, no larger share came back, the others are not tried


def diagram(
    attempt: Callable[[int, int, int], Mapping[str, float | int]],
    *,
    widths: Sequence[int],
    shares: Sequence[float],
    seeds: Sequence[int],
    most: float | int = math.inf,
) -> pd.DataFrame:
    """A row for each width m and batch size b = share m, up to `most`: these, their ratio, the seeds, and the measures.

    `attempt(b, m, seed)` attacks one batch and returns its measures, `"share recovered"` among them, of which a cell
    has the mean; of the others it has the median. A larger batch is harder, so a cell of which at most `LAST` came back
    is the last that is tried of its width: those above count as nothing, with 0 under `seeds` and no other measures.
    Within a cell the same holds once `FAILED` batches, the first, have failed: `seeds` says how many were tried.
    """
    rows = []
    for m in widths:
        hopeless = False
        for b in sorted({round(share * m) for share in shares}):
            if b > most:
                break
            tried = pd.DataFrame([] if hopeless else _tried(partial(attempt, b, m), seeds))
            measures = dict(tried.median()) | {SHARE: tried[SHARE].sum() / len(seeds) if len(tried) else 0.0}
            hopeless = measures[SHARE] <= LAST
            rows.append({"width": m, "batch": b, "batch/width": b / m, "seeds": len(tried), **measures})
    return pd.DataFrame(rows)


def _tried(
    attempt: Callable[[int], Mapping[str, float | int]], seeds: Sequence[int]
) -> list[Mapping[str, float | int]]:
    """The measures of a cell's batches, of the first ones alone where these all failed."""
    found = [attempt(seed) for seed in seeds[:FAILED]]
    if all(measures[SHARE] <= LAST for measures in found):
        return found
    return found + [attempt(seed) for seed in seeds[FAILED:]]
