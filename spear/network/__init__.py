"""Every layer: phase retrieval at the last hidden layer, least squares down, or projections up from the input.

Reading order beside notebook 11_network: `problem` (what the server knows), `spaces`, `phase_retrieval`, `exact_step`,
`starts`, `repulsion`, `policy` and `phase_search` (rounds), `factors` and `deflation` (samples leave one by one),
`layerwise` (down to the inputs), `labels`, `error_bounds` and `check` (the certificate, by the theorem of
`spear.certificate`), `whole_batch` (all of it); `curves` (activations other than ReLU); `projection` and `one_by_one`
begin at the other end.
"""
