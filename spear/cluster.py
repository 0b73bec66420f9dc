"""Work on a cluster: the executor of a dask.distributed scheduler, from the optional extra `cluster`."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager

TIMEOUT = 5  # seconds


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
