"""A working folder for commands: factories, an update, weights, damaged files."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spear import federated, models

SHAPE, BATCH = (1, 8, 8), 4
FACTORIES = """\
import sys, torch, spear.models
model = lambda: spear.models.fcnn((1, 8, 8), 60, 2, 5, seed=0)
narrow = lambda: spear.models.fcnn((1, 8, 8), 60, 2, 5, seed=0, dtype=torch.float32)
broken = lambda: 1 / 0
number = lambda: 3
quits = lambda: sys.exit(0)
frozen = lambda: model().requires_grad_(False)


def nan():
    made = model()
    made.fc2.weight.data[0, 0] = float("nan")
    return made


class Ending(torch.nn.Module):
    def named_parameters(self, *_, **__):
        sys.exit(0)


ends = Ending
"""


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, federated.SharedUpdate]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 3, 1])
    return inputs, federated.gradient(models.fcnn(SHAPE, 60, 2, 5, seed=0), inputs, labels)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple) -> Path:
    """A working folder with a module of factories, an update and weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    monkeypatch.delitem(sys.modules, "script", raising=False)
    monkeypatch.delenv("SPEAR_DATA", raising=False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "runs.yaml").touch()
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    case[1].save("update.safetensors")
    save_file(models.fcnn(SHAPE, 60, 2, 5, seed=0).state_dict(), "weights.safetensors")
    save_file(models.fcnn(SHAPE, 61, 2, 5, seed=0).state_dict(), "wider.safetensors")
    (tmp_path / "truncated.safetensors").write_bytes((tmp_path / "update.safetensors").read_bytes()[:-100])
    (tmp_path / "foreign.safetensors").write_bytes(b"PK\x03\x04 a zip file, or whatever else")
    return tmp_path
