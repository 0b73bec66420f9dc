"""Simulated attacks are given up where their rate would not do, and only there."""

import math
from collections.abc import Callable

import pytest

from spear.audit.forecast import FEWEST, NOTHING, Forecast
from spear.reconstruction import Progress

LIMIT, BATCH = 5.0, 100


def rounds(found: Callable[[float], float], every: float, method: str = "layer") -> list[Progress]:
    """What an attack tells that has found so much after so many seconds, until its time is up or its batch whole."""
    told = []
    for k in range(1, int(LIMIT / every) + 1):
        told.append(Progress(method, min(BATCH, int(found(k * every))), BATCH, k, k * every))
        if told[-1].found == BATCH:
            break
    return told


def given_up(told: list[Progress], limit: float | None = LIMIT) -> float:
    """When; infinity where never."""
    forecast = Forecast(limit)
    for progress in told:
        if words := forecast(progress):
            assert forecast.hopeless
            assert f"{limit:g} s was out of reach after {progress.seconds:.1f} s" in words
            return progress.seconds
    assert not forecast.hopeless
    return math.inf


@pytest.mark.parametrize("every", [0.02, 0.1, 0.4, 1.2])
@pytest.mark.parametrize(("takes", "power"), [(0.5, 2.0), (2.0, 2.0), (4.5, 1.0), (4.5, 0.7), (3.5, 1.4)])
def test_what_arrives_in_time_is_not_given_up(every: float, takes: float, power: float) -> None:
    assert given_up(rounds(lambda t: BATCH * (t / takes) ** power, every)) == math.inf


@pytest.mark.parametrize("every", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("takes", [12.0, 40.0, math.inf])
def test_what_would_take_far_longer_is_given_up_early(every: float, takes: float) -> None:
    assert LIMIT / 10 < given_up(rounds(lambda t: BATCH * t / takes, every)) <= max(LIMIT / 4, FEWEST * every)


def test_what_stalls_is_given_up_in_time() -> None:
    assert 1 < given_up(rounds(lambda t: min(60, 80 * t), 0.1)) < 0.5 * LIMIT


def test_one_slow_round_says_nothing_but_where_it_finds_nothing() -> None:
    assert given_up([Progress("layer", 4, BATCH, 1, 0.6 * LIMIT)]) == math.inf
    assert given_up([Progress("layer", 0, BATCH, 1, 0.9 * NOTHING * LIMIT)]) == math.inf
    assert given_up([Progress("layer", 0, BATCH, 1, 1.1 * NOTHING * LIMIT)]) < math.inf
    assert given_up([Progress("layer", 0, 1, 1, 0.5 * LIMIT)]) == math.inf  # a single sample may be next


def test_sampling_finds_its_last_columns_by_the_logarithm_of_time() -> None:
    def found(t: float) -> float:
        return 70 + 10 * math.log(t)

    assert given_up(rounds(found, 0.1, "sampling")) < given_up(rounds(found, 0.1, "layer"))
    doubling = rounds(lambda t: BATCH + 10 * math.log2(t / 4), 0.1, "sampling")
    assert given_up(doubling) == math.inf


def test_the_first_half_second_says_nothing() -> None:
    assert given_up(rounds(lambda t: 0, 0.05)[:8], 0.4) == math.inf
    assert given_up(rounds(lambda t: 0, 0.05), 0.6) < 0.6


def test_each_method_is_judged_by_its_own_rounds() -> None:
    first = rounds(lambda t: 90 * min(t, 1.0), 0.2)[:4]
    second = [Progress("dictionary", 12 * k, BATCH, k, first[-1].seconds + 0.3 * k) for k in range(1, 9)]
    assert given_up([*first, *second]) == math.inf


@pytest.mark.parametrize("method", ["sampling", "layer"])
@pytest.mark.parametrize("begun", [0.9 * LIMIT, LIMIT, 1.5 * LIMIT])
def test_once_the_time_is_up_nothing_is_foretold(method: str, begun: float) -> None:
    late = [Progress(method, 0, BATCH, k, max(begun, LIMIT) + k) for k in range(1, 6)]
    assert given_up([Progress("network", 1, 1, 1, begun), *late]) == math.inf


def test_without_a_limit_nothing_is_given_up() -> None:
    assert given_up(rounds(lambda t: 0, 0.1), None) == math.inf
