"""What the client holds: real data by name, as seeded batches; sample packs, downloads, tables.

Reading order: `known` (names, shapes, places), `catalog` (loads them), from `builtin` (always there), `packs` (one file
each) and `layouts` (the publishers'); `downloads`; `adult` and `census` (a table, its file), `tables` (rows, fields).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "known": ["available", "names"],
        "catalog": ["classes", "count", "fetch", "load", "mean", "pack", "shape", "std", "unnormalize"],
    },
)
