"""The command line. Reading order: `app`, the commands `attack`, `audit`, `figures` and `data`, and what they share.

`shared` holds what they all import, `display` says what a command is at, `given` reads the update of an audit, and
`recovered` and `findings` show what came out.
"""
