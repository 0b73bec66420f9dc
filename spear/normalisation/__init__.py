"""Networks that normalise: BatchNorm in training mode, LayerNorm, RMSNorm.

Reading order: `problem` and `opening` (what the server knows), `statistics` (σ by buffers, by epsilon). BatchNorm:
`spaces` (where a sample's gradient and pre-activations lie), `reflections` and `exact_step` (search and solution),
`batch_search` (rounds). Of each sample: `sample_search`, `sample_descent`. Then `descent` (down to the inputs),
`replay`, `batch_bounds`, `sample_bounds` and `judge` (the certificate), `recover` (all of it).
"""
