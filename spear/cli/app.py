"""The command line, `spear` or `python -m spear`.

Every mistake of the user is one line on stderr that names the cause, and exit status 2; so is a fault of ours.
"""

import os
import sys
import traceback
from typing import NoReturn

import click

from spear.cli import attack, audit, data, figures
from spear.cli.shared import app, printable

TRACEBACK = "SPEAR_TRACEBACK"  # environment variable that asks for the traceback of a fault of ours
INTERRUPTED = 130
LONGEST = 2000  # characters of a message

for command in (figures.figures, attack.attack, audit.audit):
    app.command()(command)
app.add_typer(data.data_app, name="data")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line on `arguments` (the process's own by default) and exit with its status.

    That is 2 for whatever could not be tried, so that 0 and 1 are findings: for a mistake of the user, for code of the
    model that ends the process, and for a fault of this package.
    """
    try:
        status = app(arguments, standalone_mode=False)
    except click.ClickException as wrong_call:
        wrong_call.show()
        status = wrong_call.exit_code
    except (click.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except (ValueError, OSError) as error:
        fail(str(error))
    except SystemExit as end:  # commands return their status
        if isinstance(end.__context__, BrokenPipeError):
            fail("nobody reads the output any more")
        fail(f"code of the model ended the process with status {end.code}")
    except Exception as error:
        _show_fault(error)
    raise SystemExit(status)


def fail(message: str) -> NoReturn:
    """Say in one line on stderr what is wrong, and exit with status 2.

    A message may quote a stranger's file, and is cut.
    """
    line = printable(" ".join(message.split()))
    print(f"spear: error: {line[:LONGEST]}", file=sys.stderr)
    raise SystemExit(2)


def _show_fault(error: Exception) -> NoReturn:
    """Say that this package is at fault, where, and what helps to mend it."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}, line {place.lineno})"
    how = f"please report the call and what it prints with {TRACEBACK}=1"
    fail(f"a fault of spear, not of what it was given: {what}; {how}")
