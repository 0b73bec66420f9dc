"""Simulated attacks side by side: in forked processes, as models are not safe to trace in several threads."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

import torch

T = TypeVar("T")
AT_ONCE = 4  # processes at most: each may need as much memory as the attack on the update did
_parts: Mapping[str, Callable[[], object]] = {}  # of a forked process: they are inherited, as models may not pickle


def all_of(parts: Mapping[str, Callable[[], T]], say: Callable[[str], None]) -> dict[str, T]:
    """What each part gives, by its words, in their order; `say` is called with the words when a part begins.

    As many as torch has threads run at once, at most `AT_ONCE`, each with one thread; in turn in this process where
    that is one, outside of Linux and with an accelerator, neither of which stands a fork. What was under way in a
    process that died (of too little memory) is done in turn. Raises what a part raises.
    """
    at_once = min(AT_ONCE, len(parts), torch.get_num_threads()) if _forks() else 1
    found = _forked(parts, at_once, say) if at_once > 1 else {}
    for words in parts:
        if words not in found:
            say(words)
            found[words] = parts[words]()
    return {words: found[words] for words in parts}


def _forks() -> bool:
    return sys.platform == "linux" and not torch.accelerator.is_available()


def _forked(parts: Mapping[str, Callable[[], T]], at_once: int, say: Callable[[str], None]) -> dict[str, T]:
    """What the parts give that came to an end before a process died."""
    waiting, running, found = list(parts), {}, {}
    pool = ProcessPoolExecutor(at_once, get_context("fork"), _begin, (parts,))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                words = waiting.pop(0)
                say(words)
                running[pool.submit(_run, words)] = words
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                found[running.pop(future)] = future.result()
    except BrokenProcessPool:
        pass
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _begin(parts: Mapping[str, Callable[[], object]]) -> None:
    """Of a process: torch's threads do not survive a fork."""
    global _parts
    _parts = parts
    torch.set_num_threads(1)


def _run(words: str) -> object:
    return _parts[words]()
