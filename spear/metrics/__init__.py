"""The judge: where truth and guess meet. Attack code never imports this.

`evaluation` compares a result with the batch, `perceptual` two pictures; `truth` is what the server does not see.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"evaluation": ["Evaluation", "evaluate"]})
