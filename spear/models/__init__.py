"""What both sides know: networks, model files, and where a layer stands in a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"networks": ["fcnn"]})
