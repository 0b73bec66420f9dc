"""What the tests of figures share."""

from pathlib import Path

import pytest
from tiny_project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPEAR_FIGURES", raising=False)
    return Project(tmp_path)
