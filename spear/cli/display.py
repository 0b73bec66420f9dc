"""What a command is at, on stderr: a line before each part, or, on a terminal, one line that changes."""

import sys
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from spear import reconstruction
from spear.cli.shared import stderr


class Display:
    """Shown while it is entered; `command` is who says it."""

    def __init__(self, command: str) -> None:
        self._command, self._part, self._terminal = command, "", stderr.is_terminal
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        more = TextColumn("{task.fields[words]}"), TimeElapsedColumn()
        self._bar = Progress(*columns, *more, console=stderr, transient=True, disable=not self._terminal)
        self._task = self._bar.add_task(command, total=None, words="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def part(self, words: str) -> None:
        """Say which part begins, unless it is under way."""
        if words == self._part:
            return
        self._part = words
        if not self._terminal:
            print(f"spear {self._command}: {words}", file=sys.stderr, flush=True)
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(words, total=None, words="")

    def progress(self, p: reconstruction.Progress) -> None:
        """Say which method of an attack is at work, and on a terminal how far it has come."""
        self.part(f"method {p.method}")
        unit = "kernels" if p.method in ("sampling", "guided") else "starts"
        self._bar.update(self._task, completed=p.found, total=p.rank, words=f"{p.proposals:,} {unit}")
