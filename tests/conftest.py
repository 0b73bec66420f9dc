"""What the tests share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

# The same examples each time, so that what passes once passes again; --hypothesis-profile=default looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # the tests are many and small; pytest-xdist uses the other cores


@pytest.fixture(scope="session")
def repository() -> Path:
    """Folder of this checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Data root with sample packs of the real data sets: $SPEAR_DATA, or a folder beside the checkout."""
    folder = Path(os.environ.get("SPEAR_DATA", REPOSITORY / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip("no sample packs of real data: set SPEAR_DATA to a folder that has them")
    return folder
