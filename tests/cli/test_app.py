"""The command line: one clear line for every mistake, and exit statuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import save_file

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
        ([*ATTACK, "--output", "notebooks"], "notebooks: a folder: it cannot be written to"),
        ([*ATTACK, "--output", "found", "--picture", "found"], "found: given twice"),
        ([*ATTACK, "--output", "update.safetensors"], "update.safetensors: given twice"),
        ([*ATTACK, "--time-limit", "nan"], "time_limit is a finite number of at least 0, not nan"),
        ([*ATTACK, "--time-limit", "-1"], "time_limit is a finite number of at least 0, not -1.0"),
        ([*ATTACK, "--batch-size", "0"], "batch_size is a whole number of at least 1, not 0"),
        ([*ATTACK, "--learning-rate", "nan"], "learning_rate is a number from 1e-30 to 1e+30, not 'nan'"),
        (
            ["attack", "factories:model", "update.safetensors"],
            "a factory is code, which is not run; where you trust it, --run",
        ),
        (["attack", "--run-code", "factories:quits", "update.safetensors"], "factories:quits: SystemExit: 0"),
        (["attack", "--run-code", "script:model", "update.safetensors"], "script:model: SystemExit: 0"),
        (
            ["attack", "--run-code", "factories:ends", "update.safetensors"],
            "code of the model ended the process with status 0",
        ),
        (
            ["attack", "--run-code", "factories:nan", "update.safetensors"],
            "fc2.weight of the model holds NaN or infinite",
        ),
        (["audit", "--run-code", "factories:frozen"], "no parameter of the model requires a gradient"),
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
    assert all(part.startswith(f"spear {arguments[0]}: ") for part in parts)
    assert line.startswith("spear: error: ")
    assert message in line


def test_a_fault_of_ours_is_one_line_that_says_so(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("spear.inversion.attack", fails)
    assert run(*ATTACK) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "spear: error: a fault of spear, not of what it was given: ZeroDivisionError: division by zero"
    )
    assert line.endswith("please report the call and what it prints with SPEAR_TRACEBACK=1")
    monkeypatch.setenv("SPEAR_TRACEBACK", "1")
    assert run(*ATTACK) == 2
    assert "Traceback" in capsys.readouterr().err


def test_names_in_a_strangers_file_do_not_reach_the_terminal_as_commands(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    save_file({"\x1b[2J" + "n" * 5000: torch.ones(2)}, "named.safetensors")
    assert run("attack", "--run-code", "factories:model", "named.safetensors") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.isprintable()
    assert len(line) < 2100


def test_an_interruption_is_no_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spear.inversion.attack", interrupted)
    assert run(*ATTACK) == 130


@pytest.mark.parametrize("arguments", [["attack"], ["figures", "--jobs", "0"], ["figures", "--nothing"], ["fly"]])
def test_a_wrong_call_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run(*arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_python_m_spear_is_the_command_line() -> None:
    shown = subprocess.run([sys.executable, "-m", "spear", "--help"], capture_output=True, text=True, check=True)
    assert all(command in shown.stdout for command in ("figures", "attack", "data"))
