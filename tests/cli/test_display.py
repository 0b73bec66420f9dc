"""What a command is at: lines without a terminal, one line that changes on one."""

import io

import pytest
from rich.console import Console

from spear.cli import display
from spear.cli.display import Display
from spear.reconstruction import Progress

PROGRESS = [Progress("network", 3, 8, 60, 0.1), Progress("sampling", 5, 8, 70_000, 0.2)]


def show() -> None:
    with Display("attack") as shown:
        shown.part("loading it")
        for progress in PROGRESS:
            shown.progress(progress)
            shown.progress(progress)


def test_without_a_terminal_each_part_is_a_line_once(capsys: pytest.CaptureFixture) -> None:
    show()
    assert capsys.readouterr().err.splitlines() == [
        "spear attack: loading it",
        "spear attack: method network",
        "spear attack: method sampling",
    ]


def test_on_a_terminal_the_method_says_its_own_word(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(display, "stderr", Console(file=written, force_terminal=True, width=100))
    for progress in PROGRESS:
        with Display("attack") as shown:  # what is on the screen when it ends
            shown.progress(progress)
    assert capsys.readouterr().err == ""
    words = ("method network", "3/8", "60 starts", "method sampling", "5/8", "70,000 kernels")
    assert [word for word in words if word not in written.getvalue()] == []
