"""What a cell of an ablation amounts to: the intervals around each measure."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spear.study import ablations, statistics
from spear.study.ablations import Cell, Limits

SMALL = Cell("digits", batch=3, width=40, depth=3)
BUDGET = Limits(proposals=20_000)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_the_interval_of_a_rate_is_wilsons(values):
    n, p, z = len(values), sum(values) / len(values), stats.norm.ppf(0.975)
    middle, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    half *= z / (1 + z**2 / n)
    found = statistics.share_interval(np.array(values, dtype=float))
    assert found == pytest.approx((p, max(0.0, middle - half), min(1.0, middle + half)), abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_interval_of_shares_contains_those_of_the_counts_around(values):
    mean, low, high = statistics.share_interval(np.array(values))
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1
    n = len(values)
    below = stats.binomtest(math.floor(round(sum(values), 9)), n).proportion_ci(method="wilson")
    assert low == pytest.approx(below.low)


@pytest.mark.parametrize("n", [2, 5, 50])
def test_intervals_of_means_and_magnitudes(n):
    values = np.random.default_rng(n).lognormal(size=n)
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert statistics.mean_interval(values) == pytest.approx((values.mean(), *expected))
    middle, low, high = statistics.magnitude_interval(values)
    assert middle == pytest.approx(stats.gmean(values))
    assert (math.log(low), math.log(high)) == pytest.approx(statistics.mean_interval(np.log(values))[1:])


def test_intervals_of_few_values():
    one, none = np.ones(1), np.ones(0)
    assert statistics.share_interval(one)[0] == 1
    for interval in (statistics.mean_interval, statistics.magnitude_interval):
        middle, low, high = interval(one)
        assert middle == 1
        assert math.isnan(low)
        assert math.isnan(high)
    for interval in (statistics.share_interval, statistics.mean_interval, statistics.magnitude_interval):
        assert all(map(math.isnan, interval(none)))
    assert statistics.magnitude_interval(np.array([0.0, np.inf]))[0] == pytest.approx(1)


def test_a_summary_keeps_the_order_of_cells_and_skips_what_is_missing():
    frame = ablations.run(ablations.grid(SMALL, activation=["ReLU", "GELU"]), batches=2, limits=BUDGET)
    table = statistics.summarize(frame, ["activation", "batch"])
    assert table.activation.tolist() == ["ReLU", "GELU"]
    assert table.batches.tolist() == [2, 2]
    assert table.recall.tolist() == [1, 0]
    assert table.error[0] == pytest.approx(stats.gmean(frame.error[:2]))
    assert math.isnan(table.error[1])
    assert table.zero_share[1] == 0
    assert table.recall_low[0] == pytest.approx(stats.binomtest(2, 2).proportion_ci(method="wilson").low)
