"""Independent pieces of work side by side, their results in order: in threads, or on the machines of a dask cluster."""

import asyncio
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
_SETTING = threading.Lock()  # of torch's number of threads
TIMEOUT = 5  # seconds


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


@contextmanager
def connect(address: str) -> Iterator[Executor]:
    """An executor whose work is done by the workers of the scheduler at `address`, for example tcp://10.0.0.1:8786.

    What a worker was at when it was lost is done again by another. Workers need the same packages.
    Raises `ValueError` where the package distributed is not installed, `OSError` where no scheduler answers, or where
    it is lost later, or one worker after the other with the same work.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise ValueError("a scheduler needs the package distributed: pip install 'spear[cluster]'") from error
    try:
        asyncio.run(_greet(address))
        client = Client(address, timeout=TIMEOUT)
    except (OSError, ValueError) as error:
        raise OSError(f"no scheduler answers at {address}") from error
    with client:
        try:
            yield client.get_executor(pure=False)
        except (CancelledError, KilledWorker) as error:
            raise OSError(f"work was lost by the scheduler at {address}: {error}") from error


async def _greet(address: str) -> None:
    """Open a connection and close it: `Client` has a limit for being heard, but none for being answered."""
    from distributed.comm import connect

    comm = await asyncio.wait_for(connect(address), TIMEOUT)
    await comm.close()
