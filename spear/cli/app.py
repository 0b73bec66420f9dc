"""The command line, `spear` or `python -m spear`.

Every mistake of the user is one line on stderr that names the cause, and exit status 2.
"""

import sys
from typing import NoReturn

from spear.cli import attack, audit, data, figures
from spear.cli.shared import app

for command in (figures.figures, attack.attack, audit.audit):
    app.command()(command)
app.add_typer(data.data_app, name="data")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line on `arguments` (the process's own by default); a user's mistake exits with status 2."""
    try:
        app(arguments)
    except (ValueError, OSError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    print(f"spear: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)
