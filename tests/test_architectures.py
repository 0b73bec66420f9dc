"""Random models, losses, batches and updates: no false certificate, no error above its bound, no traceback."""

import pytest
from architectures import judge

PROBLEMS, PARTS = 240, 4


@pytest.mark.parametrize("part", range(PARTS))
def test_random_problems(part: int) -> None:
    found = [judge(seed) for seed in range(part, PROBLEMS, PARTS)]
    assert not [verdict for verdict in found if verdict.error]
    assert not [verdict for verdict in found if verdict.wrong]
    assert sum(verdict.certified for verdict in found) > 0
