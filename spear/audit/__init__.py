"""Your own model: what it leaks, from how large a batch, which defence stops it; a watch on a running federation.

Reading order: `sample` (what clients are simulated on), `simulation` (attacks on them), `forecast` (when one is given
up), `protection` (behind defences), `side_by_side` (several at once), `assessment` (all of it), `report` (HTML and
JSON). `monitor` looks at real updates, `flower` at Flower's.
"""
