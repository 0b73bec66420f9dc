"""No false certificate, no traceback, no error above its bound: three hundred hostile problems."""

import pytest
from adversary import BLOCK, Verdict, block


@pytest.mark.parametrize("number", range(3))
def test_hostile_problems(number):
    found = block(number)
    assert len(found) >= BLOCK
    assert not [verdict for verdict in found if verdict.error]
    assert not [verdict for verdict in found if verdict.false or verdict.ratio > 1]
    assert sum(verdict.certified for verdict in found) > 0


def test_honest_problems_are_certified():
    """The recall that certificates must not cost: what an honest client with a disclosed count gives away."""
    honest = [verdict for number in range(3) for verdict in block(number) if _plain(verdict)]
    assert len(honest) > 3
    assert all(verdict.certified == verdict.returned for verdict in honest)


def _plain(verdict: Verdict) -> bool:
    return verdict.recipe.tricks == ("honest",) and verdict.returned == verdict.recipe.samples
