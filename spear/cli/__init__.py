"""The command line: `spear figures`, `attack`, `audit`, `data`."""
