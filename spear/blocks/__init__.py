"""Feed-forward blocks of transformers: the inputs of two linear layers, token by token, from their gradients alone.

To a linear layer each token of each sample is a sample of its own. For the tokens x_t of a batch, n in all,

    z = W x + beta      a = phi(z)      dL/d[W | beta] = sum_t g_t [x_t; 1]ᵀ      dL/d[W' | beta'] = sum_t d_t [a_t; 1]ᵀ

with g = phi'(z) ∘ W'ᵀ d. So [x_t; 1] lies in the row space of the first gradient, [phi(z_t); 1] in that of the second:
about m - n equations for n - 1 unknowns, whatever stands before and behind the block. In a gated block (LLaMA's) two
layers read x, a = phi(z) ∘ z', and their gradients are taken as one. Reading order: `view` (what is known), `curves`
(the equations), `search` (starts, tokens subtracted one by one), `lengths` (where the gradients leave these open, as in
T5, whose ReLU has no biases), `check` (the theorem), `recover`; then `images` (from the tokens down to the samples,
every step linear), `behind`.
"""
