"""What the client holds: real data by name, as seeded batches; sample packs, downloads, tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "catalog": [
            "available",
            "classes",
            "count",
            "fetch",
            "load",
            "mean",
            "names",
            "pack",
            "shape",
            "std",
            "unnormalize",
        ]
    },
)
