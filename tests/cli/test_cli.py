"""The command line: what it prints, its exit statuses, and one clear line for every mistake."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from spear import data, federated, inversion, models
from spear.cli.app import main

SHAPE, BATCH = (1, 8, 8), 4

FACTORIES = """\
import torch, spear.models
model = lambda: spear.models.fcnn((1, 8, 8), 60, 2, 5, seed=0)
narrow = lambda: spear.models.fcnn((1, 8, 8), 60, 2, 5, seed=0, dtype=torch.float32)
broken = lambda: 1 / 0
number = lambda: 3
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
    monkeypatch.delenv("SPEAR_DATA", raising=False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "runs.yaml").touch()
    (tmp_path / "factories.py").write_text(FACTORIES)
    case[1].save("update.safetensors")
    save_file(models.fcnn(SHAPE, 60, 2, 5, seed=0).state_dict(), "weights.safetensors")
    save_file(models.fcnn(SHAPE, 61, 2, 5, seed=0).state_dict(), "wider.safetensors")
    (tmp_path / "truncated.safetensors").write_bytes((tmp_path / "update.safetensors").read_bytes()[:-100])
    (tmp_path / "foreign.safetensors").write_bytes(b"PK\x03\x04 a zip file, or whatever else")
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_attack_finds_the_batch(folder: Path, case: tuple, capsys: pytest.CaptureFixture) -> None:
    files = ["--output", "found.safetensors", "--picture", "found.png"]
    status = run("attack", "factories:narrow", "update.safetensors", "--weights", "weights.safetensors", *files)
    output = capsys.readouterr().out.splitlines()
    assert (status, output[:3]) == (1, [f"rank       {BATCH}", f"recovered  {BATCH}", f"certified  {BATCH}"])
    with safe_open("found.safetensors", framework="pt") as found:
        assert found.metadata()["complete"] == "True"
        distances = torch.cdist(case[0].flatten(1), found.get_tensor("inputs").flatten(1))
        assert found.get_tensor("labels").tolist() == [int([0, 3, 3, 1][i]) for i in distances.argmin(0)]
    assert distances.min(1).values.max() < 1e-9
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_recovered_is_status_0(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("attack", "factories:model", "update.safetensors", "--time-limit", "0") == 0
    output = capsys.readouterr().out
    assert "recovered  0" in output
    assert "time limit" in output


ATTACK = ["attack", "factories:model", "update.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack", "factories:model", "none.safetensors"], "none.safetensors: no such file"),
        (
            ["attack", "factories:model", "truncated.safetensors"],
            "truncated.safetensors: not a complete",
        ),
        (["attack", "factories:model", "foreign.safetensors"], "foreign.safetensors: not a complete"),
        (["attack", "factories:model", "wider.safetensors"], "has shape (61"),
        (["attack", "factories", "update.safetensors"], "factories: no such file, nor of the form package.module:"),
        (["attack", "nowhere:model", "update.safetensors"], "nowhere:model: ModuleNotFoundError"),
        (["attack", "factories:none", "update.safetensors"], "factories:none: AttributeError"),
        (["attack", "factories:broken", "update.safetensors"], "factories:broken: ZeroDivisionError: division by zero"),
        (["attack", "factories:number", "update.safetensors"], "factories:number: returned int, not a torch.nn.Module"),
        ([*ATTACK, "--weights", "wider.safetensors"], "wider.safetensors: Error(s) in loading state_dict"),
        ([*ATTACK, "--weights", "none.safetensors"], "none.safetensors: no such file"),
        ([*ATTACK, "--method", "magic"], "unknown method 'magic'"),
        ([*ATTACK, "--layer", "fc9"], "fc9"),
        ([*ATTACK, "--batch-size", "60"], "needs a layer wider than 60; fc1 has 60"),
        ([*ATTACK, "--device", "abacus"], "device 'abacus' is not available here"),
        ([*ATTACK, "--output", "none/found.safetensors"], "none/found.safetensors: no such folder"),
        (["figures"], "runs.yaml: not a list of runs"),
        (["figures", "--dataset", "unheard-of"], "unknown data set 'unheard-of'"),
        (["figures", "--dataset", "mnist"], "run `spear data fetch mnist`"),
        (["figures", "--profile", "test"], "unknown profile 'test': use one of quick, paper"),
        (["data", "fetch", "unheard-of"], "unheard-of"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spear: error: ")
    assert message in line


@pytest.mark.parametrize("arguments", [["attack"], ["figures", "--jobs", "0"], ["figures", "--nothing"], ["fly"]])
def test_a_wrong_call_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run(*arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_python_m_spear_is_the_command_line() -> None:
    shown = subprocess.run([sys.executable, "-m", "spear", "--help"], capture_output=True, text=True, check=True)
    assert all(command in shown.stdout for command in ("figures", "attack", "data"))


def test_the_help_names_every_method(capsys: pytest.CaptureFixture) -> None:
    assert run("attack", "--help") == 0
    words = capsys.readouterr().out
    assert [method for method in inversion.METHODS if not re.search(rf"\b{method}\b", words)] == []


def test_the_gallery_alone_is_written_anew(folder: Path, capsys: pytest.CaptureFixture) -> None:
    cell = nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "notebooks" / "00_tiny.ipynb")
    profiles = {"quick": {}, "paper": {}, "test": {}}
    entry = {"name": "tiny", "notebook": "00_tiny.ipynb", "profiles": profiles, "writes": {"00_tiny-a": "What it is."}}
    (folder / "notebooks" / "runs.yaml").write_text(yaml.safe_dump([entry]))
    (folder / "figures").mkdir()
    Image.new("L", (2, 2)).save(folder / "figures" / "00_tiny-a.png")
    assert run("figures", "--pages") == 0
    page = (folder / "figures" / "README.md").read_text()
    assert "## [tiny](../notebooks/00_tiny.ipynb)" in page
    assert "![00_tiny-a](00_tiny-a.png)\n\nWhat it is." in page


def test_data_lists_and_packs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pixels = torch.arange(4 * 8 * 8 * 3, dtype=torch.uint8).reshape(4, 8, 8, 3).numpy()
    for number, image in enumerate(pixels):
        place = folder / "pictures" / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    assert run("data", "pack", "pictures", "mine", "--root", "packs") == 0
    assert capsys.readouterr().out.strip() == str(Path("packs") / "mine.npz")
    assert data.load("mine", count=4, root="packs")[0].shape == (4, 3, 8, 8)
    assert run("data", "pack", "pictures", "mine", "--root", "packs") == 2
    assert "mine.npz exists: remove it first" in capsys.readouterr().err
    assert run("data", "list") == 0
    listed = capsys.readouterr().out
    assert re.search(r"digits +│ yes", listed)
    assert re.search(r"mnist +│ no", listed)
