"""The command line, called in this process."""

import pytest

from spear.cli.app import main


def run(*arguments: str) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)
