"""What was found out of a model, kept while attacks on it run: it is traced once, however many ask."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Found = TypeVar("Found")
_found: ContextVar[dict[Hashable, object] | None] = ContextVar("found", default=None)


@contextmanager
def remembered() -> Iterator[None]:
    """Within the context, and those inside it, what `once` was asked for is kept. The model must not change before its
    end."""
    known = _found.get()
    token = _found.set({} if known is None else known)
    try:
        yield
    finally:
        _found.reset(token)


def once(key: Hashable, make: Callable[[], Found]) -> Found:
    """What `make` gives for a key: made once within `remembered`, anew each time outside of it."""
    known = _found.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    return known[key]
