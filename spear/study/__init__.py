"""What notebooks are made of: clients to attack, grids of attacks, statistics, fields of tables. The judge's side."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"clients": ["Client", "client", "network"]})
