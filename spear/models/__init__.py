"""What both sides know: networks, model files, and where a layer stands in a model.

Reading order: `networks` (fully connected); `traced`, `linear_nodes`, `graphs` (any model's computation in one form);
`entrywise`, `activations`, `modes`, `layers`, `tracing` (layers, by what stands around them); `watching` (what passes
through one), `streaming` (weights a slice at a time). Files: `files` (by name), `archives`, `expansion`, `rebuild`,
`tensors`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"networks": ["fcnn"]})
