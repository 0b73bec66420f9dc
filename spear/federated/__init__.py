"""What is sent: an update and what the client discloses beside it; clients that make one, defences that change one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"update": ["LOSSES", "SharedUpdate"], "clients": ["gradient"]}
)
