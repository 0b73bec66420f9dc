"""Independent pieces of work side by side, their results in order: in threads, or on the machines of an executor."""

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_SETTING = threading.Lock()  # of torch's number of threads


def in_order(
    work: Callable[[int], T], *, ahead: int, until: float = math.inf, executor: Executor | None = None
) -> Iterator[T]:
    """`work` of 0, 1, 2, ... in this order, until the clock (`time.monotonic`) shows `until`, `ahead` side by side.

    They run in threads, or wherever `executor` runs them, each on one core: operations are too short for torch's own
    threads, which cost more than they save by waiting for each other. What is no longer waited for is cancelled, or
    ends unheard where it has begun. Raises what `work` raises.
    """
    pool = executor or ThreadPoolExecutor(ahead, initializer=one_core)
    waiting: deque[Future[T]] = deque()
    try:
        for index in itertools.count():
            waiting.extend(pool.submit(alone, work, k) for k in range(index + len(waiting), index + ahead))
            left = None if until == math.inf else max(0, until - time.monotonic())
            yield waiting.popleft().result(left)
    except TimeoutError:
        if time.monotonic() < until:  # of the work itself
            raise
    finally:
        for future in waiting:
            future.cancel()
        if executor is None:
            pool.shutdown(wait=False)


def alone(work: Callable[[int], T], index: int) -> T:
    """`work(index)`, its operations without further threads; afterwards, and in other threads, all is as it was."""
    usual = torch.get_num_threads()
    if usual == 1:
        return work(index)
    one_core()
    try:
        return work(index)
    finally:
        torch.set_num_threads(usual)


def one_core() -> None:
    """Let torch run the operations of this thread without further threads; other threads keep theirs."""
    with _SETTING:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and the default for threads to come, which the next lines restore
        restore = threading.Thread(target=torch.set_num_threads, args=(usual,))
        restore.start()
        restore.join()
