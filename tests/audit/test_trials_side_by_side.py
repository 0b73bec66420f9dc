"""Simulated attacks in forked processes: the same as in turn, whatever becomes of a process."""

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from audited import CLASSES, QUICK, SHAPE
from torch import nn

from spear.audit import assessment, protection, side_by_side, simulation
from spear.audit.sample import choose

SQUARES = {f"{k} squared": partial(pow, k, 2) for k in range(7)}
forked = pytest.mark.skipif(not side_by_side._forks(), reason="trials run in turn on this machine")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


def test_all_parts_in_their_order(threads: int) -> None:
    said = []
    found = side_by_side.all_of(SQUARES, said.append)
    assert list(found.items()) == [(f"{k} squared", k * k) for k in range(7)]
    assert said == [*SQUARES]
    assert side_by_side.all_of({}, said.append) == {}
    assert torch.get_num_threads() == threads


@forked
def test_one_thread_each_in_processes_of_their_own(threads: int) -> None:
    parts = {str(k): lambda: (os.getpid(), torch.get_num_threads()) for k in range(5)}
    found = side_by_side.all_of(parts, lambda _words: None)
    assert all(used == 1 for _, used in found.values())
    assert (os.getpid() in {process for process, _ in found.values()}) == (threads == 1)


def test_what_a_part_raises(threads: int) -> None:
    def refused() -> None:
        raise ValueError("no such client")

    with pytest.raises(ValueError, match="no such client"):
        side_by_side.all_of({"one": int, "two": refused, "three": int}, lambda _words: None)


@forked
def test_a_process_that_dies_leaves_nothing_out(threads: int) -> None:
    here = os.getpid()

    def dies() -> str:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done in turn"

    parts = SQUARES | {"dies": dies} | {f"{k} later": partial(pow, k, 2) for k in range(3)}
    found = side_by_side.all_of(parts, lambda _words: None)
    assert [*found] == [*parts]
    assert found["dies"] == "done in turn"
    assert {words: found[words] for words in SQUARES} == {f"{k} squared": k * k for k in range(7)}


@forked
def test_trials_say_the_same(model: nn.Module, threads: int) -> None:
    """Of attacks that end by themselves, however slow the machine is."""
    others = choose("digits", SHAPE, CLASSES, most=40, seed=1)
    options = simulation.Options(time_limit=None)
    parts = {}
    for count in (2, 3, 4):
        words, trial = next(iter(protection.trials(model, others, count, others=others, options=options).items()))
        parts[f"{words}, {count}"] = trial
    found = side_by_side.all_of(parts, lambda _words: None)
    assert found == {words: trial() for words, trial in parts.items()}
    assert [tested.outcome.exact for tested in found.values()] == [2, 3, 4]
    assert all(tested.outcome.in_time for tested in found.values())


@forked
def test_an_audit_tries_the_same(model: nn.Module, simulated: assessment.Audit, threads: int) -> None:
    """Not how far trials come, as each ends at a time limit."""
    found = assessment.audit(model, count=4, **QUICK)
    assert [reach.method for reach in found.reaches] == [reach.method for reach in simulated.reaches]
    assert [entry.name for entry in found.defences] == [entry.name for entry in simulated.defences]
    assert found.outcome == simulated.outcome
    assert found.outcome.exact == 4
    assert found.memory > 1e7
