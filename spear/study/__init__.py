"""Ablations: grids of attacks, their statistics, fields of tables. The judge's side. Notebooks 08 to 11."""
