"""The judge: where truth and guess meet. Attack code never imports this."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"evaluation": ["Evaluation", "evaluate"]})
