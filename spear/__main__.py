"""`python -m spear`: the command line."""

from spear.cli.app import main

main()
