"""Phase diagrams: what a cell amounts to, and which cells are not tried."""

import math

import pytest

from spear.study import phases


def wall(batch, width, seed):
    """An attack that returns whole batches up to half the width, for even seeds only."""
    return {"share recovered": float(batch <= width / 2 and seed % 2 == 0), "seconds": seed * batch}


def test_a_cell_is_the_mean_share_and_the_median_of_all_else():
    table = phases.diagram(wall, widths=[10, 20], shares=[0.5, 0.2], seeds=[0, 1, 2])
    assert table[["width", "batch"]].to_numpy().tolist() == [[10, 2], [10, 5], [20, 4], [20, 10]]
    assert table["batch/width"].tolist() == [0.2, 0.5] * 2
    assert table["share recovered"].tolist() == pytest.approx([2 / 3] * 4)
    assert table["seconds"].tolist() == table["batch"].tolist()


@pytest.mark.parametrize("left", [0, phases.LAST])
def test_above_a_cell_where_next_to_nothing_came_back_nothing_is_tried(left):
    tried = []

    def attempt(batch, width, seed):
        tried.append((width, batch))
        found = wall(batch, width, seed)
        return found | {"share recovered": max(left, found["share recovered"])}

    table = phases.diagram(attempt, widths=[10, 20], shares=[0.4, 0.6, 0.7, 0.8], seeds=[0, 2])
    assert tried == [(10, 4)] * 2 + [(10, 6)] * 2 + [(20, 8)] * 2 + [(20, 12)] * 2
    assert table["share recovered"].tolist() == [1, left, 0, 0] * 2
    assert table["seeds"].tolist() == [2, 2, 0, 0] * 2
    assert [math.isnan(s) for s in table["seconds"]] == [False, False, True, True] * 2


def test_where_the_first_batches_of_a_cell_fail_the_others_count_as_failed():
    tried = []

    def attempt(batch, width, seed):
        tried.append((batch, seed))
        return {"share recovered": {2: 1.0, 4: float(seed == 1), 6: phases.LAST}[batch], "seconds": seed}

    table = phases.diagram(attempt, widths=[10], shares=[0.2, 0.4, 0.6, 0.8], seeds=range(5))
    assert tried == [(b, seed) for b, count in ((2, 5), (4, 5), (6, phases.FAILED)) for seed in range(count)]
    assert table["seeds"].tolist() == [5, 5, phases.FAILED, 0]
    assert table["share recovered"].tolist() == pytest.approx([1, 0.2, phases.LAST * phases.FAILED / 5, 0])


def test_no_batch_is_larger_than_what_there_is():
    table = phases.diagram(wall, widths=[10, 20], shares=[0.2, 0.4], seeds=[0], most=5)
    assert table["batch"].tolist() == [2, 4, 4]
