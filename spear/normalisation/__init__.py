"""Networks that normalise, or drop units, as they train: BatchNorm before or behind any activation, LayerNorm, RMSNorm.

Reading order: `problem` and `opening` (what the server knows), `statistics` (σ by buffers, by epsilon). BatchNorm:
`spaces` (where a sample's gradient and pre-activations lie), `reflections` and `exact_step` (search and solution),
`batch_search` (rounds), `level` and `common_shift` (where there is no shift), `calibration` (σ where epsilon tells it
roughly). Of each sample: `sample_search`, `sample_descent`. Behind ReLU: `columns`, by the gradient's own zeros. Beside
other activations, and behind them: `curves`; `last_layer` (which of these). Then `descent` (down to the inputs) with
`centred`, `partial` (what was found of a batch), `replay`, `batch_bounds`, `sample_bounds`, `sensitivity` and `judge`
(the certificate), `recover` (all of it). On the data themselves: `entry`.
"""
