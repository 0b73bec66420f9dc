"""The command line: one clear line for every mistake, and exit statuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run

ATTACK = ["attack", "--run-code", "factories:model", "update.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack", "--run-code", "factories:model", "none.safetensors"], "none.safetensors: no such file"),
        (
            ["attack", "--run-code", "factories:model", "truncated.safetensors"],
            "truncated.safetensors: not a complete",
        ),
        (["attack", "--run-code", "factories:model", "foreign.safetensors"], "foreign.safetensors: not a complete"),
        (["attack", "--run-code", "factories:model", "wider.safetensors"], "has shape (61"),
        (["attack", "factories", "update.safetensors"], "factories: no such file, nor of the form package.module:"),
        (["attack", "--run-code", "nowhere:model", "update.safetensors"], "nowhere:model: ModuleNotFoundError"),
        (["attack", "--run-code", "factories:none", "update.safetensors"], "factories:none: AttributeError"),
        (
            ["attack", "--run-code", "factories:broken", "update.safetensors"],
            "factories:broken: ZeroDivisionError: division by zero",
        ),
        (
            ["attack", "--run-code", "factories:number", "update.safetensors"],
            "factories:number: returned int, not a torch.nn.Module",
        ),
        ([*ATTACK, "--weights", "wider.safetensors"], "wider.safetensors: Error(s) in loading state_dict"),
        ([*ATTACK, "--weights", "none.safetensors"], "none.safetensors: no such file"),
        ([*ATTACK, "--method", "magic"], "unknown method 'magic'"),
        ([*ATTACK, "--layer", "fc9"], "fc9"),
        ([*ATTACK, "--method", "sampling", "--batch-size", "60"], "needs a layer wider than 60; fc1 has 60"),
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
    *parts, line = capsys.readouterr().err.splitlines()
    assert all(part.startswith("spear attack: ") for part in parts)
    assert line.startswith("spear: error: ")
    assert message in line


@pytest.mark.parametrize("arguments", [["attack"], ["figures", "--jobs", "0"], ["figures", "--nothing"], ["fly"]])
def test_a_wrong_call_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run(*arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_python_m_spear_is_the_command_line() -> None:
    shown = subprocess.run([sys.executable, "-m", "spear", "--help"], capture_output=True, text=True, check=True)
    assert all(command in shown.stdout for command in ("figures", "attack", "data"))
