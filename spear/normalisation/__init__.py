"""Networks that normalise in training mode: BatchNorm by phase retrieval in an affine space (theory.md, section 6).

Reading order: `problem` (what the server knows), `statistics` (σ from buffers or from epsilon), `spaces` (where a
sample's gradient and pre-activations lie), `reflections` and `exact_step` (search and solution), `batch_search`
(rounds), `descent` (down to the inputs), `replay`, `bounds` and `judge` (the certificate), `recover` (all of it).
"""
