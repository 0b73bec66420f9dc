"""Any activation: a sample's gradient is a function of its pre-activations alone, and these lie in a known space.

Reading order: `layer` (the space, delta and its derivative), `fit` (all starts at once), `reflections` (across jumps of
phi'), `dropped` (units that dropout took), `together` (past half the width), `search` (starts, rounds, samples
subtracted), `descent` (down to the inputs), `whole` (all of it).
"""
