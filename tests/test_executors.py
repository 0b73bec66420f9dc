"""Work side by side: results in order, each on one core, and an end to waiting."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spear import executors


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(1), ThreadPoolExecutor(4)])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_results_come_in_order_whatever_is_done_first(ahead, executor):
    second_is_done = threading.Event()

    def work(index):
        if index == 1:
            second_is_done.set()
        elif index == 0 and ahead > 1 and executor is not None and executor._max_workers > 1:
            assert second_is_done.wait(60)
        return index

    assert list(itertools.islice(executors.in_order(work, ahead=ahead, executor=executor), 12)) == list(range(12))


def test_no_more_than_asked_for_is_begun():
    begun = []
    results = executors.in_order(lambda index: begun.append(index), ahead=1)
    assert begun == []
    next(results)
    next(results)
    results.close()
    assert begun == [0, 1]


def test_waiting_ends_when_the_time_is_up_and_the_rest_is_cancelled():
    go, begun = threading.Event(), []

    def work(index):
        begun.append(index)
        assert index < 2 or go.wait(60)
        return index

    with ThreadPoolExecutor(1) as executor:
        found = list(executors.in_order(work, ahead=4, until=time.monotonic() + 0.5, executor=executor))
        go.set()
    assert found == [0, 1]
    assert begun == [0, 1, 2]
    assert list(executors.in_order(work, ahead=1, until=time.monotonic() - 1)) in ([], [0], [0, 1])


def test_what_the_work_raises_is_raised():
    def work(index):
        return 1 // (2 - index)

    results = executors.in_order(work, ahead=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)

    def late(index):
        raise TimeoutError("the disk does not answer")

    with pytest.raises(TimeoutError, match="the disk does not answer"):
        next(executors.in_order(late, ahead=1))


def in_a_thread(function):
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(function).result()


def test_work_has_one_core_and_other_threads_keep_theirs():
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        here = torch.get_num_threads
        assert in_a_thread(lambda: (executors.alone(lambda index: (index, here()), 7), here())) == ((7, 1), 3)
        assert in_a_thread(lambda: (executors.one_core(), here())) == (None, 1)
        assert (here(), in_a_thread(here)) == (3, 3)
        assert list(itertools.islice(executors.in_order(lambda index: here(), ahead=2), 4)) == [1, 1, 1, 1]
        assert here() == 3
    finally:
        torch.set_num_threads(usual)
